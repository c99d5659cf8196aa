"""argv -> one command. The only place that turns exceptions into exit codes."""

import atexit
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NoReturn

from fastchat_qlora import __version__
from fastchat_qlora.errors import AgreedError, RunError, UserError
from fastchat_qlora.utils.signals import Stopped, get_unhandled_signal
from fastchat_qlora.utils.stdout import BROKEN_PIPE_EXIT_CODE, OutputClosed
from fastchat_qlora.utils.text import escape_control, mask_secrets, one_line

FIRST_PROCESS_SPEAKS_WITHIN = 30.0
"""Seconds that the other processes of a node leave their first one to tell of a user's mistake."""

LAUNCHER_ENDS_WITHIN = 20.0
"""Seconds that a process which has lost another one waits to be ended before it tells of it."""


def _train(argv: Sequence[str]) -> None:
    from fastchat_qlora.config.fast_help import check_fast

    check_fast("train", argv)
    from fastchat_qlora.config.parser import parse_args

    args = parse_args(argv)
    from fastchat_qlora.training.run import train

    train(args)


def _inspect(argv: Sequence[str]) -> None:
    from fastchat_qlora.config.fast_help import check_fast

    check_fast("inspect", argv)
    from fastchat_qlora.commands.inspect.command import inspect

    inspect(argv)


def _plan(argv: Sequence[str]) -> None:
    from fastchat_qlora.config.fast_help import check_fast

    check_fast("plan", argv)
    from fastchat_qlora.commands.plan.command import plan

    plan(argv)


def _chat(argv: Sequence[str]) -> None:
    from fastchat_qlora.commands.adapter_flags import parse_chat

    parse_chat(argv)  # mistakes and --help before the libraries come
    from fastchat_qlora.commands.chat.command import chat

    chat(argv)


def _merge(argv: Sequence[str]) -> None:
    from fastchat_qlora.commands.adapter_flags import parse_merge

    parse_merge(argv)
    from fastchat_qlora.commands.merge.command import merge

    merge(argv)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (_train, "train an adapter; the same as train_lora.py"),
    "inspect": (_inspect, "show what would be learnt; takes the flags of train"),
    "plan": (_plan, "say what a run will take: steps, memory, disk, time; takes the flags of train"),
    "chat": (_chat, "talk to the base model with a trained adapter"),
    "merge": (_merge, "write a plain model: the base with the adapter in its weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the command's name and its flags; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0 done, 2 a user's mistake found before weights are loaded, 1 a run that was stopped later, 143
        and 130 one that SIGTERM and SIGINT have ended, 141 one whose output nobody reads any more.
        Any other exception passes through, so that its traceback is seen; Python then exits with 1.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-V", "--version"):
        sys.stdout.write(f"fastchat-qlora {__version__}\n")
        return 0
    if name in ("-h", "--help"):
        sys.stdout.write(_usage())
        return 0
    _set_up_logging()
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}: choose one of {', '.join(COMMANDS)}")
        COMMANDS[name][0](rest)
    except UserError as error:
        return _fail(str(error), code=2)
    except AgreedError as error:
        return _fail_together(str(error))
    except RunError as error:
        return _fail(str(error), code=1)
    except Stopped as stopped:
        return _stop(str(stopped), stopped.exit_code)
    except OutputClosed:
        return BROKEN_PIPE_EXIT_CODE
    except KeyboardInterrupt:  # before there was anything to save
        return _stop("SIGINT: stopped before the run began", 130)
    return 0


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command as a process of its own and end the process with its exit code.

    One process among several leaves without tearing the interpreter down: with everything saved and the process group
    closed, that teardown now and then aborts in C++ ("terminate called without an active exception", seen with torch
    2.13.0, gloo and DeepSpeed 0.19.8), which turns a good run into a failed one. Can go when it no longer does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
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
    """Show what went wrong in this process, and leave what went wrong elsewhere to the process that knows.

    When one process has failed, the others find their connections closed and would bury its error under theirs. They
    wait for the launcher to end them, and speak only where it does not: their launcher may be that of another machine.
    """
    from fastchat_qlora.distributed.process_group import is_lost_peer

    if is_lost_peer(error):
        if (
            signum := get_unhandled_signal()
        ):  # the launcher is ending all already, while this one was still writing its page
            return 128 + signum
        time.sleep(LAUNCHER_ENDS_WITHIN)
        reason = escape_control(one_line(error))[:300]
        sys.stderr.write(f"error: rank {os.environ.get('RANK')}: another process of the run has ended: {reason}\n")
    else:
        traceback.print_exception(error)
    return 1


def _usage() -> str:
    lines = [f"  {name:<8} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: fastchat-qlora COMMAND [flags]", "", *lines, "", "COMMAND --help lists the flags.", ""])


class _Formatter(logging.Formatter):
    """Bare messages; what data and templates bring into them must not steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """The message with escapes in place of control characters, and without tokens and passwords."""
        return escape_control(mask_secrets(super().format(record)))


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # is no generic class when it runs
    """Writes above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Have the bars, if there are any, step aside meanwhile."""
        tqdm = sys.modules.get("tqdm")
        with tqdm.tqdm.external_write_mode(file=self.stream) if tqdm else nullcontext():
            super().emit(record)


def _set_up_logging() -> None:
    """Notices are said once: by the first process of the run."""
    is_main = os.environ.get("RANK", "0") == "0"
    handler = _Handler()
    handler.setFormatter(_Formatter("%(message)s"))
    package = logging.getLogger("fastchat_qlora")
    package.handlers = [handler]
    package.propagate = False
    package.setLevel(logging.INFO if is_main else logging.ERROR)
    # Two notices of libraries for their own developers, which puzzle whoever starts a first run. bitsandbytes 0.50
    # misses a kernel that only answers, and not trains, on CPUs with AVX-512; PEFT 0.21 reads a property by the name
    # that transformers 6 drops. They can go with the next versions of the two.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _fail_together(message: str) -> int:
    """Every process ends for the same reason, which the first one tells."""
    return _fail(message, code=1) if _speaks_for_all() else 1


def _stop(message: str, code: int) -> int:
    """Say, in the first process, that a signal has ended the run."""
    if _speaks_for_all():
        sys.stderr.write(f"{escape_control(one_line(message))}\n")
    return code


def _speaks_for_all() -> bool:
    """Whether this is the first process; others leave it a second, since the launcher ends all when one leaves."""
    if os.environ.get("RANK", "0") == "0":
        return True
    time.sleep(1)
    return False


def _fail(message: str, code: int) -> int:
    """Print the one `error:` line.

    Every process of a node meets the same user's mistake, so its first one speaks. The others stay until the launcher
    ends them: the launcher ends all as soon as one leaves, and the first may not have come to the mistake yet. One
    that is still there after `FIRST_PROCESS_SPEAKS_WITHIN` speaks for itself. What stops a run later may be known to
    one process only, which says it at once.
    """
    local_rank = os.environ.get("LOCAL_RANK", "0")
    if local_rank != "0" and code == 2:
        time.sleep(FIRST_PROCESS_SPEAKS_WITHIN)
    where = "" if local_rank == "0" else f"local rank {local_rank}: "
    sys.stderr.write(f"error: {where}{escape_control(mask_secrets(one_line(message)))}\n")
    return code
