#!/usr/bin/env bash
# Library   datasets 5.2.0
# Expected  load_dataset(folder) reads each file of the folder once.
# Actual    A split's files are collected pattern by pattern: a folder at any depth is named "train" or "training", or
#           begins or ends with it beside a digit, space, "-", "_" or "."; the other splits alike, with "validation",
#           "valid", "dev" and "val", or "test", "testing", "eval" and "evaluation". A file whose folders match two
#           patterns of its split is read twice: train/en_train/a.jsonl and test/eval/a.jsonl are, train/english/a.jsonl
#           is not. Nothing is logged. (train/train.jsonl, read twice in version 2.14, is read once.)
# Affected  Data in folders below train/, test/ or validation/ with such names: their part of a mixture counts double.
# Remedy    Name the files (data_files), or give the inner folders other names. Compare the number of rows with the
#           number of lines.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    datasets==5.2.0 fsspec==2026.9.0
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import json
import logging
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset

logged = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("datasets").addHandler(handler)


def read(folder, *names):
    """Write one line to each file and return the rows of each split."""
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}) + "\n")
    rows = {split: rows["text"][:] for split, rows in load_dataset(folder).items()}
    print(f"files of one line: {len(names)}, rows: {rows}")
    return rows


print("datasets", version("datasets"), "and fsspec", version("fsspec"))
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    once = [
        read("plain", "train/english/a.jsonl", "train/german/a.jsonl"),
        read("same", "train/train.jsonl"),
        read("alone", "train-1/a.jsonl"),
    ]
    twice = [
        read("numbered", "train/train-1/a.jsonl"),
        read("synonym", "train/a.jsonl", "test/eval/a.jsonl"),
        read("mixture", "train/en_train/a.jsonl", "train/german/a.jsonl"),
    ]
print(f"warnings: {len(logged) + len([entry for entry in warned if 'datasets' in entry.filename])}")
if once != [
    {"train": ["train/english/a.jsonl", "train/german/a.jsonl"]},
    {"train": ["train/train.jsonl"]},
    {"train": ["train-1/a.jsonl"]},
]:
    sys.exit("Files that one pattern matches are not read once any more.")
if logged or [{split: sorted(rows[split]) for split in rows} for rows in twice] != [
    {"train": ["train/train-1/a.jsonl"] * 2},
    {"train": ["train/a.jsonl"], "test": ["test/eval/a.jsonl"] * 2},
    {"train": ["train/en_train/a.jsonl"] * 2 + ["train/german/a.jsonl"]},
]:
    sys.exit("The behavior is not the one described any more.")
print("As described: a file is read twice where its folders match two patterns of its split.")
PYTHON
