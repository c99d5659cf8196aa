"""What becomes of each pair of a real chat template and a kind of record: accepted, or rejected for a reason.

Run it by hand:

    python -m tests.support.template_sweep [--template NAME] [--record NAME] [--folder FOLDER]
"""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from fastchat_qlora.data.sources.readers import RawRecord, Source
from fastchat_qlora.data.tokenization.labels import IGNORE_INDEX
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings

sys.path.insert(0, str(Path(__file__).resolve().parent))
from template_oracle import Judgment, Servers, find_omission, find_refusal, judge
from template_records import RECORDS, Record
from template_sources import Family, download_templates, get_family, make_tokenizer, read_templates

TEMPLATE_FOLDER = Path(__file__).resolve().parents[2] / ".pytest_cache" / "llama.cpp"


class Cell(NamedTuple):
    """A record with a template: its sequences, or the reason why there are none, and how both were judged."""

    sequences: list[dict[str, Any]]
    rejection: str
    refusal: str = ""  # of the template itself, in every form
    omission: str = ""  # what the template leaves out of the record, in every form and mode
    judgment: Judgment = Judgment(())

    @property
    def is_accepted(self) -> bool:
        return bool(self.sequences)

    @property
    def is_renderable(self) -> bool:
        """Whether the template itself can render the record."""
        return not (self.refusal or self.omission)


class Sweep:
    """A template with its tokenizer."""

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.family: Family = get_family(name)
        self.tokenizer: PreTrainedTokenizerBase = make_tokenizer(name, source)

    def run(self, record: Record) -> Cell:
        """Preprocess a record, and judge what comes out."""
        servers = Servers(self.tokenizer, record)
        cell = self.try_out(record, servers)
        if refusal := find_refusal(servers):
            return cell._replace(refusal=refusal)
        return cell._replace(omission=find_omission(servers))

    def try_out(self, record: Record, servers: Servers | None = None) -> Cell:
        """Preprocess a record, and judge its sequences, but not what the template itself can do with it."""
        sequences, reason = preprocess(self.tokenizer, record)
        known = servers or Servers(self.tokenizer, record)
        return Cell(sequences, reason, judgment=judge(known, self.family, sequences) if sequences else Judgment(()))


def preprocess(tokenizer: PreTrainedTokenizerBase, record: Record) -> tuple[list[dict[str, Any]], str]:
    """Return the sequences of a record, or none and the reason why."""
    preprocessor = _get_preprocessor(tokenizer)
    batch = preprocessor([(0, RawRecord(Source("record", 1), json.dumps(record).encode()))])
    return batch.sequences.to_pylist(), "".join(one.reason for one in batch.rejections)


@lru_cache(maxsize=1)
def _get_preprocessor(tokenizer: PreTrainedTokenizerBase) -> Preprocessor:
    return Preprocessor(tokenizer, PreprocessingSettings("auto", 100_000, "truncate"))


def split_at_labels(tokenizer: Any, sequence: Mapping[str, Any]) -> Iterator[tuple[bool, str]]:
    """Yield the parts of a sequence as text, and whether they are supervised."""
    pairs = zip(sequence["input_ids"], sequence["labels"], strict=True)
    for supervised, run in itertools.groupby(pairs, lambda pair: pair[1] != IGNORE_INDEX):
        yield supervised, str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))


def supervised_texts(tokenizer: Any, sequence: Mapping[str, Any]) -> list[str]:
    """Return the supervised parts of a sequence as text."""
    return [text for supervised, text in split_at_labels(tokenizer, sequence) if supervised]


def show(tokenizer: Any, sequence: Mapping[str, Any]) -> str:
    """Return a sequence as text, with its supervised parts in ⟦⟧."""
    parts = split_at_labels(tokenizer, sequence)
    return "".join(f"⟦{text}⟧" if supervised else text for supervised, text in parts)


def describe(cell: Cell) -> str:
    """Return what becomes of a cell, in a line."""
    if cell.is_accepted:
        return "accepted" + (" in the mode with thoughts" if cell.judgment.mode else "")
    if cell.refusal:
        return f"refused by the template: {cell.refusal}"
    omission = f"; the template leaves out {cell.omission}" if cell.omission else ""
    return f"rejected: {cell.rejection}{omission}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print what becomes of each cell."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--template", default="", help="part of a template's name")
    parser.add_argument("--record", choices=RECORDS)
    parser.add_argument("--folder", type=Path, default=TEMPLATE_FOLDER, help="of llama.cpp's templates")
    parser.add_argument("--characters", type=int, default=400, help="to show of the end of a sequence")
    given = parser.parse_args(arguments)
    download_templates(given.folder)
    for name, source in read_templates(given.folder).items():
        if given.template in name:
            for line in _run(Sweep(name, source), [given.record] if given.record else RECORDS, given.characters):
                print(line)  # noqa: T201


def _run(sweep: Sweep, kinds: Sequence[str] | Mapping[str, Any], characters: int) -> Iterator[str]:
    for kind in kinds:
        cell = sweep.run(RECORDS[kind])
        yield f"{sweep.name} {kind}: {describe(cell)}"
        yield from (f"    FAULT {fault}" for fault in cell.judgment.faults)
        yield from (f"    {show(sweep.tokenizer, sequence)[-characters:]!r}" for sequence in cell.sequences)


if __name__ == "__main__":
    main()
