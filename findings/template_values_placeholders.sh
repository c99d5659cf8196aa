#!/usr/bin/env bash
# Library   transformers 5.23.0 (apply_chat_template), with rows from datasets 5.2.0
# Expected  A date in a message or in a template's argument is rendered as jinja2 renders it (2026-11-30), or is an
#           error where it cannot be written as JSON.
# Actual    Before rendering, values that are no JSON types are replaced by the name of their type, which is meant for
#           images and arrays: the text has "<date>", "<datetime>" or "<Decimal>" in place of the value. Nothing is
#           logged. Such values come by themselves: load_dataset("json") reads strings that look like a time as
#           datetime where all strings of the field do, and Parquet has dates and decimals.
# Affected  Tool calls and tool results with times, dates or amounts, and date_string=date.today(). A model is trained
#           to call book(start="<datetime>").
# Remedy    Turn dates and decimals into strings before rendering. Read JSON Lines with the module json.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6 datasets==5.2.0 pyarrow==26.0.1
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TQDM_DISABLE=1
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import json
import sys
from datetime import date
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

import jinja2
from datasets import load_dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% if today is defined %}Today is {{ today }}. {% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.name }} {{ call.arguments | tojson }}{% endfor %} {% endfor %}"
)
CALL = {"name": "book", "arguments": {"start": "2026-11-30T10:00:00+02:00"}}
RECORD = {"messages": [{"role": "assistant", "content": "", "tool_calls": [CALL]}]}
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=TEMPLATE)


def render(what, messages, **arguments):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    print(f"{what}: {text!r}")
    return text


def render_with_jinja(what, messages, **arguments):
    try:
        text = jinja2.Template(TEMPLATE).render(messages=messages, **arguments)
    except TypeError as error:
        text = f"TypeError, {error}"
    print(f"{what}, jinja2 alone: {text!r}")
    return text


print("transformers", version("transformers"), "and datasets", version("datasets"))
Path("calls.jsonl").write_text(json.dumps(RECORD) + "\n")
by_line = json.loads(Path("calls.jsonl").read_text())["messages"]
by_datasets = load_dataset("json", data_files="calls.jsonl", split="train")[0]["messages"]
print(f"load_dataset reads {by_datasets[0]['tool_calls'][0]['arguments']}")
price = [{"role": "tool", "content": Decimal("1.50")}]
hello = [{"role": "user", "content": "Hi."}]

right = [
    render("read by the module json", by_line),
    render("day as a string", hello, today="2026-11-30"),
    render_with_jinja("price", price),
    render_with_jinja("day", hello, today=date(2026, 11, 30)),
]
refused = render_with_jinja("read by load_dataset", by_datasets)
wrong = [
    render("read by load_dataset", by_datasets),
    render("price", price),
    render("day", hello, today=date(2026, 11, 30)),
]
if (
    right
    != [
        'assistant: book {"start": "2026-11-30T10:00:00+02:00"} ',
        "Today is 2026-11-30. user: Hi. ",
        "tool: 1.50 ",
        "Today is 2026-11-30. user: Hi. ",
    ]
    or "not JSON serializable" not in refused
):
    sys.exit("The controls are not rendered as expected any more.")
if wrong != [
    'assistant: book {"start": "<datetime>"} ',
    "tool: <Decimal> ",
    "Today is <date>. user: Hi. ",
]:
    sys.exit("The behavior is not the one described any more.")
print("As described: dates and decimals are rendered as the names of their types.")
PYTHON
