"""The names of one flag -> raw records, and hashes of the files that they are in."""

import os
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path

from tqdm.auto import tqdm

from fastchat_qlora.data.sources.fields.names import FIELDS
from fastchat_qlora.data.sources.readers import RawRecord, ReportBytes, read_file
from fastchat_qlora.data.sources.repository import DataFile, describe_rows, find_data
from fastchat_qlora.data.tokenization.cache import hash_content
from fastchat_qlora.errors import UserError


class DataSource:
    """The files of one flag, in order.

    Args:
        cache_dir: of downloads.
        exclude: a folder whose files are not read: the run's own output.
        columns: those read from files that may have columns of any kind.

    Raises:
        UserError: something cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        flag: str,
        cache_dir: str | None,
        show_progress: bool,
        *,
        exclude: Path | None = None,
        columns: Collection[str] = FIELDS,
    ) -> None:
        self.paths = list(paths)
        self.flag = flag
        self.show_progress = show_progress
        self.columns = columns
        found = [(i, part) for i, path in enumerate(paths) for part in find_data(path, flag, cache_dir, exclude)]
        self.parts: list[DataFile] = [part for _, part in found]
        self.path_indices = [i for i, _ in found]  # of each part: that of its path
        self.read_by_part: list[int] = []  # records that were read of each part
        self.size = sum(os.path.getsize(part.path) for part in self.parts)

    def contents(self) -> list[tuple[str, str]]:
        """Return the name and the content's hash of each file."""
        try:
            return [(part.name, hash_content(part.path) + describe_rows(part)) for part in self.parts]
        except OSError as error:
            raise UserError(
                f"{self.flag} {error.filename}: cannot be read: {error.strerror}; give a file you may read"
            ) from error

    def records(self) -> Iterator[RawRecord]:
        """Yield all records, and count those of each part."""
        self.read_by_part = []
        hidden = None if self.show_progress else True  # None: shown where there is a terminal
        with tqdm(total=self.size, desc="Tokenizing", unit="B", unit_scale=True, disable=hidden) as bar:
            for part in self.parts:
                self.read_by_part.append(0)
                for record in self._read(part, bar.update):
                    self.read_by_part[-1] += 1
                    yield record

    def records_at(self, places: set[tuple[str, int]]) -> Iterator[RawRecord]:
        """Yield the records at (file, line) places; each file is read up to the last one."""
        for name, part in {part.name: part for part in self.parts}.items():
            left = {place for place in places if place[0] == name or place[0].startswith(f"{name}/")}  # in an archive
            records = self._read(part._replace(rows=slice(None)))
            while left and (record := next(records, None)):
                if record.source[:2] in left:
                    left.remove(record.source[:2])
                    yield record

    def _read(self, part: DataFile, progress: ReportBytes = lambda count: None) -> Iterator[RawRecord]:
        records = read_file(part.path, self.flag, progress, name=part.name, columns=self.columns)
        return islice(records, part.rows.start, part.rows.stop)
