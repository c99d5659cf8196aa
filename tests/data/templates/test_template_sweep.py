"""Real chat templates with all kinds of records: a sequence is a server's prompt and what the model writes then.

docs/templates.md says what becomes of each pair; templates that TRL has twice, with markers, are in that page only.
"""

import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import trl
from filelock import FileLock
from template_oracle import Servers, judge
from template_records import RECORDS
from template_sources import download_templates, read_templates
from template_sweep import TEMPLATE_FOLDER, Sweep
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.data.templates.clock import CLOCK, choose_date, fix_date
from fastchat_qlora.data.templates.renderer import render_chat_template

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts"))
from template_table import ACCEPTED, PAGE, count, describe_share, read_rows  # noqa: E402

TEXT = PAGE.read_text(encoding="utf-8")
ROWS = read_rows(TEXT)
NAMES = [name for name in ROWS if not name.endswith("_training")]
LEAST_SHARE = 0.9


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """Return all templates; llama.cpp's are downloaded once."""
    TEMPLATE_FOLDER.parent.mkdir(exist_ok=True)
    try:
        with FileLock(f"{TEMPLATE_FOLDER}.lock"):
            download_templates(TEMPLATE_FOLDER)
    except OSError as error:
        print(f"the package index cannot be reached: {error}", file=sys.stderr)  # noqa: T201
    return read_templates(TEMPLATE_FOLDER)


@pytest.mark.parametrize("name", NAMES)
def test_sequences_are_prompts_and_completions_of_a_server(name: str, templates: dict[str, str]) -> None:
    if name.startswith("trl/") and f"TRL {trl.__version__} " not in TEXT:
        pytest.skip("docs/templates.md is of another version of TRL")
    if name not in templates:
        pytest.skip("the package index cannot be reached")
    sweep = Sweep(name, templates[name])
    cells = {kind: sweep.try_out(record) for kind, record in RECORDS.items()}
    assert {kind: cell.judgment.faults for kind, cell in cells.items() if cell.judgment.faults} == {}
    accepted = {kind: cell.judgment.mode > 0 for kind, cell in cells.items() if cell.is_accepted}
    known = {kind: code == "on" for kind, code in ROWS[name].items() if code in ACCEPTED}
    assert accepted == known, "run python scripts/template_table.py"


def test_templates_with_a_fixed_date_write_what_a_server_writes_that_day(templates: dict[str, str]) -> None:
    dated = [name for name, source in templates.items() if CLOCK in source]
    if not dated:
        pytest.skip("no template reads the clock")
    for name in dated:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=templates[name])
        today = choose_date(tokenizer, "auto", "")
        assert today == date.today().isoformat()
        for messages in ([{"role": "user", "content": "Hi"}], RECORDS["system"]["messages"][:2]):
            server = render_chat_template(tokenizer, messages, add_generation_prompt=True)
            assert render_chat_template(fix_date(tokenizer, today), messages, add_generation_prompt=True) == server


def test_nine_in_ten_of_what_templates_render_is_accepted() -> None:
    accepted, renderable = count(ROWS.values())
    assert accepted >= LEAST_SHARE * renderable
    assert describe_share(ROWS.values()) in TEXT


# The oracle itself: what it has to see.

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def sweep() -> Sweep:
    return Sweep("trl/chatml", CHATML)


def find_faults(sweep: Sweep, ids: list[int], start: int, end: int, kind: str = "plain") -> tuple[str, ...]:
    """Return what is wrong with a sequence in which these tokens are supervised."""
    labels = [token if start <= i < end else -100 for i, token in enumerate(ids)]
    sequences: list[dict[str, Any]] = [{"input_ids": ids, "labels": labels}]
    return judge(Servers(sweep.tokenizer, RECORDS[kind]), sweep.family, sequences).faults


def test_oracle_sees_edges_that_are_wrong(sweep: Sweep) -> None:
    tokenizer: Any = sweep.tokenizer
    prompt = tokenizer("<|im_start|>user\nPick a hue.<|im_end|>\n<|im_start|>assistant\n").input_ids
    answer, behind = tokenizer("Azure, then.<|im_end|>").input_ids, tokenizer("\n").input_ids
    ids = prompt + answer + behind
    start, end = len(prompt), len(prompt + answer)
    assert find_faults(sweep, ids, start, end) == ()
    assert "prompt" in find_faults(sweep, ids, start + 1, end)[0]
    assert "prompt" in find_faults(sweep, ids, start - 1, end)[0]
    assert "end" in find_faults(sweep, ids, start, end - 1)[0]
    assert "end" in find_faults(sweep, ids, start, end + 1)[0]
    assert "times" in find_faults(sweep, prompt + answer + answer[-1:], start, end + 1)[0]
    assert find_faults(sweep, ids, 0, 0) == ("message 1: supervised 0 times",)


def test_oracle_sees_contents_that_are_not_the_records(sweep: Sweep) -> None:
    tokenizer: Any = sweep.tokenizer
    prompt = tokenizer("<|im_start|>user\nPick a hue.<|im_end|>\n<|im_start|>assistant\n").input_ids
    for text in ("Azure, the.<|im_end|>", "So: Azure, then.<|im_end|>", "<think></think>Azure, then.<|im_end|>"):
        answer = tokenizer(text).input_ids
        assert find_faults(sweep, prompt + answer, len(prompt), len(prompt + answer))


def test_oracle_sees_other_tokens_of_the_same_prompt(sweep: Sweep) -> None:
    tokenizer: Any = sweep.tokenizer
    text = "<|im_start|>user\nPick a hue.<|im_end|>\n<|im_start|>assistant\n"
    ids = [token for piece in (text[:-4], text[-4:]) for token in tokenizer(piece).input_ids]
    answer = tokenizer("Azure, then.<|im_end|>").input_ids
    assert tokenizer.decode(ids) == text
    assert "prompt" in find_faults(sweep, ids + answer, len(ids), len(ids + answer))[0]
