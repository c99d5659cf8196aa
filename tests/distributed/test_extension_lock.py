"""A lock that a killed compilation has left behind is removed; one that is held, or may be, is not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from fastchat_qlora.distributed import extension_lock
from fastchat_qlora.distributed.extension_lock import remove_stale_locks


@pytest.fixture(params=["op", "py311_cpu/op"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of an operation's lock; without TORCH_EXTENSIONS_DIR torch has one more folder."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(extension_lock, "ALL_PROCESSES", os.readlink("/proc/self/ns/pid"))
    path = tmp_path / request.param / "lock"
    path.parent.mkdir(parents=True)
    return path


HOLD = """
import sys
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that holds the lock as torch does while it compiles."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_lock_of_a_killed_compilation_is_removed(
    lock: Path, holder: subprocess.Popen[str], notices: pytest.LogCaptureFixture
) -> None:
    """As long as it lives the lock stays."""
    remove_stale_locks()
    assert lock.exists() and notices.messages == []
    holder.kill()
    holder.wait()
    remove_stale_locks()
    assert notices.messages == [f"{lock}: removed: it was left behind by a compilation that was killed."]
    assert FileBaton(str(lock)).try_acquire()


def test_compilers_of_a_killed_run_are_waited_for(lock: Path, notices: pytest.LogCaptureFixture) -> None:
    """ninja goes on without the process that started it, and a second one would write the same files."""
    lock.touch()
    with subprocess.Popen(["sleep", "1"], cwd=lock.parent) as compiler:
        remove_stale_locks()
        assert compiler.poll() == 0
    assert not lock.exists()


@pytest.mark.parametrize(
    ("what", "value"),
    [("LOCAL_FILE_SYSTEMS", ("nothing",)), ("ALL_PROCESSES", "pid:[1]")],
    ids=["another machine", "another container"],
)
def test_lock_that_may_be_held_elsewhere_is_logged(
    what: str, value: object, lock: Path, notices: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extension_lock, what, value)
    monkeypatch.setattr(extension_lock, "MACHINE_ROOT", Path("/proc"))
    lock.touch()
    remove_stale_locks()
    assert lock.exists()
    assert len(notices.messages) == 1 and notices.messages[0].endswith(f"stop this run and remove it: rm {lock}")


def test_lock_of_another_user_is_logged(
    lock: Path, notices: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only root sees what files others have open, even in one's own folder."""
    lock.symlink_to("/etc/passwd")  # root's
    if os.getuid() == 0:
        os.chown(lock.parent, 1000, -1)
        monkeypatch.setattr("os.getuid", lambda: 1000)
    remove_stale_locks()
    assert lock.exists() and len(notices.messages) == 1, notices.messages


def test_folder_without_locks_is_no_news(
    tmp_path: Path, notices: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "none"))
    remove_stale_locks()
    assert notices.messages == [] and os.listdir(tmp_path) == []
