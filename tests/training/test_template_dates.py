"""Templates that write the date have one for all sequences of a run, also after midnight."""

import json
import shutil
from datetime import date
from pathlib import Path

import pytest
from adapters import assert_same_adapter
from conftest import CHATML
from quick_runs import command, train
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastchat_qlora.cli import main
from fastchat_qlora.data.templates import clock

DATED = "{{ '<|im_start|>system\\n' + strftime_now('%d %b %Y, %S') + '<|im_end|>\\n' }}" + CHATML


def dated_model(model_folder: Path, folder: Path) -> Path:
    """Copy the model with a template that writes date and seconds."""
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder)
    return folder


def begin_on(day: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Day(date):
        @classmethod
        def today(cls) -> date:
            return date.fromisoformat(day)

    monkeypatch.setattr(clock, "date", Day)


def test_run_that_resumes_another_day_has_the_first_days_sequences(
    model_folder: Path,
    data_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    notices: pytest.LogCaptureFixture,
) -> None:
    model = dated_model(model_folder, tmp_path / "dated")
    flags = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    begin_on("2026-11-29", monkeypatch)
    whole = train(command(model, data_file, tmp_path / "whole", **flags))
    assert "which is 2026-11-29 in all prompts" in notices.text
    stopped = tmp_path / "stopped"
    shutil.copytree(whole / "checkpoint-2", stopped / "checkpoint-2")
    begin_on("2026-11-30", monkeypatch)
    resumed = train(command(model, data_file, stopped, **flags, cache_dir=tmp_path / "cache"))
    assert "Resuming from" in notices.text
    assert_same_adapter(resumed, whole)
    other = train(command(model, data_file, tmp_path / "other", **flags))
    with pytest.raises(AssertionError):
        assert_same_adapter(other, whole)


def test_date_of_a_flag_is_in_every_sequence(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = dated_model(model_folder, tmp_path / "dated")
    output = tmp_path / "sequences.jsonl"
    flags = f"--model_name_or_path {model} --data_path {data_file} --output {output} --num_examples 0"
    assert main(["inspect", *flags.split(), "--chat_template_date", "2020-02-03"]) == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    texts = [tokenizer.decode(json.loads(line)["input_ids"]) for line in output.read_text().splitlines()]
    assert len(texts) == 12
    assert all(text.startswith("<|im_start|>system\n03 Feb 2020, 00<|im_end|>\n") for text in texts)
    said = capsys.readouterr()
    assert "12 of 12 sequences begin with a server's prompt" in said.out + said.err


def test_date_without_a_clock_is_named(
    model_folder: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    required = f"--model_name_or_path {model_folder} --data_path {data_file} --output {tmp_path / 'rows.jsonl'}"
    assert main(["inspect", *required.split(), "--chat_template_date", "2020-02-03"]) == 0
    assert "--chat_template_date 2020-02-03: has no effect" in capsys.readouterr().err
    assert main(["inspect", *required.split(), "--chat_template_date", "3.2.2020"]) == 2
    assert "--chat_template_date 3.2.2020: is no date; write it as in 2026-11-30" in capsys.readouterr().err
