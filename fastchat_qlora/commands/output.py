"""What a command writes in place of the terminal."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from fastchat_qlora.config.arguments import RunArguments
from fastchat_qlora.data.sources.readers import find_files
from fastchat_qlora.errors import UserError


def check_output(path: Path, args: RunArguments, argv: Sequence[str]) -> None:
    """Refuse what cannot or should not be written before anything is read.

    Args:
        path: that is to be written.
        args: of the run, whose data may not be lost.
        argv: the command line; no other file that it names may be lost either, such as that of its settings.

    Raises:
        UserError: naming what it is.
    """
    if os.path.isdir(path):
        raise UserError(f"--output {path}: is a folder; give the name of a file")
    output = os.path.realpath(path)
    if output in map(os.path.realpath, _data_files(args)):
        raise UserError(f"--output {path}: is a file of the data, which would be lost; give another name")
    named = [os.path.realpath(os.path.expanduser(word.rpartition("=")[2])) for word in argv]
    if os.path.exists(path) and named.count(output) > 1:
        raise UserError(f"--output {path}: is a file of this command line, which would be lost; give another name")
    with written_whole(path, keep=False):
        pass


def get_output_dir(args: RunArguments) -> Path | None:
    """The folder of the run; None where none was given."""
    return None if args.training.output_dir == "." else Path(args.training.output_dir)


def _data_files(args: RunArguments) -> list[Path]:
    run = get_output_dir(args)
    try:
        return [
            file
            for name in (*args.data.data_path, *(args.data.eval_data_path or ()))
            for file in find_files(name, run and run.resolve()).files
        ]
    except OSError:  # is told when the data is to be read
        return []


@contextmanager
def written_whole(path: Path, *, keep: bool = True) -> Iterator[IO[str]]:
    """A text file that appears under its name when all is written, or not at all.

    Raises:
        UserError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as target:
            yield target
        if keep:
            part.replace(path)
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written ({error.strerror}); give another name") from error
    finally:
        with suppress(OSError):  # what cannot be made cannot always be removed
            part.unlink()
