"""A conversation with base and adapter: what is asked, what is answered, what is kept."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_at_hand import load_live, save_adapter
from transformers import AutoTokenizer, GenerationConfig

from fastchat_qlora import cli
from fastchat_qlora.commands.answering import Answerer, Decoding

MOST = 12


@pytest.fixture(scope="module")
def made(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base, and an adapter on it that never says <|im_end|> by itself."""
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, model_folder, {}, bias="none")
    GenerationConfig(eos_token_id=[2]).save_pretrained(folder)
    return model_folder, folder


@pytest.fixture
def adapter(made: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(made[1], tmp_path / "adapter"))


Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Lines and flags -> exit code, stdout, stderr."""

    def run(adapter: Path, *flags: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capsys.readouterr()
        code = cli.main(["chat", str(adapter), "--max_new_tokens", str(MOST), *flags])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@torch.inference_mode()
def expected(made: tuple[Path, Path], turns: list[str], system: str = "", *, adapter: bool = True) -> str:
    """What plain transformers and PEFT answer to the last of these turns, of user and assistant in turn."""
    tokenizer = AutoTokenizer.from_pretrained(made[1])
    model = load_live(*made)
    messages = [{"role": "system", "content": system}] * bool(system)
    messages += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    model = model if adapter else model.unload()
    output = model.generate(input_ids=ids, max_new_tokens=MOST, do_sample=False, eos_token_id=2, pad_token_id=0)
    return str(tokenizer.decode(output[0, ids.shape[1] :]))


def shown(text: str) -> str:
    """As the terminal is to show it: of this answer, control characters apart."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def test_messages_are_turns_of_one_conversation(made: tuple[Path, Path], chat: Chat) -> None:
    code, out, err = chat(made[1], "--message", "Who are you?", "--message", "And then?")
    first = expected(made, ["Who are you?"])
    second = expected(made, ["Who are you?", first, "And then?"])
    assert first != second
    assert (code, out) == (0, f"{shown(first)}\n{shown(second)}\n")
    assert "greedy decoding; an answer ends at <|im_end|>." in err


def test_lines_of_a_pipe(made: tuple[Path, Path], chat: Chat) -> None:
    """Every command in one conversation; an empty line asks nothing."""
    lines = "/base\nHi\n\n/base\n/base What?\n/reset\nHi\n/system Be brief.\nHi\n/what\n/help\n/quit\nHi\n"
    code, out, err = chat(made[1], lines=lines)
    hi, base = expected(made, ["Hi"]), expected(made, ["Hi"], adapter=False)
    other = expected(made, ["Hi", hi, "What?"], adapter=False)
    brief = expected(made, ["Hi"], "Be brief.")
    assert len({hi, base, other, brief}) == 4
    assert code == 0
    assert out == "".join(shown(text) + "\n" for text in (hi, base, other, hi, brief))
    for said in (
        "Nothing was asked yet: /base QUESTION asks the base model.",
        "The conversation is forgotten.",
        "A new conversation, with this system message.",
        "/what is no command; /help lists them.",
        "Ctrl-C stops an answer.",
    ):
        assert said in err


def test_system_message_and_stdin_as_one_message(made: tuple[Path, Path], chat: Chat) -> None:
    code, out, _ = chat(made[1], "--system", "Be brief.", "--message", "-", lines="one\ntwo")
    assert (code, out) == (0, shown(expected(made, ["one\ntwo"], "Be brief.")) + "\n")


def test_it_stops_at_each_stop_token_and_does_not_show_it(made: tuple[Path, Path], adapter: Path, chat: Chat) -> None:
    whole = expected(made, ["Hi"])
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    stop = next(token for token in ids[2:] if token not in ids[:2])
    GenerationConfig(eos_token_id=[2, stop]).save_pretrained(adapter)
    code, out, _ = chat(adapter, "--message", "Hi")
    before = whole.partition(tokenizer.decode([stop]))[0]
    assert before and (code, out) == (0, shown(before) + "\n")


def test_sampling_goes_by_the_seed(made: tuple[Path, Path], chat: Chat) -> None:
    flags = ("--message", "Hi", "--temperature", "3", "--top_p", "0.9")
    answers = [chat(made[1], *flags, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]
    assert "sampling at temperature 3, top_p 0.9" in chat(made[1], *flags)[2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [(["--quantization", "nf4"], "in nf4 with"), (["--quantization", "none"], "in float32 with"), ([], "in float32")],
)
def test_the_base_is_had_as_asked(made: tuple[Path, Path], chat: Chat, flags: list[str], said: str) -> None:
    code, out, err = chat(made[1], *flags, "--message", "Hi")
    assert code == 0 and len(out) > 1 and said in err


def test_what_no_longer_fits_is_left_out(made: tuple[Path, Path], adapter: Path, tmp_path: Path, chat: Chat) -> None:
    """The oldest turns go, the system message stays, and a message that alone is too long is not asked."""
    base = Path(shutil.copytree(made[0], tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    flags = ("--model_name_or_path", str(base), "--system", "S.")
    code, out, err = chat(adapter, *flags, lines="Hi\nHi\n" + "word " * 60 + "\nHi\n")
    assert code == 0 and len(out.splitlines()) >= 3
    assert "The conversation no longer fits the 64 tokens of the model: its first 2 messages are left out." in err
    assert "Not asked: it takes " in err and "tokens, and the model has positions for 64." in err
    code, out, err = chat(adapter, *flags, "--message", "word " * 60)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: a message cannot be answered: it takes ")


def test_control_characters_do_not_steer_the_terminal(
    made: tuple[Path, Path], adapter: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(self: Answerer, messages: Any, show: Callable[[str], None], *, adapter: bool = True) -> str:
        show("a\x1b[2J")
        show("\r\u202eb\n")
        return ""

    monkeypatch.setattr(Answerer, "answer", answer)
    assert chat(adapter, "--message", "Hi")[1] == "a\\x1b[2J\\r\\u202eb\n\n"


def test_ctrl_c_ends_a_script(made: tuple[Path, Path], chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nobody there to go on."""
    monkeypatch.setattr("fastchat_qlora.commands.answering._Pieces.put", _interrupt)
    code, out, err = chat(made[1], "--message", "Hi", "--message", "Hi")
    assert (code, out) == (130, "\n")
    assert err.endswith("SIGINT: the answer was stopped\n")


def _interrupt(*args: Any) -> None:
    raise KeyboardInterrupt


def test_decoding_says_what_it_is() -> None:
    assert str(Decoding(0, 1, 5)) == "greedy decoding"
    assert str(Decoding(0.5, 1, 5)) == "sampling at temperature 0.5"


REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system here.') }}{% endif %}"

MISTAKES: dict[str, tuple[list[str], str]] = {
    "a flag": (["--temprature", "1"], "unknown flag --temprature: did you mean --temperature?"),
    "a value": (["--max_new_tokens", "many"], "--max_new_tokens: invalid int value: 'many'"),
    "several": (
        ["--max_new_tokens", "0", "--temperature", "-1", "--top_p", "2", "--seed", "-1"],
        "4 problems: (1) --temperature -1.0: must be a number of at least 0; (2) --top_p 2.0: must be above 0 and at "
        "most 1; (3) --max_new_tokens 0: must be at least 1; (4) --seed -1: must be at least 0 and below 2^32",
    ),
    "no number": (["--temperature", "nan"], "--temperature nan: must be a number of at least 0"),
    "a kind": (["--quantization", "nf5"], "--quantization: invalid choice: 'nf5'"),
    "a base": (["--model_name_or_path", "/no/such"], "--model_name_or_path /no/such: no such folder"),
    "no base in reach": (["--model_name_or_path", "org/model"], "neither a model's folder nor a hub id that can be"),
    "no system": (["--system", "Be brief."], "the chat template refuses the conversation: No system here."),
    "no template": ([], "neither it nor its base has a chat template; put the chat_template.jinja"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_the_model_is_loaded(
    mistake: str, adapter: Path, chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastchat_qlora.commands.chat.load_live", lambda adapter: pytest.fail("it was loaded"))
    template = adapter / "chat_template.jinja"
    if mistake == "no system":
        template.write_text(REFUSES_SYSTEM + template.read_text())
    elif mistake == "no template":
        template.unlink()
    flags, said = MISTAKES[mistake]
    code, out, err = chat(adapter, *flags, "--message", "Hi")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ") and said in err.splitlines()[-1]


def test_an_adapter_is_needed(chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat(tmp_path)[0] == 2
    assert cli.main(["chat"]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: ADAPTER\n"
