"""`chat` answers as plain transformers and PEFT do, keeps the conversation, and reports what it cannot answer."""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_adapters import load_reference, save_adapter
from transformers import AutoTokenizer, GenerationConfig

from fastchat_qlora import cli
from fastchat_qlora.commands.chat.generation import Answer, ChatModel, Decoding

MAX_NEW_TOKENS = 12


@pytest.fixture(scope="module")
def made(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model, and an adapter that never generates <|im_end|> by itself."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, model_folder, {}, bias="none")
    GenerationConfig(eos_token_id=[2]).save_pretrained(folder)
    return model_folder, folder


@pytest.fixture
def adapter(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the adapter."""
    return Path(shutil.copytree(made[1], tmp_path / "adapter"))


Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run the command with lines on stdin, and return exit code, stdout and stderr."""

    def run(adapter: Path, *flags: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capsys.readouterr()
        code = cli.main(["chat", str(adapter), "--max_new_tokens", str(MAX_NEW_TOKENS), *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@torch.inference_mode()
def expected(
    made: tuple[Path, Path], turns: list[str], system: str = "", *, adapter: bool = True, quantization: str = "none"
) -> str:
    """Answer the last of alternating turns of user and assistant with plain transformers and PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(made[1])
    model = load_reference(*made, quantization=quantization)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = model if adapter else model.unload()
    output = model.generate(
        input_ids=ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


def shown(text: str) -> str:
    """Return the text with escapes for control characters."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def test_messages_make_one_conversation(made: tuple[Path, Path], chat: Chat) -> None:
    code, out, err = chat(made[1], "--message", "Who are you?", "--message", "And then?")
    first = expected(made, ["Who are you?"])
    second = expected(made, ["Who are you?", first, "And then?"])
    assert first != second
    assert (code, out) == (0, f"{shown(first)}\n{shown(second)}\n")
    assert "greedy decoding; an answer ends at <|im_end|>." in err


def test_commands_and_questions_from_a_pipe(made: tuple[Path, Path], chat: Chat) -> None:
    """An empty line asks nothing."""
    lines = "/base\nHi\n\n/base\n/base What?\n/reset\nHi\n/system Be brief.\nHi\n/what\n/help\n/quit\nHi\n"
    code, out, err = chat(made[1], lines=lines)
    hi, base = expected(made, ["Hi"]), expected(made, ["Hi"], adapter=False)
    other = expected(made, ["Hi", hi, "What?"], adapter=False)
    brief = expected(made, ["Hi"], "Be brief.")
    assert len({hi, base, other, brief}) == 4
    assert code == 0
    assert out == "".join(shown(text) + "\n" for text in (hi, base, other, hi, brief))
    for message in (
        "Nothing was asked yet: /base QUESTION asks the base model.",
        "The conversation is reset.",
        "A new conversation, with this system message.",
        "Unknown command /what: /help lists the commands.",
        "Ctrl-C stops an answer.",
    ):
        assert message in err


def test_system_message_and_stdin_as_one_message(made: tuple[Path, Path], chat: Chat) -> None:
    code, out, _ = chat(made[1], "--system", "Be brief.", "--message", "-", lines="one\ntwo")
    assert (code, out) == (0, shown(expected(made, ["one\ntwo"], "Be brief.")) + "\n")


def test_stop_tokens_end_an_answer_and_are_not_shown(made: tuple[Path, Path], adapter: Path, chat: Chat) -> None:
    whole = expected(made, ["Hi"])
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    stop = next(token for token in ids[2:] if token not in ids[:2])
    GenerationConfig(eos_token_id=[2, stop]).save_pretrained(adapter)
    code, out, _ = chat(adapter, "--message", "Hi")
    before = whole.partition(tokenizer.decode([stop]))[0]
    assert before and (code, out) == (0, shown(before) + "\n")


def test_sampling_is_reproducible_by_the_seed(made: tuple[Path, Path], chat: Chat) -> None:
    flags = ("--message", "Hi", "--temperature", "3", "--top_p", "0.9")
    answers = [chat(made[1], *flags, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]
    assert "sampling at temperature 3, top_p 0.9" in chat(made[1], *flags)[2]


@pytest.mark.parametrize(
    ("flags", "quantization", "message"),
    [
        (["--quantization", "nf4"], "nf4", "in nf4 with {}, which was trained on the original weights; greedy"),
        (["--quantization", "none"], "none", "in float32 with {}; greedy"),
        ([], "none", "in float32 with {}; greedy"),
    ],
)
def test_given_quantization_of_the_base_model(
    made: tuple[Path, Path], chat: Chat, flags: list[str], quantization: str, message: str
) -> None:
    code, out, err = chat(made[1], *flags, "--message", "Hi", "--message", "Count.")
    hi = expected(made, ["Hi"], quantization=quantization)
    count = expected(made, ["Hi", hi, "Count."], quantization=quantization)
    assert (code, out) == (0, f"{shown(hi)}\n{shown(count)}\n") and message.format(made[1]) in err
    assert quantization == "none" or hi != expected(made, ["Hi"]), "the quantization has an effect"


def test_8_bits_are_logged_once(made: tuple[Path, Path], chat: Chat) -> None:
    """Without a terminal there are no progress bars either."""
    code, out, err = chat(made[1], "--quantization", "int8", "--message", "Hi")
    assert code == 0 and out and err.count("MatMul8bitLt") <= 1
    assert err.count("rounds activations to 8 bits too, in evaluation only. Answers differ") == 1
    assert "Loading weights" not in err and "\r" not in err


def test_cut_off_answers_are_reported(made: tuple[Path, Path], adapter: Path, tmp_path: Path, chat: Chat) -> None:
    """The limit is the flag or the model's last position."""
    message = f"(cut off by --max_new_tokens {MAX_NEW_TOKENS})"
    code, _, err = chat(made[1], "--message", "Hi", "--message", "Hi")
    assert code == 0 and err.count(message) == 2
    _, _, err = chat(adapter, lines="Hi\n/base\n")
    assert err.count(message) == 2
    base = Path(shutil.copytree(made[0], tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": len(prompt) + 3}
    (base / "config.json").write_text(json.dumps(config))
    flags = ("--model_name_or_path", str(base), "--max_new_tokens", str(2**31 - 1))
    code, _, err = chat(adapter, *flags, "--message", "Hi")
    assert f"{adapter}: does not say on which commit or files of its base model it was trained; {base}, a folder" in err
    assert code == 0 and f"(cut off by the {len(prompt) + 3} tokens that the model has positions for)" in err
    first = tokenizer(expected(made, ["Hi"]), add_special_tokens=False).input_ids
    GenerationConfig(eos_token_id=[first[-1]]).save_pretrained(adapter)
    assert "cut off" not in chat(adapter, "--message", "Hi")[2]


@pytest.mark.parametrize("flags", [["--temperature", "0.001"], ["--temperature", "1000"], ["--top_p", "1e-300"]])
def test_extreme_sampling_still_answers(made: tuple[Path, Path], chat: Chat, flags: list[str]) -> None:
    code, out, _ = chat(made[1], "--temperature", "1", *flags, "--message", "Hi")
    assert code == 0 and len(out) > 1
    if "--top_p" in flags:
        assert out == shown(expected(made, ["Hi"])) + "\n", "only the most likely token is left"


def test_nan_predictions_are_an_error(made: tuple[Path, Path], tmp_path: Path, chat: Chat) -> None:
    base = Path(shutil.copytree(made[0], tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    code, out, err = chat(made[1], "--model_name_or_path", str(base), "--message", "Hi")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: the model's predictions are not numbers: ")


class StandardInput(NamedTuple):
    """Bytes on standard input, None if it cannot be read, and the exit code and message that follow."""

    data: bytes | None
    flags: list[str]
    code: int
    message: str


INPUTS = {
    "a line": StandardInput(b"H\xffi\nHi\n", [], 0, "Not possible: the line is not utf-8 text."),
    "a message": StandardInput(b"H\xffi", ["--message", "-"], 2, "standard input is not utf-8 text; write"),
    "nothing": StandardInput(b" \n", ["--message", "-"], 2, "standard input is empty; give it a text"),
    "no message": StandardInput(None, ["--message", "-"], 2, "standard input cannot be read (Bad file desc"),
    "no line": StandardInput(None, [], 1, "standard input cannot be read: Bad file descriptor; see where it comes"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_invalid_standard_input(
    case: str,
    made: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, flags, code, message = INPUTS[case]
    path = tmp_path / "input"
    path.write_bytes(data or b"")
    with open(os.open(path, os.O_WRONLY if data is None else os.O_RDONLY), encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert cli.main(["chat", str(made[1]), "--max_new_tokens", str(MAX_NEW_TOKENS), *flags]) == code
    captured = capsys.readouterr()
    assert message in captured.err and (code == 0 or captured.err.splitlines()[-1].startswith("error: "))
    assert captured.out == (shown(expected(made, ["Hi"])) + "\n" if code == 0 else "")


def test_prompts_are_not_written_to_a_file_of_answers(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user types at the terminal."""
    keyboard, terminal = os.openpty()
    os.write(keyboard, b"Hi\n\x04")
    with open(terminal, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert cli.main(["chat", str(made[1]), "--max_new_tokens", str(MAX_NEW_TOKENS)]) == 0
    os.close(keyboard)
    captured = capsys.readouterr()
    assert captured.out == shown(expected(made, ["Hi"])) + "\n"
    assert captured.err.endswith(f"commands.\n> (cut off by --max_new_tokens {MAX_NEW_TOKENS})\n> \n")


@pytest.mark.parametrize("flags", [[], ["--message", "-"]])
def test_closed_standard_input(
    flags: list[str], made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["chat", str(made[1]), *flags]) == 2
    assert capsys.readouterr().err == (
        "error: standard input is closed, so nothing can be asked; give --message TEXT\n"
    )


def test_oldest_turns_are_left_out_when_the_context_is_full(
    made: tuple[Path, Path], adapter: Path, tmp_path: Path, chat: Chat
) -> None:
    """The system message stays, and a message that is too long alone is not answered."""
    base = Path(shutil.copytree(made[0], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    flags = ("--model_name_or_path", str(base), "--system", "S.")
    code, out, err = chat(adapter, *flags, lines="Hi\nHi\n" + "word " * 60 + "\nHi\n")
    assert code == 0 and len(out.splitlines()) >= 3
    assert "The conversation no longer fits the 64 tokens of the model: its first 2 messages are left out." in err
    assert "Not possible: it takes " in err and "tokens, and the model has positions for 64." in err
    code, out, err = chat(adapter, *flags, "--message", "word " * 60)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: a message cannot be answered: it takes ")


def test_control_characters_of_an_answer_are_escaped(
    made: tuple[Path, Path], adapter: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: ChatModel, messages: Any, show: Callable[[str], None], *, adapter: bool = True) -> Answer:
        show("a\x1b[2J")
        show("\r\u202eb\n")
        return Answer("")

    monkeypatch.setattr(ChatModel, "answer", answer)
    assert chat(adapter, "--message", "Hi")[1] == "a\\x1b[2J\\r\\u202eb\n\n"


def test_ctrl_c_ends_the_program_without_a_terminal(
    made: tuple[Path, Path], chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastchat_qlora.commands.chat.generation._AnswerStreamer.put", _interrupt)
    code, out, err = chat(made[1], "--message", "Hi", "--message", "Hi")
    assert (code, out) == (130, "\n")
    assert err.endswith("SIGINT: the answer was stopped\n")


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_decoding_as_text() -> None:
    assert str(Decoding(0, 1, 5)) == "greedy decoding"
    assert str(Decoding(0.5, 1, 5)) == "sampling at temperature 0.5"


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here.') }}{% endif %}"

MISTAKES: dict[str, tuple[list[str], str]] = {
    "a flag": (["--temprature", "1"], "unknown flag --temprature: did you mean --temperature?"),
    "a value": (["--max_new_tokens", "many"], "--max_new_tokens: invalid int value: 'many'"),
    "several": (
        ["--max_new_tokens", "0", "--temperature", "-1", "--top_p", "2", "--seed", "-1"],
        "4 problems: (1) --temperature -1.0: must be 0, which is greedy decoding, or from 0.001 to 1000; "
        "(2) --top_p 2.0: must be above 0 and at most 1; (3) --max_new_tokens 0: must be at least 1 and below 2**31; "
        "(4) --seed -1: must be at least 0 and below 2**32",
    ),
    "no number": (["--temperature", "nan"], "--temperature nan: must be a finite number"),
    "too cold": (["--temperature", "1e-45"], "or from 0.001 to 1000"),
    "too hot": (["--temperature", "inf"], "--temperature inf: must be a finite number"),
    "nothing": (["--message", ""], "--message: must not be empty; give it a text, or - to read standard input"),
    "twice the same": (["--message", "-", "--message", "-"], "standard input can be read only once; give it once"),
    "no text": (["--message", "a\udcff"], "--message a\\udcff: must be UTF-8 text; write it in that encoding"),
    "no text either": (["--system", "\udcff"], "--system \\udcff: must be UTF-8 text; write it in that encoding"),
    "a kind": (["--quantization", "nf5"], "--quantization: invalid choice: 'nf5'"),
    "a base": (["--model_name_or_path", "/no/such"], "--model_name_or_path /no/such: no such folder"),
    "no base in reach": (["--model_name_or_path", "org/model"], "neither a model's folder nor a hub id that can be"),
    "no system": (["--system", "Be brief."], "the chat template refuses the conversation: No system here."),
    "no template": ([], "neither it nor its base model has a chat template; add the chat_template.jinja"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_reported_before_the_model_is_loaded(
    mistake: str, adapter: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastchat_qlora.commands.chat.command.load_with_adapter", lambda adapter: pytest.fail("it was loaded")
    )
    template = adapter / "chat_template.jinja"
    if mistake == "no system":
        template.write_text(REFUSES_SYSTEM + template.read_text())
    elif mistake == "no template":
        template.unlink()
    flags, message = MISTAKES[mistake]
    code, out, err = chat(adapter, *flags, "--message", "Hi")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ") and message in err.splitlines()[-1]


def test_adapter_is_required(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(tmp_path)[0] == 2
    assert cli.main(["chat"]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: ADAPTER\n"
