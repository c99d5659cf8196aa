#!/usr/bin/env bash
# Library   datasets 5.2.0
# Expected  A string in a JSON Lines file is read as that string, whatever the other lines hold.
# Actual    Once one message of the file has a list as its content (text and image parts, say), the column "content"
#           becomes datasets' type Json. Strings that happen to be JSON are decoded then: "007" becomes 7, "null"
#           becomes None, "[1, 2]" becomes a list. A chat template writes "7" and "None". Nothing is logged.
# Affected  Chat data with short answers (numbers, true and false, JSON), once a single multimodal message joins it.
# Remedy    Give all contents one type, all strings or all lists of parts; or read the lines with the module json.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check datasets==5.2.0
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import json
import sys
from importlib.metadata import version
from pathlib import Path

from datasets import load_dataset

ANSWERS = ["007", "42", "0.30", "true", "null", "[1, 2]", '{"b": 1}', '"quoted"', "plain words"]
DECODED = [7, 42, 0.3, True, None, [1, 2], {"b": 1}, "quoted", "plain words"]
PARTS = [{"type": "text", "text": "What is in the picture?"}]


def read(name, contents):
    lines = [json.dumps({"messages": [{"role": "assistant", "content": content}]}) for content in contents]
    Path(name).write_text("\n".join(lines) + "\n")
    rows = load_dataset("json", data_files=name, split="train")
    return rows.features["messages"].feature["content"], [row["messages"][0]["content"] for row in rows]


def as_parts(text):
    return [{"type": "text", "text": text}]


print("datasets", version("datasets"))
kind, plain = read("plain.jsonl", ANSWERS)
print(f"strings alone, {kind}: {plain}")
mixed_kind, mixed = read("mixed.jsonl", [*ANSWERS, PARTS])
print(f"with one list, {mixed_kind}: {mixed[:-1]}")
_, parts = read("parts.jsonl", [*map(as_parts, ANSWERS), PARTS])
print(f"lists of parts alone: {[content[0]['text'] for content in parts[:-1]]}")
if plain != ANSWERS or parts[:-1] != [*map(as_parts, ANSWERS)]:
    sys.exit("Contents of one type are not read unchanged any more.")
if [json.dumps(value) for value in mixed] != [json.dumps(value) for value in [*DECODED, PARTS]]:
    sys.exit("The behavior is not the one described any more.")
print("As described: one list in the file changed eight of nine strings elsewhere in it.")
PYTHON
