"""Runs of train_lora.py as processes of their own that start in a fraction of a second.

A server process imports everything once and forks; the fork runs train_lora.py itself. Several processes find each
other by the environment that torchrun sets. Tests of the launchers start the real ones.
"""

import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from launching import ROOT, free_port

PRELOAD = [
    *("fastchat_qlora.training.run", "fastchat_qlora.config.arguments", "deepspeed", "forked"),
    *("matplotlib.figure", "matplotlib.backends.backend_svg", "transformers.models.llama.modeling_llama"),
    "frozen",
]


def context() -> Any:
    """Return the context of the processes; its server starts with the first one."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(PRELOAD)
    return found


def _work(program: str, arguments: Sequence[str], environment: dict[str, str], log: str) -> None:
    """Run the program in the forked process."""
    os.environ |= environment
    os.chdir(ROOT)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # for those who wait for a line
    if prepare := environment.get("PREPARE"):
        module, _, function = prepare.partition(":")
        getattr(__import__(module), function)()
    sys.argv = [program, *arguments]
    sys.path.insert(0, str((ROOT / program).parent))
    try:
        runpy.run_path(str(ROOT / program), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Ended(NamedTuple):
    """End of a run: the exit code of each process, negative for a signal, and the output."""

    codes: list[int]
    said: str


class Run:
    """A running command line in one process or in several, whose output is appended to a log."""

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        processes: int = 1,
        program: str = "train_lora.py",
        **environment: str,
    ) -> None:
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        self._said_before = log.stat().st_size
        port = str(free_port()) if processes > 1 else ""
        self.processes: list[BaseProcess] = []
        for rank in range(processes):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_PORT": port}
            own |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(processes)}
            given = environment | (own if processes > 1 else {})
            self.processes.append(context().Process(target=_work, args=(program, list(arguments), given, str(log))))
        for process in self.processes:
            process.start()
        self.started = time.monotonic()

    def is_alive(self) -> bool:
        """Return whether all processes are alive."""
        return all(process.is_alive() for process in self.processes)

    def send(self, signum: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to all processes, or to some."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(pid, signum)

    def wait(self, seconds: float = 300) -> Ended:
        """Wait for the end; like a launcher, kill the others once one has failed."""
        until = time.monotonic() + seconds
        while any(process.exitcode is None for process in self.processes):
            failed = any(process.exitcode not in (None, 0) for process in self.processes)
            if failed or time.monotonic() > until:
                time.sleep(2)  # for the last output of the others
                self.send(signal.SIGKILL)
            time.sleep(0.002)
        codes = [int(process.exitcode or 0) for process in self.processes]
        if time.monotonic() > until:
            raise TimeoutError(f"still at work after {seconds} s:\n{self.said()[-3000:]}")
        return Ended(codes, self.said())

    def kill_after(self, has_begun: Callable[[], bool], seconds: float, ranks: Sequence[int] | None = None) -> bool:
        """Send SIGKILL that many seconds after something has begun; return False if the run ended before."""
        until = None
        while self.is_alive():
            if until is None and has_begun():
                until = time.monotonic() + seconds
            if until is not None and time.monotonic() >= until:
                self.send(signal.SIGKILL, ranks)
                self.wait()
                return True
            time.sleep(0.0005)
        return False

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Wait until a text is in the output."""
        until = time.monotonic() + seconds
        while text not in self.said():
            if not self.is_alive() or time.monotonic() > until:
                raise TimeoutError(f"{text!r} was not said:\n{self.said()[-3000:]}")
            time.sleep(0.005)

    def said(self) -> str:
        """Return the output so far."""
        with self._log.open("rb") as file:
            file.seek(self._said_before)
            return file.read().decode(errors="replace")


def command(model: Path, data: Path, output: Path, *flags: str) -> list[str]:
    """Return the arguments of a run; later flags win."""
    paths = f"--model_name_or_path {model} --data_path {data} --output_dir {output}"
    return " ".join([paths, *flags]).split()


def train(arguments: Sequence[str], folder: Path, *, seconds: float = 300, **options: Any) -> Ended:
    """Run from beginning to end, with the log in `folder`."""
    return Run(arguments, folder / "log.txt", **options).wait(seconds)


def launch(command: str, timeout: float = 600, **environment: str) -> subprocess.CompletedProcess[str]:
    """Do as launching.launch with the program and processes of the command line, without its launcher."""
    words = shlex.split(command)
    at = next(index for index, word in enumerate(words) if word.endswith(".py"))
    counted = [index for index, word in enumerate(words[:at]) if word in ("--nproc_per_node", "--num_accelerators")]
    processes = int(words[counted[0] + 1]) if counted else 1
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        run = Run(words[at + 1 :], log, processes=processes, program=words[at], **environment)
        ended = run.wait(timeout)
    code = next((code for code in ended.codes if code), 0)
    return subprocess.CompletedProcess(words, code, ended.said, "")


def succeed(command: str, timeout: float = 600, **environment: str) -> str:
    """Do as launching.succeed."""
    done = launch(command, timeout, **environment)
    if done.returncode:
        raise RuntimeError(f"{command}\nended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done.stdout
