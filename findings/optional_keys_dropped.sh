#!/usr/bin/env bash
# Library   datasets 5.2.0
# Expected  Dataset.from_generator and Dataset.map keep a key that only some records have, and fill the others with
#           None, as load_dataset does with the same records in a JSON Lines file; or they raise an error.
# Actual    Records are written by the thousand (writer_batch_size), and the columns of a thousand are the keys of its
#           first record. Keys that only later ones have are dropped with their values. Nothing is logged. (The
#           documentation of from_list says so of from_list.) With map, a key that only the first has is a KeyError, so
#           the order of the records decides.
# Affected  Chat records with keys such as "tools" or "system" where they are needed; functions given to map that add a
#           key under a condition.
# Remedy    Give every record every key, None where it has no value; with from_generator, pass features.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    datasets==5.2.0 pyarrow==26.0.1
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value, load_dataset

COUNT = 3000
logged = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: logged.append(record.getMessage())
logging.getLogger("datasets").addHandler(handler)


def added(number):
    """Return the optional key; one record in a thousand, the first, is without."""
    return {"tools": f"tool {number}"} if number % 1000 else {}


def generate():
    for number in range(COUNT):
        yield {"prompt": number, **added(number)}


def count(what, rows):
    tools = sum(row.get("tools") is not None for row in rows)
    print(f"{what}: {len(rows)} records, {tools} with tools")
    return len(rows), tools


print("datasets", version("datasets"))
Path("chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in generate()))
features = Features(prompt=Value("int64"), tools=Value("string"))
prompts = Dataset.from_dict({"prompt": list(range(COUNT))})
kept = [
    count("given", list(generate())),
    count("load_dataset", list(load_dataset("json", data_files="chats.jsonl", split="train"))),
    count("IterableDataset.from_generator", list(IterableDataset.from_generator(generate))),
    count("from_generator with features", list(Dataset.from_generator(generate, features=features))),
    count("map with None", list(prompts.map(lambda row: {"tools": added(row["prompt"]).get("tools")}))),
]
lost = [
    count("from_generator", list(Dataset.from_generator(generate))),
    count("map", list(prompts.map(lambda row: added(row["prompt"])))),
]
try:
    refused = str(prompts.map(lambda row: {} if row["prompt"] else {"tools": "tool"}).column_names)
except KeyError as error:
    refused = f"KeyError, {error}"
print(f"map, the first alone has tools: {refused}")
print(f"warnings: {len(logged)}")
if kept != [(COUNT, COUNT - 3)] * 5:
    sys.exit("The controls do not keep the key any more.")
if lost != [(COUNT, 0)] * 2 or refused != "KeyError, 'tools'" or logged:
    sys.exit("The behavior is not the one described any more.")
print("As described: 2997 of 3000 values are dropped for the sake of three records without them.")
PYTHON
