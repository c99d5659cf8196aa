"""Arguments of the chat template go with a run: into its files, its sample prompts, and `chat`; resuming needs them."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import CHATML
from quick_runs import command, train
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

from fastchat_qlora import cli
from fastchat_qlora.config.arguments import DataArguments
from fastchat_qlora.errors import UserError
from fastchat_qlora.training.callbacks.sample_generations import encode_prompts
from fastchat_qlora.training.report.report_data import get_flags

BRIEF = {"mode": "Be brief."}
SYSTEM = "{% if mode is defined %}<|im_start|>system\n{{ mode }}<|im_end|>\n{% endif %}"


@pytest.fixture(scope="module")
def run(model_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The command line of a finished run whose template writes its argument as a system message, and its folder."""
    model, output = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("run") / "out"
    shutil.copytree(model_folder, model, dirs_exist_ok=True)
    template = model / "chat_template.jinja"
    template.write_text(SYSTEM + template.read_text(encoding="utf-8"), encoding="utf-8")
    arguments = command(model, data, output, max_steps=2, save_strategy="steps", save_steps=1)
    arguments += ["--chat_template_kwargs", json.dumps(BRIEF)]
    return arguments, train(arguments)


def test_files_of_a_run_have_the_arguments(run: tuple[list[str], Path]) -> None:
    _, output = run
    for folder in (output, output / "checkpoint-2"):
        assert GenerationConfig.from_pretrained(folder).default_chat_template_kwargs == BRIEF
    kept = json.loads((output / "training_args.json").read_text(encoding="utf-8"))
    assert kept["data"]["chat_template_kwargs"] == BRIEF
    assert kept["effective"]["prompts"] == 'the tokenizer\'s chat template, with the arguments {"mode": "Be brief."}'
    card = (output / "README.md").read_text(encoding="utf-8")
    assert """--default-chat-template-kwargs '{"mode": "Be brief."}'\n""" in card
    assert """return_tensors="pt", **{'mode': 'Be brief.'}\n""" in card


def test_chat_has_the_arguments_of_the_training(
    run: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """They act as the system message that the template makes of them; the flag replaces them."""

    def answer(*flags: str) -> tuple[str, str]:
        assert cli.main(["chat", str(run[1]), "--message", "Hi", "--max_new_tokens", "8", *flags]) == 0
        shown = capsys.readouterr()
        return shown.out, shown.err

    kept, log = answer()
    plain, plain_log = answer("--chat_template_kwargs", "{}")
    assert 'The chat template has the arguments {"mode": "Be brief."}.' in log and "arguments" not in plain_log
    assert answer("--chat_template_kwargs", "{}", "--system", "Be brief.")[0] == kept != plain


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ('{"tools": 1}', '--chat_template_kwargs {"tools": 1}: tools cannot be an argument of the chat template'),
        ('{"mod": 1}', "--chat_template_kwargs mod: not read by the chat template, it reads mode; did you mean mode?"),
    ],
)
def test_chat_refuses_other_arguments(
    given: str, error: str, run: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["chat", str(run[1]), "--message", "Hi", "--chat_template_kwargs", given]) == 2
    assert f"error: {error}" in capsys.readouterr().err


def test_resume_with_other_arguments_is_refused(run: tuple[list[str], Path]) -> None:
    arguments = [*run[0][:-1], '{"mode": "Be long."}', "--max_steps", "3"]
    with pytest.raises(UserError, match=r"--chat_template_kwargs: mode Be brief\. then, mode Be long\. now"):
        train(arguments)


def test_sample_prompts_have_the_arguments(run: tuple[list[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run[1])
    [ids] = encode_prompts(["Hi"], tokenizer, PretrainedConfig(max_position_embeddings=512), BRIEF).values()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_sample_prompts_have_the_system_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML
    [ids] = encode_prompts(["Hi"], tokenizer, PretrainedConfig(), system_prompt="Be kind.").values()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_report_shows_the_flag_as_json() -> None:
    flags = get_flags([DataArguments(["a.json"], chat_template_kwargs=BRIEF)])
    assert flags == {"--data_path": "a.json", "--chat_template_kwargs": '{"mode": "Be brief."}'}
