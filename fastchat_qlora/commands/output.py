"""Where commands write: a console on standard output, and the file of `--output`."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rich.console import Console

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.config.mixture import get_path
from fastchat_qlora.data.sources.readers import find_files
from fastchat_qlora.errors import UserError
from fastchat_qlora.utils.atomic import write_atomically
from fastchat_qlora.utils.file_types import parse_folder_name


class Screen(Console):
    """A console that lets `open_stdout` handle a closed pipe; rich would end the program by itself."""

    def on_broken_pipe(self) -> None:
        """Raise what `open_stdout` expects."""
        raise BrokenPipeError


def check_output(path: Path, args: RunArguments, argv: Sequence[str]) -> None:
    """Check that a file can be written, and replaces no data and no other file of the command line."""
    if os.path.isdir(path):
        raise UserError(f"--output {path}: is a folder; give the name of a file")
    output, run = os.path.realpath(path), get_output_dir(args)
    names = [get_path(text) for text in (*args.data.data_path, *(args.data.eval_data_path or ()))]
    try:
        paths = [name if os.path.exists(name) else parse_folder_name(name).path for name in names]
        data = {os.path.realpath(file) for path in paths for file in find_files(path, run and run.resolve())[0]}
    except OSError:  # reading the data will report it
        data = set()
    if output in data:
        raise UserError(f"--output {path}: is a file of the data, which would be lost; give another name")
    named = [os.path.realpath(os.path.expanduser(word.rpartition("=")[2])) for word in argv]
    if os.path.exists(path) and named.count(output) > 1:
        raise UserError(f"--output {path}: is a file of this command line, which would be lost; give another name")
    with _report_output_errors(path):
        with suppress(FileNotFoundError):
            path.lstat()  # fails for impossible names
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def get_output_dir(args: RunArguments) -> Path | None:
    """Return the folder of the run; None where none is given."""
    return None if args.training.output_dir == "." else Path(args.training.output_dir)


@contextmanager
def open_output(path: Path) -> Iterator[TextIO]:
    """Open the file of `--output`, which appears when the block ends without an error."""
    with _report_output_errors(path), write_atomically(path) as target:
        yield target


@contextmanager
def _report_output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); give another name") from error
