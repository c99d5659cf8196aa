"""Effects of flags: where each is seen in a short run, beside the same run without the flag."""

import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from observe import FILE

Shapes = dict[str, list[int]]  # of tensors, by name


class FlagRun:
    """A finished run: exit code, output, and what it left in its folder."""

    def __init__(self, code: int, said: str, folder: Path) -> None:
        self.code, self.said, self.folder = code, said, folder

    @cached_property
    def adapter(self) -> bytes:
        """The bytes of the adapter's tensors."""
        return (self.folder / "adapter_model.safetensors").read_bytes()

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the adapter's tensors."""
        return {name: list(tensor.shape) for name, tensor in safetensors.torch.load(self.adapter).items()}

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The entries of the log."""
        return json.loads((self.folder / "trainer_state.json").read_text())["log_history"]

    @property
    def evaluations(self) -> list[float]:
        """The losses of evaluation."""
        return [entry["eval_loss"] for entry in self.log if "eval_loss" in entry]

    def observed(self, rank: int = 0) -> dict[str, Any]:
        """Return what observe.py saw in a process."""
        return json.loads((self.folder.parent / FILE).with_suffix(f".{rank}.json").read_text())

    def files(self) -> set[str]:
        """Return the names of all files of the run."""
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


def pick(values: Any, path: str) -> Any:
    """Return a value in nested dictionaries by a path such as `optimizer.lr`; None if it is not there."""
    for name in path.split("."):
        values = (values or {}).get(name)
    return values


class Refused(NamedTuple):
    """Exit code 2 before anything is loaded."""

    reason: str

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"refused ({self.reason})"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 2, run.said
        assert self.reason in run.said and "Loading the weights" not in run.said, run.said


class Dropped(NamedTuple):
    """One warning, and the run without the flag."""

    reason: str

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"ignored ({self.reason.rpartition('ignored: ')[2]})"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        assert run.said.count(self.reason) == 1 and self.reason not in base.said, run.said
        assert run.adapter == base.adapter
        assert run.evaluations == base.evaluations
        assert [entry.keys() for entry in run.log] == [entry.keys() for entry in base.log]


class Same(NamedTuple):
    """The run as without the flag, for a reason."""

    why: str

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"as without it ({self.why})"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        assert run.adapter == base.adapter
        assert run.evaluations == base.evaluations
        assert "ignored" not in run.said or "ignored" in base.said, run.said


class Tensors(NamedTuple):
    """Other values of the adapter; losses and order of the first step may stay."""

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return "the adapter's tensors"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        assert run.adapter != base.adapter


class Weights(NamedTuple):
    """Other tensors in the adapter's file."""

    what: str
    holds: Callable[[Shapes], object]  # true or false

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"the adapter's tensors: {self.what}"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        assert self.holds(run.shapes) and not self.holds(base.shapes), run.shapes


class Order(NamedTuple):
    """Another order of the records."""

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return "the order of the records"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        assert run.observed()["order"] != base.observed()["order"]


class Logged(NamedTuple):
    """Entries of the log with a key: their steps, or their values."""

    key: str
    steps: list[int] | None = None
    values: list[float] | None = None

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"the log: `{self.key}`"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        found, before = ([entry for entry in one.log if self.key in entry] for one in (run, base))
        shown, unchanged = ([(entry["step"], entry[self.key]) for entry in entries] for entries in (found, before))
        assert shown != unchanged, shown
        if self.steps is not None:
            assert [step for step, _ in shown] == self.steps
        if self.values is not None:
            assert [round(value, 9) for _, value in shown] == self.values


class Live(NamedTuple):
    """A value of a live object, read when training has ended."""

    path: str
    value: Any
    rank: int = 0

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"the live `{self.path}`"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        assert pick(run.observed(self.rank), self.path) == self.value
        assert pick(base.observed(self.rank), self.path) != self.value


class Says(NamedTuple):
    """A text in the output."""

    text: str
    where: str = "the console"
    code: int = 0

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return self.where

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == self.code, run.said
        assert self.text in run.said and self.text not in base.said, run.said


class Files(NamedTuple):
    """Files that are there as well, and files that are not."""

    added: str = ""  # names, separated by spaces
    missing: str = ""

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"files: `{(self.added or self.missing).split()[0]}`"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        assert {*self.added.split()} <= run.files() - base.files(), run.files()
        assert {*self.missing.split()} <= base.files() - run.files(), run.files()


class Setting(NamedTuple):
    """A value in a JSON file of the run."""

    file: str
    path: str
    value: Any = None  # None: any other than without the flag

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"{self.file}: `{self.path.rpartition('.')[2]}`"

    def check(self, run: FlagRun, base: FlagRun) -> None:
        assert run.code == 0, run.said
        found, before = (self._read(one) for one in (run, base))
        assert found != before, found
        assert self.value is None or found == self.value

    def _read(self, run: FlagRun) -> Any:
        return pick(json.loads((run.folder / self.file).read_text()), self.path)


class Elsewhere(NamedTuple):
    """A test of its own."""

    test: str

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"`{self.test.partition('::')[0]}`"


class OnDevice(NamedTuple):
    """An effect that a CPU does not show."""

    why: str

    @property
    def seen(self) -> str:
        """The place in docs/flags.md."""
        return f"not here: {self.why}"


Effect = (
    Refused | Dropped | Same | Tensors | Weights | Order | Logged | Live | Says | Files | Setting | Elsewhere | OnDevice
)
