"""argv -> command -> exit code; the only place that turns exceptions into exit codes."""

import atexit
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NoReturn

from fastchat_qlora import __version__
from fastchat_qlora.config.fast_help import check_fast
from fastchat_qlora.errors import AgreedError, RunError, UserError
from fastchat_qlora.utils.imports import quick_imports
from fastchat_qlora.utils.signals import Stopped, get_unhandled_signal, interruptible
from fastchat_qlora.utils.stdout import BROKEN_PIPE_EXIT_CODE, OutputClosed
from fastchat_qlora.utils.text import escape_control, mask_secrets, one_line

FIRST_PROCESS_SECONDS = 30.0  # for which processes leave a user's mistake to the first process of their node
LAUNCHER_SECONDS = 20.0  # for which a process waits to be ended by its launcher after another one has ended


def _run_train(argv: Sequence[str]) -> None:
    check_fast("train", argv)
    with _under_watch():
        with quick_imports():
            from fastchat_qlora.config.parser import parse_args

            args = parse_args(argv)
            from fastchat_qlora.training.run import train

        train(args)


def _run_inspect(argv: Sequence[str]) -> None:
    check_fast("inspect", argv)
    with _under_watch():
        with quick_imports():
            from fastchat_qlora.commands.inspect.command import inspect

        inspect(argv)


def _run_plan(argv: Sequence[str]) -> None:
    check_fast("plan", argv)
    with _under_watch():
        with quick_imports():
            from fastchat_qlora.commands.plan.command import plan

        plan(argv)


def _run_chat(argv: Sequence[str]) -> None:
    from fastchat_qlora.commands.adapter_flags import parse_chat

    parse_chat(argv)  # answers --help and mistakes before the libraries are imported
    with _under_watch():
        with quick_imports():
            from fastchat_qlora.commands.chat.command import chat

        chat(argv)


def _run_merge(argv: Sequence[str]) -> None:
    from fastchat_qlora.commands.adapter_flags import parse_merge

    parse_merge(argv)
    with _under_watch():
        with quick_imports():
            from fastchat_qlora.commands.merge.command import merge

        merge(argv)


@contextmanager
def _under_watch() -> Iterator[None]:
    """Check a launcher's variables, and log waits in the block; `--help` needs neither."""
    from fastchat_qlora.distributed.environment import settle_launcher
    from fastchat_qlora.distributed.waiting import reporting_waits

    for warning in settle_launcher():
        logging.getLogger(__name__).warning(warning)
    with reporting_waits(), interruptible() if count_processes() > 1 else nullcontext():
        yield


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_run_train, "train an adapter; the same as train_lora.py"),
    "inspect": (_run_inspect, "show which tokens are supervised; takes the flags of train"),
    "plan": (_run_plan, "estimate steps, memory, disk and time of a run; takes the flags of train"),
    "chat": (_run_chat, "chat with the base model and a trained adapter"),
    "merge": (_run_merge, "write a model with the adapter merged into its weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv`, or else `sys.argv`, names first.

    Returns:
        The exit code: 0 done; 2 a user's mistake found before weights are loaded; 1 a run that failed later; 143 and
        130 stopped by SIGTERM and SIGINT; 141 nobody reads standard output. Other exceptions pass through.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-V", "--version"):
        sys.stdout.write(f"fastchat-qlora {__version__}\n")
        return 0
    if name in ("-h", "--help"):
        lines = "".join(f"  {command:<8} {summary}\n" for command, (_, summary) in COMMANDS.items())
        sys.stdout.write(f"usage: fastchat-qlora COMMAND [flags]\n\n{lines}\nCOMMAND --help lists the flags.\n")
        return 0
    _set_up_logging()
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
        COMMANDS[name][0](rest)
    except UserError as error:
        return _fail(str(error), code=2)
    except AgreedError as error:
        return _fail(str(error), code=1) if _is_first_process() else 1
    except RunError as error:
        return _fail(str(error), code=1)
    except Stopped as stopped:
        return _stop(str(stopped), stopped.exit_code)
    except OutputClosed:
        return BROKEN_PIPE_EXIT_CODE
    except KeyboardInterrupt:  # before there was anything to save
        return _stop("SIGINT: stopped before the run started", 130)
    return 0


def count_processes() -> int:
    """Return the number of processes that a launcher has started, this one included."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 1


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit code.

    One process among several skips Python's teardown, which now and then aborts in C++ ("terminate called without an
    active exception", seen with torch 2.13.0, gloo and DeepSpeed 0.19.8) and turns a good run into a failed one. This
    can go once it no longer does.
    """
    if count_processes() == 1:
        sys.exit(main(argv))
    try:
        code = main(argv)
        atexit._run_exitfuncs()
    except Exception as error:
        code = _fail_among_several(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail_among_several(error: Exception) -> int:
    """Report an exception of this process, but leave the failure of another process to that one.

    When a process fails, the others lose their connections and would bury its error under theirs. They report only if
    the launcher does not end them: the failed process may be on another machine.
    """
    from fastchat_qlora.distributed.process_group import is_lost_peer

    if not is_lost_peer(error):
        traceback.print_exception(error)
        return 1
    if signum := get_unhandled_signal():  # the launcher is ending all processes, this one while it wrote its report
        return 128 + signum
    time.sleep(LAUNCHER_SECONDS)
    reason = escape_control(one_line(error))[:300]
    peer = "another process of the run has ended, or does not answer"
    sys.stderr.write(f"error: rank {os.environ.get('RANK')}: {peer}: {reason}\n")
    return 1


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # is no generic class at run time
    """Handler of messages whose untrusted parts must not control the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message with control characters escaped and secrets masked."""
        return escape_control(mask_secrets(super().format(record)))

    def emit(self, record: logging.LogRecord) -> None:
        """Write above progress bars, if there are any, not through them."""
        tqdm = sys.modules.get("tqdm")
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm else nullcontext():
            super().emit(record)


def _set_up_logging() -> None:
    """Log once: in the first process of the run."""
    package = logging.getLogger("fastchat_qlora")
    package.handlers = [_Handler()]
    package.propagate = False
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    # Two warnings of libraries for their own developers, which puzzle whoever starts a first run. bitsandbytes 0.50
    # misses a kernel that only generation on CPUs with AVX-512 uses; PEFT 0.21 reads a property by the name that
    # transformers 6 drops. They can go with the next versions of the two.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _stop(message: str, code: int) -> int:
    """Report in the first process that a signal has ended the run, and return the exit code."""
    if _is_first_process():
        sys.stderr.write(f"{escape_control(one_line(message))}\n")
    return code


def _is_first_process() -> bool:
    """Return whether this is the first process; others give it a second, since the launcher ends all when one ends."""
    if os.environ.get("RANK", "0") == "0":
        return True
    time.sleep(1)
    return False


def _fail(message: str, code: int) -> int:
    """Print the one `error:` line, and return the exit code.

    Every process of a node finds the same user's mistake. The first one reports it; the others wait to be ended by the
    launcher, which ends all as soon as one ends, and report it too if they are not. What stops a run later may be known
    to one process only, which reports it at once.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if local_rank != "0" and code == 2 and count_processes() > 1:
        time.sleep(FIRST_PROCESS_SECONDS)
    where = "" if local_rank == "0" or count_processes() == 1 else f"local rank {local_rank}: "
    sys.stderr.write(f"error: {where}{escape_control(mask_secrets(one_line(message)))}\n")
    return code
