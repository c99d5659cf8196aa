import json
import random
import signal
import statistics
from pathlib import Path
from types import SimpleNamespace

import conversations
import pytest
import repeated_data
import run
import torch
from contestants import CONTESTANTS, DATA
from jinja2 import Environment
from measuring import Meter, count_tokens
from peers import mark_answers, write_old_model
from tokenizers import Tokenizer
from training_report import draw_plot, pair_ratios, per_step, rate, spread, write_report
from training_task import Task, to_flags
from transformers import AutoTokenizer


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversations, "collect_words", lambda: [f"word{i % 7} " for i in range(5000)])


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


def test_targets_of_this_program_are_counted_as_they_are() -> None:
    batch = {"input_ids": torch.ones(1, 6), "supervised": torch.tensor([1, 2]), "labels": torch.tensor([5, 5])}
    assert count_tokens(batch) == (6, 2)


def test_a_phase_ends_when_it_is_done_or_late() -> None:
    meter = object.__new__(Meter)
    meter.task = SimpleNamespace(seconds=10, steps=3)
    meter.warmup, meter.phase_began, meter.steps = 2, 0.0, []
    for now, stops in [(12, False), (15, False), (18, False), (21, True)]:  # the first step alone was the warm-up
        meter.steps.append({})
        assert meter.is_over(now) is stops
    assert meter.warmup == 1


def make_run(contestant: str, number: int, seconds: float, data: str = "sharegpt") -> dict:
    """A run of one step to warm up and two of 100 tokens each, 80 of them supervised."""
    counts = [
        {"real": 100 * i, "supervised": 80 * i, "positions": 150 * i, "passes": 2 * i, "ended": 0.0} for i in (1, 2, 3)
    ]
    return {
        "data": data, "checkpointing": False, "number": number, "contestant": contestant, "warmup": 1,
        "steps": [count | {"seconds": seconds if i else 99.0} for i, count in enumerate(counts)],
        "peak_mib": 1000.0 if contestant == "ours" else 2000.0, "gpu_peak_mib": None, "first_step_seconds": 7.0,
        "device": "cpu", "processes": 1, "load": 0.5, "versions": {"torch": "2.13.0"},
        "task": {
            "micro_batch": 2, "accumulation": 2, "options": {"packing": True}, "in_parts": False, "max_length": 1024,
        },
    }  # fmt: skip


def make_results(runs: list[dict]) -> dict:
    titles = {"ours": "this program", "fastchat": "FastChat", "trl": "TRL"}
    about = {
        "model": "M", "dropout": 0.05, "learning_rate": 2e-5, "before": "abc",
        "data": {name: DATA[name]._asdict() for name in ("sharegpt", "alpaca")},
        "contestants": {name: {"title": title, "settings": "s"} for name, title in titles.items()}, "rounds": 2,
        "seconds": 75, "processor": "P", "cores": 2, "threads": 2, "system": "S", "commit": "abc", "load": 0.1,
    }  # fmt: skip
    return {"about": about, "runs": runs, "left_out": {"sharegpt: TRL": "exit code 1: no such flag"}}


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
    assert cells[8:11] == ["1.50", "2,000 (2,000 - 2,000)", "0.50 (0.50 - 0.50)"]
    assert cells[-4:] == ["100", "80", "2", "2/2"]
    assert "- sharegpt: 4 conversations in an optimizer step, or packed sequences that hold as many;" in report
    assert "alpaca:" not in report  # nobody ran on it
    assert "sharegpt: 2 x 2 | s; packing True | torch 2.13.0" in report
    assert "Left out: sharegpt: TRL; exit code 1: no such flag." in report


def test_passes_of_a_part_of_a_step_are_reported_as_a_step() -> None:
    measured = make_run("fastchat", 0, 10)
    measured["task"] |= {"in_parts": True, "accumulation": 16}
    assert per_step(measured, "real") == 1600
    assert "| 2 passes |" in write_report(make_results([measured]))


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_plot(make_results([*RUNS, make_run("ours", 0, 3, "alpaca")]), tmp_path / "rates.svg")
    assert (tmp_path / "rates.svg").stat().st_size > 1000


def test_settings_become_flags() -> None:
    assert to_flags({"bf16": True, "targets": ("q", "v")}) == ["--bf16", "True", "--targets", "q", "v"]
    assert run.read_option("packing=true") == ("packing", True)
    with pytest.raises(ValueError, match="Expecting value"):
        run.read_option("packing=True")


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


class Tokens:
    """The part of a tokenizer that draws texts: a token is two characters."""

    def __call__(self, text: str, **_: object) -> SimpleNamespace:
        offsets = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
        return SimpleNamespace(offset_mapping=offsets, input_ids=offsets)


@pytest.fixture
def writer(words: None) -> repeated_data.ExactWriter:
    return repeated_data.ExactWriter(Tokens(), seed=0)


def test_repeated_data_is_as_long_as_it_says(writer: repeated_data.ExactWriter) -> None:
    agents = repeated_data.draw_agent(writer, 40)
    [prompt] = {record["conversations"][0]["value"] for record in agents}
    assert writer.count(prompt) in (1499, 1500)
    assert [turn["from"] for turn in agents[0]["conversations"]] == ["system", *("human", "gpt") * 3]
    own = [sum(writer.count(turn["value"]) for turn in record["conversations"][1:]) for record in agents]
    assert statistics.mean(own) == pytest.approx(250 - 30, rel=0.05)  # the template has five tokens around a message
    answers = repeated_data.draw_answers(writer, 10)
    questions = [record["conversations"][0]["value"] for record in answers]
    assert [questions.index(question) for question in questions] == [0] * 4 + [4] * 4 + [8] * 2
    assert {150 <= writer.count(record["conversations"][1]["value"]) + 1 <= 201 for record in answers} == {True}


def test_thoughts_are_shown_after_the_last_question_only(writer: repeated_data.ExactWriter) -> None:
    [record] = repeated_data.draw_thinking(writer, 1)
    assert len(record["conversations"]) == 24
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in record["conversations"]]
    render = Environment().from_string(repeated_data.THINKING_TEMPLATE).render
    text = render(messages=messages)
    assert text.count("<think>") == 1
    assert text.endswith(f"<|im_start|>assistant\n{messages[-1]['content']}<|im_end|>\n")
    assert messages[1]["content"].split("</think>\n\n")[1] in text
    prompt = render(messages=messages[:3], add_generation_prompt=True)
    assert render(messages=messages[:4]).startswith(prompt)


def test_markers_of_answers_change_no_text(model_folder: Path, writer: repeated_data.ExactWriter) -> None:
    template = mark_answers(repeated_data.THINKING_TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}]
    marked = tokenizer.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    plain = tokenizer.apply_chat_template(messages, chat_template=repeated_data.THINKING_TEMPLATE)
    assert list(marked["input_ids"]) == list(plain["input_ids"])
    answer = [one for one, is_answer in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if is_answer]
    assert tokenizer.decode(answer) == "<think>\nb\n</think>\n\nc<|im_end|>"


@pytest.mark.parametrize(
    ("units", "at_once", "wanted", "passes"),
    [(16, 1, None, 16), (16, None, None, 1), (6, 4, None, 2), (3, 2, None, 3), (16, None, 3.0, 4), (4, None, 9.0, 4)],
)
def test_passes_of_a_step_are_equal(units: int, at_once: int | None, wanted: float | None, passes: int) -> None:
    assert run.choose_passes(units, at_once, wanted) == passes


def parse(tmp_path: Path, *words: str) -> object:
    return run.build_parser().parse_args(["--folder", str(tmp_path), "--model", str(tmp_path), *words])


def make_tasks(arguments: object, folder: Path, earlier: list[dict]) -> dict[tuple[str, str], Task]:
    return {
        (one.data, one.contestant): run.make_task(one, arguments, folder, earlier) for one in run.list_rounds(arguments)
    }


def test_everybody_takes_as_many_conversations_a_step(tmp_path: Path) -> None:
    arguments = parse(tmp_path)
    earlier = [make_run("ours", 0, 1, data) for data in ("sharegpt", "alpaca", "sharegpt_two")]
    tasks = make_tasks(arguments, tmp_path, earlier)
    assert set(tasks) == {(name, one) for name, data in DATA.items() for one in (*data.contestants, *data.once)}
    for (name, contestant), task in tasks.items():
        data = DATA[name]
        sequences = data.sequences if CONTESTANTS[contestant].environment == "before" else 1
        units = data.packed_rows if CONTESTANTS[contestant].packed else data.conversations * sequences
        assert task.micro_batch * task.accumulation * data.processes == units, (name, contestant)
        assert task.in_parts is (data.is_even and contestant != "ours" and task.accumulation > 1), (name, contestant)
    assert tasks["thinking", "before_four"].micro_batch == 4
    assert (tasks["agent", "trl"].warmup, tasks["agent", "trl"].steps) == (2, 14)  # passes
    assert tasks["alpaca", "before_cut"].accumulation == 2  # this program took two passes
    with pytest.raises(run.Failure, match="has not run on this data"):
        make_tasks(arguments, tmp_path, [])


def test_runs_continue_unless_the_code_has_changed(tmp_path: Path) -> None:
    about = run.describe_run(parse(tmp_path))
    results = run.open_results(tmp_path, about)
    results["runs"].append(make_run("ours", 0, 1))
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert run.open_results(tmp_path, about | {"load": 9.0, "rounds": 5})["runs"] == results["runs"]
    assert run.open_results(tmp_path, about | {"code": "other"})["runs"] == []
    [moved] = tmp_path.glob("results-*.json")
    assert json.loads(moved.read_text())["runs"] == results["runs"]


def test_processes_are_added_up(tmp_path: Path) -> None:
    task = run.make_task(run.Round("sharegpt_ranks", False, 0, "ours"), parse(tmp_path), tmp_path, [])
    assert task.micro_batch == 8
    for rank in (0, 1):
        task.result_of(rank).write_text(json.dumps(make_run("ours", 0, 10)))
    both = run.read_measurements(task, 2)
    assert rate(both, "real") == 20
    assert (both["peak_mib"], both["gpu_peak_mib"]) == (2000, None)


def test_busy_processes_end_with_the_run() -> None:
    with run.busy_processes(2) as processes:
        assert [process.poll() for process in processes] == [None, None]
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
