"""report.html: its content, when it is written, and that its failures never harm a run."""

import html
import json
import math
import re
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from datasets import Dataset
from forked import Run
from forked import command as given
from hypothesis import example, settings
from hypothesis import given as drawn
from hypothesis import strategies as st
from quick_runs import command, train
from transformers import TrainerState

from fastchat_qlora.cli import main
from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.analysis.statistics import compute_statistics
from fastchat_qlora.errors import RunError
from fastchat_qlora.training.callbacks.throughput import TokenTotal
from fastchat_qlora.training.report import html_report
from fastchat_qlora.training.report.charts import (
    MAX_POINTS,
    SVG,
    Chart,
    Curve,
    draw,
    get_curve,
    smooth,
    thin_out,
)
from fastchat_qlora.training.report.report_data import get_charts, get_flags, get_tiles
from fastchat_qlora.training.trainer import LoraTrainer


def read(output: Path) -> str:
    return (output / "report.html").read_text(encoding="utf-8")


def points(page: str, chart: str) -> list[str]:
    """Return the titles of a chart's points; those of the first chart occur twice, wide and narrow."""
    figure = page.partition(f'id="{chart}"')[2].partition("</figure>")[0]
    narrow = figure.partition('<div class="narrow">')[2]
    return [html.unescape(text) for text in re.findall(r"<use[^>]*><title>(.*?)</title>", narrow)]


def facts(page: str) -> dict[str, str]:
    rows = re.findall(r'<tr><th[^>]*scope="row">(.*?)</th><td[^>]*>(.*?)</td>', page)
    return {html.unescape(name): html.unescape(value) for name, value in rows}


def test_page_shows_the_whole_run(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"max_steps": 6, "eval_split": 4, "eval_strategy": "steps", "eval_steps": 3, "lora_r": 4}
    output = train(
        [*command(model_folder, data_file, tmp_path / "out", **flags), "--sample_prompts", "Who are you?", "Hi </p>"]
    )
    page = read(output)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [f"step {e['step']}: training {e['loss']:.4g}" for e in history if "loss" in e]
    evaluated = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    assert points(page, "loss") == losses + [f"step {at}: evaluation {loss:.4g}" for at, loss in evaluated.items()]
    for chart, count in (("throughput", 12), ("gradient", 6), ("rate", 6), ("memory", 6)):
        assert len(points(page, chart)) == count
    bars = [int(count) for count in re.findall(r"tokens: (\d+) sequences</title>", page)]
    assert sum(bars) == 8
    told = facts(page)
    assert (
        told.items()
        >= {
            "read": "12",
            "rejected": "0",
            "strategy": "one process",
            "--lora_r": "4",
            "--max_steps": "6",
            "--sample_prompts": "'Who are you?' 'Hi </p>'",
        }.items()
    )
    assert {"transformers", "torch", "Python", "processor", "main memory", "supervised tokens"} <= told.keys()
    assert "<h3>Hi &lt;/p&gt;</h3>" in page and page.count("<h4>after</h4>") == 2
    assert page.count("<mark>") > 3 and 'class="status done">done<' in page
    assert not re.search(r"""(src|href)="(?!#)|url\((?!#)|@import|<script""", page)


def test_resumed_run_shows_all_steps(model_folder: Path, data_file: Path, tmp_path: Path) -> None:
    flags = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
    output = tmp_path / "out"
    train(command(model_folder, data_file, output, **flags, max_steps=2))
    train(command(model_folder, data_file, output, **flags, max_steps=4))
    assert [text.partition(":")[0] for text in points(read(output), "loss")] == [f"step {n}" for n in (1, 2, 3, 4)]
    assert "Resumed from the checkpoint of step 2: the dashed line" in read(output)
    assert read(output).count('class="mark"') == 6, "of the loss twice, wide and narrow, and of four others"
    before = (output / "report.html").read_bytes()
    train(command(model_folder, data_file, output, **flags, max_steps=4))  # nothing is left to train
    assert (output / "report.html").read_bytes() == before


def test_run_killed_at_its_end_is_done_when_started_again(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page of the last checkpoint showed a running run; a loss that was not computed is not shown."""
    output = tmp_path / "out"
    arguments = command(model_folder, data_file, output, save_strategy="steps", save_steps=2, max_steps=2)
    arguments += ["--sample_prompts", "Who are you?"]
    assert main(["train", *arguments]) == 0
    done = read(output)
    (output / "report.html").write_text(done.replace('class="status done">done', 'class="status running">running'))
    trained = json.loads((output / "train_results.json").read_text())
    for name in ("training_args.json", "train_results.json"):  # which come after the last checkpoint
        (output / name).unlink()
    capsys.readouterr()
    assert main(["train", *arguments]) == 0
    said = capsys.readouterr().err
    assert "All 2 steps had been done before; none was left to train." in said and "mean loss" not in said
    again = read(output)
    assert 'class="status done">done<' in again and "Resumed from" not in again
    assert points(again, "loss") == points(done, "loss")
    results = json.loads((output / "train_results.json").read_text())
    assert not {"train_loss", "train_runtime"} & results.keys(), "nothing was trained"
    assert [results[name] for name in ("tokens", "supervised_tokens")] == [
        trained["tokens"],
        trained["supervised_tokens"],
    ]
    answers = "<h4>after</h4>.*?</p>"
    assert re.findall(answers, again, re.DOTALL) == re.findall(answers, done, re.DOTALL)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Record when pages are written, and the state that they show."""
    seen: list[tuple[int, str]] = []
    write = html_report.RunReport._write

    def watched(self: html_report.RunReport, status: str, text: str) -> None:
        write(self, status, text)
        seen.append((self._summary.trainer.state.global_step, status))

    monkeypatch.setattr(html_report.RunReport, "_write", watched)
    return seen


def test_pages_come_with_checkpoints_and_at_the_end(
    pages: list[tuple[int, str]], model_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    flags = {"save_strategy": "steps", "save_steps": 3, "max_steps": 7}
    train(command(model_folder, data_file, tmp_path / "out", **flags))
    assert pages == [(3, "running"), (6, "running"), (7, "running"), (7, "done")]


def test_pages_come_at_intervals(
    pages: list[tuple[int, str]],
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The constants limit how often, and the share of the time."""
    monkeypatch.setattr(html_report, "MIN_SECONDS_BETWEEN_PAGES", 0.0)
    monkeypatch.setattr(html_report, "MAX_SHARE_OF_TIME", 1e9)
    train(command(model_folder, data_file, tmp_path / "a", max_steps=4, logging_steps=2))
    assert pages == [(2, "running"), (4, "running"), (4, "done")]
    pages.clear()
    monkeypatch.setattr(html_report, "MAX_SHARE_OF_TIME", 1e-9)
    train(command(model_folder, data_file, tmp_path / "b", max_steps=4, logging_steps=1))
    assert pages == [(1, "running"), (4, "done")]


def test_failed_run_shows_the_reason(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "very-secret-value")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RunError("the <b>disk</b> of very-secret-value is gone")

    monkeypatch.setattr(LoraTrainer, "save_model", fail)
    with pytest.raises(RunError):
        train(command(model_folder, data_file, tmp_path / "out", max_steps=2))
    page = read(tmp_path / "out")
    assert 'class="status failed">ended at step 2 of 2: the &lt;b&gt;disk&lt;/b&gt; of &lt;hidden&gt; is gone<' in page


def test_stopped_run_shows_the_signal(model_folder: Path, data: Path, tmp_path: Path) -> None:
    flags = "--max_steps 60 --logging_steps 1 --learning_rate 1e-2 --save_strategy no"
    run = Run(given(model_folder, data, tmp_path / "out", flags), tmp_path / "log.txt", PREPARE="planted:slow")
    run.wait_for(": loss ")
    run.send(15)
    assert run.wait().codes == [143]
    page = read(tmp_path / "out")
    assert re.search(r'class="status stopped">stopped at step \d+ of 60: SIGTERM: stopped; start again', page)
    assert points(page, "loss")


def test_page_that_fails_does_not_stop_the_run(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is logged once; the earlier page stays, and no other file."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "report.html").write_text("earlier")

    def fail(*args: Any) -> str:
        raise ValueError("no\nink")

    monkeypatch.setattr(html_report, "draw", fail)
    flags = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    assert main(["train", *command(model_folder, data_file, output, **flags)]) == 0
    said = capsys.readouterr().err
    assert said.count("report.html: cannot be written (no ink); the run continues without.") == 1
    assert read(output) == "earlier" and not list(output.glob(".*.part"))


def test_public_page_shows_no_sequences(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.whoami", lambda token: {"name": "me"})
    monkeypatch.setattr(LoraTrainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(LoraTrainer, "push_to_hub", lambda self, **kwargs: None)
    flags = {"push_to_hub": True, "hub_token": "hf_abcdefghijklmnop", "max_steps": 1, "hub_model_id": "me/it"}
    page = read(train(command(model_folder, data_file, tmp_path / "out", **flags)))
    assert "<mark>" not in page and "since --push_to_hub makes this page public" in page
    assert "hf_abcdefghijklmnop" not in page and facts(page)["--hub_token"] == "<hidden>"


def test_flags_are_those_that_were_given(model_folder: Path, data_file: Path) -> None:
    """With use_cpu and its effects, on a machine without an accelerator."""
    flags = {"q_lora": True, "lora_dropout": 0, "bnb_4bit_use_double_quant": False, "lr_scheduler_type": "cosine"}
    args = parse_args(command(model_folder, data_file, Path("/tmp/o"), **flags))
    found = get_flags(args)
    expected = {f"--{name}": str(value) for name, value in flags.items()} | {
        "--model_name_or_path": str(model_folder),
        "--data_path": str(data_file),
        "--output_dir": "/tmp/o",
        "--max_steps": "10",
        "--per_device_train_batch_size": "2",
        "--learning_rate": "0.01",
        "--logging_steps": "1",
        "--save_strategy": "no",
        "--disable_tqdm": "True",
    }
    by_the_machine = {"--use_cpu", "--dataloader_pin_memory"}
    assert {name: value for name, value in found.items() if name not in by_the_machine} == expected


ROW = {"length": 3, "supervised": 1, "weight": 0.5, "full_length": 3, "turns": 1, "thoughts": 0, "record": 0}
HISTORY = [
    {"step": 1, "loss": 4.0, "memory_gib": 1.5},
    {"step": 1, "eval_loss": 3.5},
    {"step": 2, "loss": 2.0, "memory_gib": 1.25},
    {"step": 2, "eval_loss": 3.0},
    {"step": 3, "loss": math.nan},
    {"step": 3, "eval_loss": 3.25},
]


def test_tiles() -> None:
    state = TrainerState(log_history=HISTORY, global_step=3, max_steps=4, epoch=0.754)
    tiles = get_tiles(state, TokenTotal(4_000, 1_000, 2.5), 3661.4)
    assert tiles == [
        ("steps", "3 of 4", "0.75 times through the data"),
        ("loss", "2", "4 at first"),
        ("evaluation loss", "3.25", "3.5 at first, 3 at best"),
        ("tokens/s", "1,600", "400 of them supervised"),
        ("memory", "1.50 GiB", "highest logged value of a process"),
        ("time", "1:01:01", "since the process began"),
    ]
    assert [name for name, *_ in get_tiles(TrainerState(max_steps=4), TokenTotal(), 1.0)] == ["steps", "time"]


@drawn(st.lists(st.floats(0.1, 9), min_size=1, max_size=50), st.sampled_from([1, MAX_POINTS]))
def test_tiles_cover_the_whole_log(values: list[float], repeated: int) -> None:
    """The log may be long: only what is drawn is thinned by means."""
    values = [value for value in values for _ in range(repeated)] + [0.05, 20.0, 10.0]
    history = [{"step": n, "loss": value, "memory_gib": value} for n, value in enumerate(values, 1)]
    state = TrainerState(log_history=history, global_step=1, max_steps=2)
    tiles = {name: texts for name, *texts in get_tiles(state, TokenTotal(), 1.0)}
    assert tiles["loss"] == ["10", f"{values[0]:.3g} at first, 0.05 at best"]
    assert tiles["memory"][0] == "20.00 GiB"


def test_long_curve_is_thinned_by_means() -> None:
    """Every point counts: the mean over the whole curve stays."""
    count = 3 * MAX_POINTS
    history = [{"step": n, "loss": float(n)} for n in range(1, count + 1)]
    [curve] = get_charts(history, compute_statistics(Dataset.from_list([ROW])))[0].curves
    assert curve == thin_out(get_curve(history, "loss", "training", "c1", is_noisy=True))
    assert curve.name == "training, mean of 3"
    assert curve.steps == list(range(3, count + 1, 3))
    assert curve.values == [step - 1 for step in curve.steps]


def test_page_results_and_card_agree_on_the_speed(
    model_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speed is that of training: a second of saving does not count."""
    real = LoraTrainer._save_checkpoint

    def save(self: Any, *args: Any) -> None:
        with self.throughput.paused():
            time.sleep(1)
        real(self, *args)

    monkeypatch.setattr(LoraTrainer, "_save_checkpoint", save)
    flags = {"save_strategy": "steps", "save_steps": 3, "max_steps": 4, "logging_steps": 3}
    output = train(command(model_folder, data_file, tmp_path / "out", **flags))
    results = json.loads((output / "train_results.json").read_text())
    rate, supervised = results["tokens_per_second"], results["supervised_tokens_per_second"]
    [told] = re.findall(r"<b>([\d,]+)</b><span>([\d,]+) of them supervised</span>", read(output))
    assert [int(number.replace(",", "")) for number in told] == pytest.approx([rate, supervised], abs=0.6)
    card = (output / "README.md").read_text(encoding="utf-8")
    [on_card] = re.findall(r"\| tokens/s of training alone \| ([\d,.]+) \|", card)
    assert float(on_card.replace(",", "")) == pytest.approx(rate, rel=1e-3, abs=0.6)
    assert results["tokens"] / rate < results["train_runtime"] - 1
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = [entry["tokens_per_second"] for entry in history if "tokens_per_second" in entry]
    assert min(rates) <= rate <= max(rates)


@drawn(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_smoothing_stays_within_the_values(values: list[float]) -> None:
    smoothed = smooth(values)
    assert len(smoothed) == len(values) and smoothed[0] == pytest.approx(values[0])
    room = 1e-6 * max(map(abs, values)) + 1e-9
    assert all(min(values) - room <= value <= max(values) + room for value in smoothed)


@pytest.mark.parametrize("count", [1, 2, 23, 24, 400])
def test_chart_has_every_point(count: int) -> None:
    """A smoothed line is drawn if there are enough points; the SVG is well-formed and has the page's colors only."""
    curve = Curve("a<b", "c1", [float(n) for n in range(count)], [math.sin(n) for n in range(count)], is_noisy=True)
    drawn = draw(Chart("loss", 'Loss "<&"', [curve]), 370, 238)
    svg = ElementTree.fromstring(drawn)
    titles = [title.text for title in svg.iter(f"{SVG}title")]
    assert titles == [f"step {n}: a<b {math.sin(n):.4g}" for n in range(count)]
    lines = [
        path for path in svg.iter(f"{SVG}path") if re.search("fill: none; stroke: var.--c1", path.get("style", ""))
    ]
    assert len(lines) == (2 if count >= 24 else 1)
    assert not re.search("#[0-9a-fA-F]{6}|rgb", drawn), "a color that is not the page's"
    assert svg.find(f"{SVG}style") is None and svg.get("viewBox") == "0 0 370 238"


def test_ids_of_charts_do_not_meet_on_a_page() -> None:
    curve = Curve("a", "c1", [1.0, 2.0], [3.0, 4.0])
    pictures = [draw(Chart(name, "", [curve]), *size) for name in ("loss", "rate") for size in ((370, 238), (770, 536))]
    ids = [name for picture in pictures for name in re.findall(r'\bid="(.*?)"', picture)]
    assert len({*ids}) == len(ids) > 0


@drawn(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30), st.booleans())
@settings(max_examples=25, deadline=None)
@example([1e308, -1e308, math.nan, math.inf, 1.0], False)
@example([1e100, -1e100, 5e-324] * 10, False)
@example([math.nan], True)
def test_any_values_are_drawn(values: list[float], is_bars: bool) -> None:
    values = [abs(value) for value in values] if is_bars else values
    curve = Curve("a", "c1", [float(n) for n in range(len(values))], values, is_noisy=True)
    svg = draw(Chart("loss", "Loss", [curve], is_bars=is_bars, marks=[2.0]), 370, 238)
    assert not re.search(r"\b(nan|inf)\b", re.sub(r"<title>.*?</title>", "", svg))
    shown = sum(abs(value) <= 1e100 for value in values)
    assert len(list(ElementTree.fromstring(svg).iter(f"{SVG}title"))) == shown


@drawn(st.floats(1e-12, 1e12), st.lists(st.floats(0, 1), min_size=1, max_size=5), st.floats(1e-9, 1))
@settings(max_examples=30, deadline=None)
def test_ticks_can_be_told_apart(least: float, values: list[float], spread: float) -> None:
    """Also those of a nearly constant curve, such as a learning rate."""
    curve = Curve("a", "c1", [float(n) for n in range(len(values))], [least * (1 + spread * v) for v in values])
    svg = ElementTree.fromstring(draw(Chart("rate", "Rate", [curve]), 370, 238))
    groups = [group for group in svg.iter(f"{SVG}g") if group.get("class", "").startswith("ytick")]
    ticks = [text.text for group in groups for text in group.iter(f"{SVG}text")]
    assert len({*ticks}) == len(ticks) >= 3 and max(map(len, ticks)) <= 9


def test_chart_ignores_the_users_matplotlibrc() -> None:
    from matplotlib import rc_context

    chart = Chart("loss", "Loss", [Curve("a", "c1", [1.0, 2.0], [3.0, 4.0])])
    plain = draw(chart, 370, 238)
    liked = {"font.size": 30, "axes.grid": True, "text.usetex": True, "svg.fonttype": "path", "axes.xmargin": 0.4}
    with rc_context(liked | {"lines.marker": "x", "xtick.top": True, "axes.linewidth": 9}):
        assert draw(chart, 370, 238) == plain


def test_bars_have_their_range_as_title() -> None:
    curve = Curve("sequences", "bar", [10.0, 30.0, 50.0], [3.0, 0.0, 1200.0])
    svg = ElementTree.fromstring(draw(Chart("lengths", "", [curve], ",.0f", is_bars=True, axis="tokens"), 370, 238))
    assert [title.text for title in svg.iter(f"{SVG}title")] == [
        "10 to 29 tokens: 3 sequences",
        "30 to 49 tokens: 0 sequences",
        "50 to 69 tokens: 1,200 sequences",
    ]
