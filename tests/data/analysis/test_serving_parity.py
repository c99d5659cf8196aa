"""A server's prompt is compared with the tokens before an answer in training; a difference names the token."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import real_templates
from conftest import sharegpt
from transformers import PreTrainedTokenizerFast

from fastchat_qlora.config.parser import parse_args
from fastchat_qlora.data.analysis import serving_parity
from fastchat_qlora.data.analysis.serving_parity import (
    Mismatch,
    SupervisedSpan,
    find_mismatch,
    is_empty_thought,
    make_request,
)
from fastchat_qlora.data.analysis.stop_tokens import find_stop_tokens
from fastchat_qlora.data.conversation import Conversation, Message
from fastchat_qlora.data.dataset import load_dataset
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings

ASSISTANT = "<|im_start|>assistant\n"


@pytest.fixture(scope="module", autouse=True)
def folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    real_templates.make_folders(tokenizer_folder, tmp_path_factory.mktemp("sentencepiece"))


def load(tokenizer: Any, data: Path, tmp_path: Path, *flags: str, model_max_length: int = 512) -> Any:
    """Return the sequences as a run loads them; the log is in `notices`."""
    argv = f"--model_name_or_path org/m --data_path {data} --output_dir {tmp_path / 'out'}"
    args = parse_args([*argv.split(), *flags])
    loaded = load_dataset(args.data, tokenizer, max_length=model_max_length, output_dir=None, cache_dir=str(tmp_path))
    return loaded.train.sequences


def parity_lines(notices: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in notices.records if record.getMessage().startswith("Serve parity")]


ALIKE = "Serve parity: {0} of {0} sequences begin with a server's prompt, with the tokenizer saved and loaded again."


@pytest.mark.parametrize(
    ("flags", "length", "count"),
    [
        ([], 512, 12),
        (["--lazy_preprocess", "True"], 512, 12),
        (["--packing", "True"], 512, 12),
        (["--train_on", "last"], 512, 12),
        (["--train_on", "all"], 512, 12),
        (["--conv_template", "vicuna"], 512, 12),
        (["--conv_template", "alpaca"], 512, 12),
        (["--overlong", "split"], 40, 12),
        (["--overlong", "truncate"], 35, 12),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_sequences_begin_with_the_prompts_of_a_server(
    flags: list[str],
    length: int,
    count: int,
    tokenizer: PreTrainedTokenizerFast,
    data_file: Path,
    tmp_path: Path,
    notices: pytest.LogCaptureFixture,
) -> None:
    for _ in range(2):  # the second time from the cache
        load(copy.deepcopy(tokenizer), data_file, tmp_path, *flags, model_max_length=length)
    first, second = parity_lines(notices)
    assert first == second
    assert first.startswith("Serve parity: ") and " of " in first and "again" in first
    checked = int(first.split()[2])
    assert first.startswith(ALIKE.format(checked)) and (checked == count or flags[-1] == "split")


def foxes(folder: Path) -> Path:
    """Three conversations of one to three answers."""
    parity_lines = ["hello, user!", "One two", "And?", "The fox", "!", "One"]
    turns = [(("human", "gpt")[i % 2], text) for i, text in enumerate(parity_lines)]
    path = folder / "data.json"
    path.write_text(json.dumps([sharegpt(turns[:length]) for length in (2, 4, 6)]))
    return path


def test_tokenizer_that_changes_when_saved_is_found(tmp_path: Path, notices: pytest.LogCaptureFixture) -> None:
    """transformers loses the switch `legacy` of a Llama tokenizer, so model/loading/tokenizer.py keeps it."""
    load(copy.deepcopy(real_templates.sentencepiece("phi3")), foxes(tmp_path), tmp_path)
    [line] = parity_lines(notices)
    assert line.startswith("Serve parity: 0 of 3 sequences") and "as token 1, a server has '\\n'" in line


@pytest.mark.parametrize("family", real_templates.FAMILIES)
@pytest.mark.parametrize("name", ["llama3_1", "qwen3", "gemma3", "phi3", "glm4moe", "gptoss"])
def test_families_of_templates_agree_with_a_server(
    family: str, name: str, tmp_path: Path, notices: pytest.LogCaptureFixture
) -> None:
    """Templates may rewrite earlier turns: each sequence is the text that a server would render."""
    tokenizer = copy.deepcopy(real_templates.FAMILIES[family](name))
    if family == "sentencepiece":
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy  # as model/loading/tokenizer.py does
    rows = load(tokenizer, foxes(tmp_path), tmp_path)
    assert parity_lines(notices)[0].startswith(ALIKE.format(len(rows)))
    end = real_templates.ENDS[name]
    expected = tokenizer.convert_tokens_to_ids("<" + end.rpartition("<")[2])
    assert find_stop_tokens(rows, tokenizer, 512) == [expected]


@pytest.fixture
def other_server(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the server have a tokenizer with another template than in training."""

    def install(change: Any) -> None:
        real = serving_parity._reload

        def reload(tokenizer: Any) -> Any:
            server = real(tokenizer)
            change(server)
            return server

        monkeypatch.setattr(serving_parity, "_reload", reload)

    return install


def replace(old: str, new: str) -> Any:
    def change(server: Any) -> None:
        assert old in server.chat_template
        server.chat_template = server.chat_template.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        (
            "assistant\n'",
            "assistant\nX'",
            "before answer 1 the sequence has {I} as token {n}, a server has {X}",
        ),
        ("'<|im_start|>assistant\n'", "'<|im_end|>'", "the sequence has {start} as token {h}, a server has {end}"),
        (
            "{% for",
            "<|endoftext|>{% for",
            "the sequence has {start} as token 0, a server has '<|endoftext|>' (id 0)",
        ),
    ],
    ids=["it goes on after the place of the answer", "another token before it", "from the first token on"],
)
def test_first_different_token_is_logged(
    old: str,
    new: str,
    problem: str,
    other_server: Any,
    tokenizer: PreTrainedTokenizerFast,
    data_file: Path,
    tmp_path: Path,
    notices: pytest.LogCaptureFixture,
) -> None:
    other_server(replace(old, new))
    rows = load(tokenizer, data_file, tmp_path)
    first = next(i for i, label in enumerate(rows[0]["labels"]) if label != -100)
    header = len(tokenizer(ASSISTANT).input_ids)

    def shown(token: int) -> str:
        return f"{tokenizer.decode([token])!r} (id {token})"

    names = {"I": shown(rows[0]["input_ids"][first]), "n": first, "h": first - header}
    names |= {"X": shown(tokenizer("X").input_ids[0]), "start": shown(1), "end": shown(2)}
    [line] = parity_lines(notices)
    assert line.startswith("Serve parity: 0 of 12 sequences begin with a server's prompt. ")
    assert f" {data_file}:1: " in line and problem.format(**names) in line


def test_later_answers_are_compared(
    other_server: Any, tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path, notices: Any
) -> None:
    """Every second conversation has a second answer."""
    other_server(replace("{% if add_gen", "{% if messages | length > 2 %}X{% endif %}{% if add_gen"))
    load(tokenizer, data_file, tmp_path)
    [line] = parity_lines(notices)
    assert line.startswith("Serve parity: 6 of 12 sequences") and f"{data_file}:2: before answer 2 " in line


def test_refusal_is_logged(
    other_server: Any, tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path, notices: Any
) -> None:
    other_server(replace("{% for", "{{ raise_exception('no') }}{% for"))
    load(tokenizer, data_file, tmp_path)
    [line] = parity_lines(notices)
    assert "0 of 12 sequences" in line and "refuses the messages before an answer" in line


def test_unreadable_tokenizer_is_logged(
    other_server: Any, tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path, notices: Any
) -> None:
    def change(server: Any) -> None:
        raise ValueError("no such class")

    other_server(change)
    load(tokenizer, data_file, tmp_path)
    assert parity_lines(notices) == ["Serve parity: not compared, the saved tokenizer cannot be loaded: no such class"]


def test_compared_sequences_are_spread_over_files(
    tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path, notices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = json.loads(data_file.read_text(encoding="utf-8"))
    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n" + "\n\n".join(map(json.dumps, records * 30)) + "\n{}\n")
    seen: list[tuple[str, int]] = []
    real = serving_parity._compare

    def compare(row: dict[str, Any], *rest: Any, **more: Any) -> str:
        seen.append((row["file"], row["line"]))
        return real(row, *rest, **more)

    monkeypatch.setattr(serving_parity, "_compare", compare)
    load(tokenizer, data_file, tmp_path, "--data_path", str(data_file), str(lines))
    assert parity_lines(notices)[0].startswith(ALIKE.format(16)) and len({*seen}) == 16
    assert {file for file, _ in seen} == {str(data_file), str(lines)}
    assert max(line for _, line in seen) == serving_parity.COMPARED_LINES


def test_templates_without_a_generation_prompt_have_the_model_write_its_header(
    tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path, notices: Any
) -> None:
    start = tokenizer.chat_template.index("{% if add_gen")
    tokenizer.chat_template = tokenizer.chat_template[:start]
    rows = load(tokenizer, data_file, tmp_path)
    supervised = [token for token in rows[0]["labels"] if token != -100]
    assert tokenizer.decode(supervised) == f"{ASSISTANT}I'm Pellico.<|im_end|>"
    assert parity_lines(notices)[0].startswith(ALIKE.format(12))


def test_template_may_need_no_generation_prompt(
    tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path, notices: Any
) -> None:
    """In templates such as Llama-2's, an answer follows the question directly."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>{% else %}"
        " {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
    )
    load(tokenizer, data_file, tmp_path)
    assert parity_lines(notices)[0].startswith(ALIKE.format(12))


@pytest.mark.parametrize("length", [40, 50, 60, 90])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_cut_sequences_are_compared(
    train_on: str, length: int, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, notices: Any, capfd: Any
) -> None:
    """They are compared with the prompt of the last remaining answer, without warnings about long texts."""
    turns = [("human", "One two"), ("gpt", "three")] * 5
    data = tmp_path / "data.json"
    data.write_text(json.dumps([sharegpt(turns)] * 2))
    tokenizer.model_max_length = length  # as model/loading/tokenizer.py does
    rows = load(tokenizer, data, tmp_path, "--train_on", train_on, model_max_length=length)
    assert all(row["full_length"] > row["length"] for row in rows)
    assert parity_lines(notices)[0].startswith(ALIKE.format(2))
    assert "sequence length is longer" not in capfd.readouterr().err + notices.text


def test_different_cut_sequences_are_found(
    other_server: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, notices: Any
) -> None:
    other_server(replace("assistant\n'", "assistant\nX'"))
    data = tmp_path / "data.json"
    data.write_text(json.dumps([sharegpt([("human", "One two"), ("gpt", "three")] * 5)]))
    load(tokenizer, data, tmp_path, "--train_on", "all", model_max_length=60)
    assert parity_lines(notices)[0].startswith("Serve parity: 0 of 1 sequences")


def run_of(ids: Sequence[int], *prompts: list[int], start: int, after: int = 0) -> Mismatch | Any:
    return find_mismatch(ids, prompts, SupervisedSpan(start, len(ids), after))


def test_nearest_prompt_is_compared() -> None:
    ids = [1, 2, 3, 4, 5, 6]
    assert run_of(ids, [1, 2, 3], start=3) is None
    assert run_of(ids, [9], [1, 2, 3], start=3) is None
    assert run_of(ids, [9], [1, 2, 8], start=3) == Mismatch(2, 8, 3)
    assert run_of(ids, [1, 2, 8], [1, 2, 3, 4, 5, 6, 7], start=3) == Mismatch(2, 8, 3), "the other is a later answer's"
    assert run_of(ids, [1, 2], [1, 2, 3, 4, 9], start=5, after=4) == Mismatch(4, 9, 5), "the first is an earlier one's"


def test_no_prompt_passes_because_it_is_short() -> None:
    ids = [1, 2, 3, 4, 5, 6]
    assert run_of(ids, [1, 2], start=3) == Mismatch(2, None, 3)
    assert run_of(ids, [], start=3) == Mismatch(0, None, 1)
    assert run_of(ids, start=3) == Mismatch(0, None, 1)


def test_prompts_may_have_what_the_answer_begins_with() -> None:
    """The model would write it twice."""
    assert run_of([1, 2, 3, 4, 5, 6], [1, 2, 3, 4], start=3) == Mismatch(3, 4, 4, is_longer=True)


@pytest.mark.parametrize(
    ("text", "is_empty"),
    [
        ("<think>\n\n</think>\n\n", True),
        ("\n</think>\n\n", True),
        ("</think>", True),
        ("[THINK][/THINK]", True),
        ("<|START_THINKING|><|END_THINKING|>", True),
        ("<|channel>thought\n<channel|>", True),
        ("<seed:think></seed:think>", True),
        ("", False),
        ("\n", False),
        ("<|assistant|>", False),
        ("<|im_start|>assistant\n", False),
        ("<think>\nHm.\n</think>", False),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|channel|>final<|message|>", False),
    ],
)
def test_empty_thoughts_are_recognized(text: str, is_empty: bool) -> None:
    assert is_empty_thought(text) == is_empty


def test_only_masked_empty_thoughts_may_stand_before_an_answer() -> None:
    ids = [1, 2, 3, 4, 5, 6]

    def allow(tokens: Sequence[int]) -> bool:
        return list(tokens) == [3]

    assert find_mismatch(ids, [[1, 2]], SupervisedSpan(3, 6, 0), allow) is None
    assert find_mismatch(ids, [[1]], SupervisedSpan(3, 6, 0), allow) == Mismatch(1, None, 2)
    assert find_mismatch(ids, [[1, 2]], SupervisedSpan(3, 6, 3), allow) == Mismatch(0, None, 1), "of the answer before"


def test_requests_have_the_arguments_of_run_and_record(tokenizer: PreTrainedTokenizerFast) -> None:
    settings = PreprocessingSettings("auto", 512, "truncate", chat_template_kwargs={"a": 1, "b": 1})
    messages = [Message("user", "Hi"), Message("assistant", "Ho")]
    request = make_request(Conversation(messages, (), {"b": 2}), Preprocessor(tokenizer, settings))
    assert (request.template_kwargs, request.answers) == ({"a": 1, "b": 2}, [1])
    assert request.messages[0] == {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--empty_thoughts", "train"],
        ["--empty_thoughts", "prompt"],
        ["--train_on", "all"],
        ["--chat_template_kwargs", '{"enable_thinking": false}'],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseekv3"])
def test_records_are_compared_in_their_mode(name: str, flags: list[str], tmp_path: Path, notices: Any) -> None:
    """Answers with thoughts, without, and both in one conversation."""
    tokenizer = copy.deepcopy(real_templates.byte_level(name))
    if "enable_thinking" not in tokenizer.chat_template and "--chat_template_kwargs" in flags:
        pytest.skip("the template has no such argument")
    ask, plain = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
    thinking = {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nTwo."}
    data = tmp_path / "data.jsonl"
    conversations = ([ask, plain], [ask, thinking], [ask, plain, ask, thinking], [ask, thinking, ask, plain])
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    rows = load(tokenizer, data, tmp_path, *flags)
    assert len(rows) >= 4 and parity_lines(notices)[0] == ALIKE.format(len(rows))


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_template_of_a_server_is_compared(
    train_on: str, tokenizer: PreTrainedTokenizerFast, data_file: Path, tmp_path: Path, notices: Any
) -> None:
    """A template that opens a thought in its prompt serves what was not trained."""
    same, other = tmp_path / "same.jinja", tmp_path / "other.jinja"
    same.write_text(tokenizer.chat_template)
    other.write_text(tokenizer.chat_template.replace("assistant\n'", "assistant\n<think>'"))
    for template in (same, other):
        load(tokenizer, data_file, tmp_path, "--serving_template", str(template), "--train_on", train_on)
    first, second = parity_lines(notices)
    assert first == ALIKE.format(12)[:-1] + " and the template of --serving_template."
    assert second.startswith("Serve parity: 0 of 12 sequences begin with a server's prompt. ")
    assert f" {data_file}:1: before answer 1 the sequence has 'I' (id 43) as token 15, " in second
    assert second.endswith(", a server has '<' (id 30)")
