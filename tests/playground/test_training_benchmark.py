import json
import random
import statistics
from pathlib import Path
from types import SimpleNamespace

import conversations
import pytest
import torch
from measuring import Meter, count_tokens
from peers import write_old_model
from run import read_option
from tokenizers import Tokenizer
from training_report import draw_plot, pair_ratios, rate, spread, write_report
from training_task import to_flags


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "collect_words", lambda: ["word "] * 5000)


@pytest.mark.parametrize("name", ["sharegpt", "alpaca"])
def test_conversations_are_as_long_as_published(words: None, name: str) -> None:
    shape = conversations.SHAPES[name]
    records = conversations.draw_conversations(3000, shape)
    exchanges = statistics.mean(len(record["conversations"]) / 2 for record in records)
    assert exchanges == pytest.approx(shape.mean_exchanges, rel=0.05)
    tokens = conversations.TOKENS_PER_WORD * statistics.mean(map(conversations.count_words, records))
    assert tokens == pytest.approx(shape.mean_exchanges * (shape.user_tokens + shape.assistant_tokens), rel=0.06)
    assert records[:10] == conversations.draw_conversations(10, shape)


def test_a_question_may_leave_no_room_for_an_answer() -> None:
    record = {"conversations": [{"value": "word " * 400}, {"value": "word"}]}
    assert conversations.has_something_to_learn(record, 2048)
    assert not conversations.has_something_to_learn(record, 1024)


def test_typical_groups_are_as_long_as_all() -> None:
    draw = random.Random(0)
    records = [{"length": draw.lognormvariate(5, 1)} for _ in range(1000)]
    picked = conversations.pick_typical(records, 5, 16, lambda record: record["length"], seed=0)
    assert len({id(record) for record in picked}) == 80
    middle = statistics.median(record["length"] for record in records)
    for start in range(0, 80, 16):
        assert statistics.median(record["length"] for record in picked[start : start + 16]) == pytest.approx(
            middle, 0.2
        )
    with pytest.raises(ValueError, match="cannot be picked"):
        conversations.pick_typical(records, 63, 16, lambda record: record["length"], seed=0)


@pytest.mark.parametrize(
    ("mask", "real"),
    [
        (None, 8),
        (torch.tensor([[1, 1, 1, 0], [1, 1, 2, 2]]), 7),
        (torch.tril(torch.ones(2, 1, 4, 4, dtype=torch.bool)), 8),
        (torch.triu(torch.full((2, 1, 4, 4), -1e9), diagonal=1) + torch.tensor([0, 0, 0, -1e9]), 6),
    ],
    ids=["none", "by document", "boolean", "additive"],
)
def test_real_and_supervised_tokens_of_a_batch(mask: torch.Tensor | None, real: int) -> None:
    labels = torch.tensor([[5, -100, 5, -100], [-100, 5, 5, 5]])  # the first position of a sequence is no target
    inputs = {"input_ids": torch.ones(2, 4), "labels": labels, "attention_mask": mask}
    assert count_tokens(inputs) == (real, 4)


def test_a_phase_ends_when_it_is_done_or_late() -> None:
    meter = object.__new__(Meter)
    meter.task = SimpleNamespace(seconds=10, steps=3)
    meter.warmup, meter.phase_began, meter.steps = 2, 0.0, []
    control = SimpleNamespace(should_training_stop=False)
    for now, stops in [(12, False), (15, False), (18, False), (21, True)]:  # the first step alone was the warm-up
        meter.steps.append({})
        meter.watch_the_clock(now, control)
        assert control.should_training_stop is stops
    assert meter.warmup == 1


def make_run(contestant: str, number: int, seconds: float, data: str = "sharegpt") -> dict:
    """A run of one step to warm up and two of 100 tokens each, 80 of them supervised."""
    counts = [{"real": 100 * i, "supervised": 80 * i, "positions": 150 * i, "ended": 0.0} for i in (1, 2, 3)]
    return {
        "data": data, "checkpointing": False, "number": number, "contestant": contestant, "warmup": 1,
        "steps": [count | {"seconds": seconds if i else 99.0} for i, count in enumerate(counts)],
        "peak_mib": 1000.0 if contestant == "ours" else 2000.0, "gpu_peak_mib": None, "first_step_seconds": 7.0,
        "device": "cpu",
        "versions": {"torch": "2.13.0"}, "task": {"micro_batch": 2, "accumulation": 2, "options": {"packing": True}},
    }  # fmt: skip


def make_results(runs: list[dict]) -> dict:
    titles = {"ours": "this program", "fastchat": "FastChat", "trl": "TRL"}
    about = {
        "model": "M", "dropout": 0.05, "learning_rate": 2e-5, "max_length": 1024, "conversations": {"sharegpt": 4},
        "contestants": {name: {"title": title, "settings": "s"} for name, title in titles.items()}, "rounds": 2,
        "seconds": 75, "processor": "P", "cores": 2, "threads": 2, "system": "S", "commit": "abc", "load": 0.1,
    }  # fmt: skip
    return {"about": about, "runs": runs, "left_out": {"trl": "exit code 1: no such flag"}}


RUNS = [
    make_run("ours", 0, 10), make_run("fastchat", 0, 20), make_run("ours", 1, 20), make_run("fastchat", 1, 60),
    make_run("ours", 2, 10),
]  # fmt: skip


def test_ratios_are_taken_within_a_round() -> None:
    ours, theirs = RUNS[::2], RUNS[1::2]
    assert rate(ours[0], "real") == 10  # the warm-up does not count
    # The peer did not run in the third round.
    assert pair_ratios(ours, theirs, lambda run: rate(run, "supervised")) == [2, 3]
    assert spread([2, 3], ".2f") == "2.50 (2.00 - 3.00)"
    assert spread([2], ".2f") == "2.00"
    assert spread([], ".2f") == "-"


def test_report_shows_every_contestant_and_who_failed() -> None:
    report = write_report(make_results(RUNS))
    lines = [line for line in report.splitlines() if line.startswith("| sharegpt")]
    cells = [cell.strip() for cell in lines[1].strip("|").split("|")]
    assert cells[:7] == [
        "sharegpt", "off", "FastChat", "3 (2 - 5)", "3 (1 - 4)", "2.50 (2.00 - 3.00)", "2.50 (2.00 - 3.00)",
    ]  # fmt: skip
    assert cells[9:12] == ["1.50", "2,000 (2,000 - 2,000)", "0.50 (0.50 - 0.50)"]
    assert cells[-3:] == ["100", "80", "2/2"]
    assert "sharegpt: 2 x 2 | s; packing True | torch 2.13.0" in report
    assert "Left out: TRL; exit code 1: no such flag." in report


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_plot(make_results([*RUNS, make_run("ours", 0, 3, "alpaca")]), tmp_path / "rates.svg")
    assert (tmp_path / "rates.svg").stat().st_size > 1000


def test_settings_become_flags() -> None:
    assert to_flags({"bf16": True, "targets": ("q", "v")}) == ["--bf16", "True", "--targets", "q", "v"]
    assert read_option("packing=true") == ("packing", True)
    with pytest.raises(ValueError, match="Expecting value"):
        read_option("packing=True")


def test_old_model_counts_as_llama(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in model_folder.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 599, "content": "<spare>"})
    [last] = [text for text, index in tokenizer["model"]["vocab"].items() if index == 599]
    tokenizer["model"]["vocab"]["<spare>"] = tokenizer["model"]["vocab"].pop(last)
    tokenizer["model"]["merges"] = [pair for pair in tokenizer["model"]["merges"] if "".join(pair) != last]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"bos_token": "<|im_start|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))

    write_old_model(source, tmp_path / "old")

    old = Tokenizer.from_file(str(tmp_path / "old" / "tokenizer.json"))
    whole, first, second = (old.encode(text) for text in ("one</s>two</s>", "one", "two"))
    assert len(whole.ids) == 1 + len(first.ids) + len(second.ids)  # as FastChat counts: 1, then each turn's own
    assert whole.tokens[0] == "<|im_start|>"
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    assert config["rope_theta"] == 10000.0 and config["torch_dtype"] == "float32"


def test_conversations_are_cut_so_that_everybody_sees_the_same() -> None:
    turns = [{"from": who, "value": "one two three four"} for who in ("human", "gpt") * 3]
    record = {"id": "a", "conversations": turns}

    def words(of: list[dict[str, str]]) -> int:
        return sum(len(turn["value"].split()) for turn in of)

    for limit, kept in ((24, 6), (23, 4), (8, 2)):
        assert conversations.cut_to_fit(record, limit, words)["conversations"] == turns[:kept]
    cut = conversations.cut_to_fit(record, 6, words)["conversations"]
    assert cut == [turns[0], {"from": "gpt", "value": "one two"}]
    assert record["conversations"] == turns
