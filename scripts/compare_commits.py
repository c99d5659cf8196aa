"""Compare what the program does at a commit and in this working tree.

    bash scripts/compare_commits.sh HEAD~1 --cases labels,cli --messages ignore

A case (compare_cases.py) is a list of command lines. The commit and the working tree run each of them on the same
inputs and in the same environment. The exit code, the output and the files left are read, freed of paths, times, speeds
and memory readings, and compared. Nothing of the package is imported by name, so that its modules may be renamed.
"""

import argparse
import atexit
import difflib
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from compare_cases import CASES, Inputs, Job, draw_command_lines, make_inputs

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MOST_SECONDS = 300
"""Of one command line."""

MOST_DIFFERENCES = 12
"""Of one command line that are printed."""


# --- The process that runs command lines: it imports everything once and forks. ---


def serve() -> None:
    """Run a job for each line of standard input, in a forked process, and answer with its exit code."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    package = importlib.import_module("fastchat_qlora")
    if not Path(str(package.__file__)).is_relative_to(os.environ["PYTHONPATH"]):
        raise ImportError(f"{package.__file__} is not in {os.environ['PYTHONPATH']}")
    for module in pkgutil.walk_packages(package.__path__, "fastchat_qlora."):
        importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # so that the forked processes share the memory of the imports
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            code = run_forked(**json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # a normal exit of the interpreter would take longer than most command lines
        print(wait_for(process), file=answers, flush=True)


def run_forked(argv: list[str], folder: str, environment: dict[str, str], stdout: str, stderr: str) -> int:
    """Run a command line as a process of its own would: `train` through train_lora.py, others as the command does."""
    os.setsid()
    os.chdir(folder)
    os.environ |= environment
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, stdout), (2, stderr)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    try:
        if argv[0] == "train":
            sys.argv = [os.path.join(os.environ["PYTHONPATH"], "train_lora.py"), *argv[1:]]
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            sys.argv = ["fastchat-qlora", *argv]
            importlib.import_module("fastchat_qlora.cli").program(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait_for(process: int) -> int:
    """Return the exit code of a process, negative for a signal; end one that takes too long."""
    until = time.monotonic() + MOST_SECONDS
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > until:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(ended[1])


class Side:
    """One of the two trees, the process that serves it, and the folder for what it leaves.

    The folders of both sides have names of the same length, so that lines break at the same places.
    """

    def __init__(self, tree: Path, folder: Path, renames: Mapping[str, str]) -> None:
        self._tree, self._folder, self._renames = tree, folder, renames
        (folder / "home").mkdir(parents=True)
        launchers = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        self._environment = {name: value for name, value in os.environ.items() if name not in launchers} | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(tree),
            "PYTHONHASHSEED": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(folder / "home"),
            "MPLCONFIGDIR": str(folder / "home"),
            "TORCH_EXTENSIONS_DIR": os.path.expanduser("~/.cache/torch_extensions"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "TORCH_COMPILE_DISABLE": "1",
            "COLUMNS": "120",
            "LC_ALL": "C.UTF-8",
        }
        self._server: subprocess.Popen[str] | None = None

    def run(self, job: Job, case: str) -> dict[str, Any]:
        """Run a job and return what it leaves: exit code, output, and files, as data without what varies."""
        folder = self._folder / case / (job.folder or job.name)
        if job.template and not folder.exists():
            shutil.copytree(job.template, folder, symlinks=True)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in job.files.items():
            (folder / name).write_text(text, encoding="utf-8")
        before = stamps(folder)
        streams = {name: str(self._folder / case / f"{job.name}.{name}") for name in ("stdout", "stderr")}
        found: dict[str, Any] = {"exit code": (self._launch if job.launcher else self._ask)(job, folder, streams)}
        for name, path in streams.items():
            found[name] = Lines(Path(path).read_text(encoding="utf-8", errors="replace").splitlines())
        changed = sorted(path for path, stamp in stamps(folder).items() if before.get(path) != stamp)
        found["files"] = {str(path.relative_to(folder)): read_file(path) for path in changed}
        paths = {str(folder): "<folder>", str(self._folder): "<side>", str(self._tree): "<tree>"}
        found = Normalizer(paths, self._renames, is_run=job.argv[0] == "train").free(found)
        if job.launcher:  # its processes write in any order
            found |= {name: Lines(sorted(found[name])) for name in streams}
        return found

    def _ask(self, job: Job, folder: Path, streams: Mapping[str, str]) -> int:
        environment = dict(job.environment) | ({"HOME": str(folder / "home")} if job.template else {})
        if "RANK" in environment:
            environment |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        if self._server is None:
            pipe = subprocess.PIPE
            server = [sys.executable, str(Path(__file__).resolve()), "--serve"]
            self._server = subprocess.Popen(server, env=self._environment, stdin=pipe, stdout=pipe, text=True)
            self._answer()
        request = {"argv": list(job.argv), "folder": str(folder), "environment": environment, **streams}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._answer())

    def _answer(self) -> str:
        answer: str = self._server.stdout.readline()  # type: ignore[union-attr]
        if not answer:
            raise RuntimeError(f"the process that runs {self._tree} has ended")
        return answer

    def _launch(self, job: Job, folder: Path, streams: Mapping[str, str]) -> int:
        program, *flags = job.launcher
        script = str(self._tree / "train_lora.py")
        command = [str(BIN / program), *flags, "--master_port", str(free_port()), script, *job.argv[1:]]
        with open(streams["stdout"], "w") as out, open(streams["stderr"], "w") as err:
            options: dict[str, Any] = {"cwd": folder, "env": self._environment, "stdout": out, "stderr": err}
            process = subprocess.Popen(command, start_new_session=True, **options)
            return wait_for(process.pid)

    def close(self) -> None:
        """End the process."""
        if self._server:
            self._server.communicate()


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    """Return the files of a folder with values that change with them."""
    found = ((path, path.stat()) for path in folder.rglob("*") if path.is_file())
    return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in found}


# --- Reading what a command line leaves. ---


class Lines(list[str]):
    """A text, line by line."""


class Page(HTMLParser):
    """The cells of the tables and tiles of a page, its other texts, and the numbers of charts and of points."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.counts = {"charts": 0, "points": 0}
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Begin a row or a cell, or count a chart or a point."""
        classes = (dict(attrs).get("class") or "").split()
        kind = "row" if tag == "tr" or "tile" in classes else tag
        kind = "cell" if tag in ("td", "th") or self._open[-1:] == ["row"] else kind
        self._open.append(kind)
        self.counts["charts"] += tag == "svg"
        self.counts["points"] += bool({"point", "bar"} & {*classes})
        if kind == "row":
            self.rows.append([])
        elif kind == "cell":
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        if self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        """Take a text up, unless it stands in a chart or is a style."""
        text = " ".join(data.split())
        if not text or {"svg", "style", "script"} & {*self._open}:
            return
        if "cell" in self._open:
            self.rows[-1][-1] += text
        else:
            self.texts.append(text)


def read_page(path: Path) -> dict[str, Any]:
    """Read report.html, or the page of `inspect`."""
    page = Page()
    page.feed(re.sub(r"<(meta|link|br|hr|img|input)\b[^>]*>", "", path.read_text(encoding="utf-8")))
    return {"tables": page.rows, "text": Lines(page.texts), **page.counts}


def read_card(path: Path) -> dict[str, Any]:
    """Read a model card: the cells of its tables, and the text around them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return {"tables": cells, "text": Lines(line for line in lines if not line.startswith("|"))}


def read_tensors(path: Path) -> dict[str, str]:
    """Describe a file of weights by its bytes and by each tensor, so that a difference has a place."""
    import torch
    from safetensors.torch import load_file

    found = {"bytes": hashlib.sha256(path.read_bytes()).hexdigest()}
    for name, tensor in load_file(path).items():
        digest = hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        found[name] = f"{tensor.dtype} {list(tensor.shape)}, mean {tensor.double().mean():.9g}, sha256 {digest[:16]}"
    return found


def read_json(text: str) -> Any:
    """Parse JSON; what is no number stays a text, which is equal to itself."""
    return json.loads(text, parse_constant=str)


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: read_json(path.read_text(encoding="utf-8")),
    ".jsonl": lambda path: [read_json(line) for line in path.read_text(encoding="utf-8").splitlines()],
    ".safetensors": read_tensors,
    ".html": read_page,
    ".md": read_card,
    ".yaml": lambda path: Lines(path.read_text(encoding="utf-8").splitlines()),
    ".jinja": lambda path: Lines(path.read_text(encoding="utf-8").splitlines()),
}
"""Other files are only there or not; those of a checkpoint have their digests in its manifest."""


def read_file(path: Path) -> Any:
    """Read a file as JSON-like data."""
    is_cached = re.search(r"/[0-9a-f]{32}/", str(path))  # only the code in its key reads it
    try:
        return READERS[path.suffix](path) if path.suffix in READERS and not is_cached else "is there"
    except ValueError:
        return "cannot be read"


class Normalizer:
    """Frees JSON-like data of what varies from run to run.

    Args:
        paths: what stands for folders that differ.
        renames: names of before and of now, so that a measured value is known under both.
        is_run: whether times, speeds and memory were measured; a plan computes them.
    """

    MEASURED = re.compile(
        r"\w*(per_second|runtime)|time_to_first_step|memory_gib|peak_memory_mib|seconds|tokens per second.*|memory|time"
    )
    """Keys of JSON and labels of tables."""

    DIGESTED = ("trainer_state.json", "sha256")
    """Keys of a checkpoint's manifest whose values are digests of what has measured values in it."""

    TEXTS = (
        (r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\]", "[<date>]"),
        (r"\b[0-9a-f]{32}\b", "<cache entry>"),
        (r"(\b[Pp]rocess |--master_port=)\d{3,}", r"\1<number>"),
        (r"fastchat-qlora \d+\.\d+\S*", "fastchat-qlora <version>"),
    )
    TEXTS_OF_RUNS = (
        (r"[\d,.]+ tokens/s, [\d,.]+", "<speed> tokens/s, <speed>"),
        (r"\b\d+:\d\d:\d\d\b", "<time>"),
        (r"\b[\d.]+ s after", "<time> s after"),
        (r"of the [\d.]+ GiB", "of the <memory> GiB"),
        (r"[\d,]+ MiB are free", "<room> MiB are free"),
    )

    def __init__(self, paths: Mapping[str, str], renames: Mapping[str, str], *, is_run: bool) -> None:
        self._paths, self._is_run = paths, is_run
        self._names = {new for old, new in renames.items() if self.MEASURED.fullmatch(old)}
        self._texts = [*self.TEXTS, *(self.TEXTS_OF_RUNS if is_run else ())]

    def free(self, value: Any) -> Any:
        """Return the data with placeholders."""
        if isinstance(value, dict):
            return {self.free(key): self._free_item(key, item) for key, item in value.items()}
        if isinstance(value, Lines):
            return Lines(map(self.free, value))
        if isinstance(value, list):
            is_measured = bool(value) and isinstance(value[0], str) and self._is_measured(value[0])
            return [value[0], *["<measured>"] * (len(value) - 1)] if is_measured else [self.free(one) for one in value]
        return self._free_text(value) if isinstance(value, str) else value

    def _free_item(self, key: str, item: Any) -> Any:
        is_measured = isinstance(item, int | float) and self._is_measured(key)
        is_digest = self._is_run and key in self.DIGESTED and isinstance(item, str | list)
        return "<measured>" if is_measured or is_digest else self.free(item)

    def _is_measured(self, name: str) -> bool:
        return self._is_run and bool(self.MEASURED.fullmatch(name) or name in self._names)

    def _free_text(self, text: str) -> str:
        for path, name in self._paths.items():
            text = text.replace(path, name)
        for pattern, replacement in self._texts:
            text = re.sub(pattern, replacement, text)
        return text


# --- Comparing. ---

WORDY = ("README.md", "report.html", "rows.html", "training_args.json", "manifest.json", "plan.json", "rejected.jsonl")
"""Files with texts for people."""


def without_messages(found: Mapping[str, Any], argv: Sequence[str]) -> dict[str, Any]:
    """Return what a job left without wording: of output whether there is any, of a help its flags."""
    kept: dict[str, Any] = {"exit code": found["exit code"]}
    kept |= {name: bool(found[name]) for name in ("stdout", "stderr")}
    if {"--help", "-h"} & {*argv}:
        kept["flags"] = sorted(set(re.findall(r"--\w+", "\n".join(found["stdout"]))))
    if "--print_config" in argv:
        kept["settings"] = Lines(line for line in found["stdout"] if not line.lstrip().startswith("#"))
    for name, content in found["files"].items():
        kept[name] = only_numbers(content) if Path(name).name in WORDY else content
        if name.endswith(".yaml"):
            kept[name] = Lines(line for line in content if not line.lstrip().startswith("#"))
    return kept


def only_numbers(value: Any) -> Any:
    """Return JSON-like data with nothing but the numbers of each text of three words or more."""
    if isinstance(value, dict):
        return {key: only_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return type(value)(only_numbers(item) for item in value)
    if isinstance(value, str) and len(value.split()) > 2:
        return f"numbers of a text: {' '.join(re.findall(r'[0-9]+(?:[.,][0-9]+)*', value))}"
    return value


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return JSON-like data with keys and whole texts renamed."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return type(value)(renamed(item, names) for item in value)
    return names.get(value, value) if isinstance(value, str) else value


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Yield a text for each place where JSON-like data differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{place} / {key}")
    elif (old_lines := as_lines(old)) is not None and (new_lines := as_lines(new)) is not None:
        yield from changed_lines(old_lines, new_lines, place)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from differences(before, after, f"{place}[{number}]")
    elif old != new or type(old) is not type(new):
        old, new = (f"{len(value)} items" if isinstance(value, list | dict) else value for value in (old, new))
        yield f"{place}\n    -{str(old)[:400]}\n    +{str(new)[:400]}"


def changed_lines(old: list[str], new: list[str], place: str) -> Iterator[str]:
    """Yield one text with the lines that differ, if any do."""
    compared = list(difflib.unified_diff(old, new, lineterm="", n=0))[2:]
    changed = [f"\n    {line[:400]}" for line in compared if not line.startswith("@@")]
    if changed:
        yield place + "".join(changed[:20]) + (f"\n    and {len(changed) - 20} lines more" if len(changed) > 20 else "")


def as_lines(value: Any) -> list[str] | None:
    """Return a text or a table as lines; None for other data."""
    if isinstance(value, Lines):
        return value
    if isinstance(value, list) and value and all(isinstance(row, list) for row in value):
        is_table = all(isinstance(cell, str) for row in value for cell in row)
        return [" | ".join(row) for row in value] if is_table else None
    return None


def compare_case(case: str, sides: Sequence[Side], inputs: Inputs, names: Mapping[str, str], messages: str) -> int:
    """Run a case on both sides at once, print the differences and return how many there are."""
    began, count, jobs = time.monotonic(), 0, list(CASES[case](inputs))
    with ThreadPoolExecutor(len(sides)) as threads:
        old, new = threads.map(lambda side: [side.run(job, case) for job in jobs], sides)
    for job, before, after in zip(jobs, old, new, strict=True):
        before = renamed(before, names)
        if messages == "ignore":
            before, after = (without_messages(found, job.argv) for found in (before, after))
        found = list(differences(before, after))
        count += len(found)
        if found:
            print(f"{case} / {job.name}: {shlex.join(job.argv)[:400]}")
            print("\n".join(f" {text}" for text in found[:MOST_DIFFERENCES]))
            print(f"  and {len(found) - MOST_DIFFERENCES} more\n" * (len(found) > MOST_DIFFERENCES), end="")
    took = time.monotonic() - began
    print(f"{case}: {len(jobs)} command lines, {count} differences, {took:.0f} s", flush=True)
    return count


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    """Yield an empty folder, which is removed afterwards unless it is to be kept."""
    if kept:
        kept.mkdir(parents=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        yield Path(folder).resolve()


@contextmanager
def checked_out(commit: str, tree: Path) -> Iterator[Path]:
    """Yield a worktree of a commit, which is removed afterwards."""
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        yield tree
    finally:
        subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main() -> int:
    """Compare a commit with this working tree; return 1 if they differ."""
    parser = argparse.ArgumentParser(description="Compare what the program does at a commit and in this working tree.")
    parser.add_argument("commit", help="Commit to compare with.")
    parser.add_argument("--cases", default=",".join(CASES), help="Some of the cases, with commas between them.")
    parser.add_argument("--renames", type=Path, help="JSON file of keys and labels renamed on purpose: old -> new.")
    parser.add_argument("--messages", choices=("ignore", "exact"), default="exact", help="Whether wording counts.")
    parser.add_argument("--keep", type=Path, help="New folder for inputs and outputs, which is kept.")
    args = parser.parse_args()
    cases = args.cases.split(",")
    if unknown := {*cases} - {*CASES}:
        parser.error(f"--cases {', '.join(unknown)}: must be some of {','.join(CASES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    names = json.loads(args.renames.read_text(encoding="utf-8")) if args.renames else {}
    with work_folder(args.keep) as work, checked_out(args.commit, work / "tree") as tree:
        inputs = Inputs(work / "inputs")
        make_inputs(inputs.folder, tree)
        if "cli" in cases:
            command = [sys.executable, __file__, "--draw", str(tree), str(inputs.folder / "drawn.json")]
            environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0"}  # draws the same each time
            subprocess.run(command, check=True, cwd=work, env=environment)
        sides = [Side(tree, work / "old", names), Side(ROOT, work / "new", names)]
        try:
            counts = [compare_case(case, sides, inputs, names, args.messages) for case in cases]
        finally:
            for side in sides:
                side.close()
    return int(any(counts))


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    elif sys.argv[1:2] == ["--draw"]:
        draw_command_lines(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(main())
