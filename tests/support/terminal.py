"""`fastchat-qlora chat` in a terminal of its own."""

import os
import sys
from pathlib import Path

import pexpect

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from fastchat_qlora.cli import program; program()"


def start(adapter: Path, *flags: str) -> pexpect.spawn:
    """Start `fastchat-qlora chat` in a terminal of its own, and wait for its first prompt."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"}
    argv = ["-c", PROGRAM, "chat", str(adapter), *flags]
    child = pexpect.spawn(
        sys.executable, argv, env=environment, cwd=str(ROOT), encoding="utf-8", timeout=60, echo=False
    )
    child.expect("/help lists the commands")
    child.expect_exact("\r\n> ")
    return child


def ask(child: pexpect.spawn, line: str) -> str:
    """Type a line, and return the output up to the next prompt."""
    child.sendline(line)
    child.expect_exact("\r\n> ")
    return str(child.before).replace("\r\n", "\n").removeprefix(line).strip()
