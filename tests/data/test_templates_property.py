"""Real chat templates x both families of tokenizers x any text: what is learnt is what the assistant says, or nothing.

The templates are those that TRL brings along: stock templates of the common model families, and their twins with
`{% generation %}` markers. What is expected is written here from the conversation alone; the package is only asked for
rows.
"""

import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import trl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastchat_qlora.data.preprocessing import Finished, Preprocessor
from fastchat_qlora.data.readers import RawRecord, Source
from fastchat_qlora.data.tokenization import IGNORE_INDEX

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))
from sentencepiece_model import train_llama_sentencepiece

FOLDER = Path(trl.__file__).parent / "chat_templates"
# What ends a turn of the assistant in each family, as its model card or generation_config says.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "gemma4_v5": "<turn|>",
    "gptoss": "<|return|>",
    "lfm2": "<|im_end|>",
    "lfm2_2_5": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama3_1": "<|eot_id|>",
    "llama3_2": "<|eot_id|>",
    "nemotron_3_nano": "<|im_end|>",
    "nemotron_3_super": "<|im_end|>",
    "nemotron_3_ultra": "<|im_end|>",
    "phi3": "<|end|>",
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "qwen3_5_nothink": "<|im_end|>",
    "qwen3_5_think": "<|im_end|>",
    "qwen3_6": "<|im_end|>",
    "qwen3_8": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}
ENDS |= {f"{name}_training": end for name, end in ENDS.items() if (FOLDER / f"{name}_training.jinja").exists()}
NO_SYSTEM = {"gemma", "gemma_training"}
OPENS_THOUGHT = ("deepseek", "nemotron")  # their prompt ends with <think>, which a rendered answer does not have
REWRITES = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "gptoss", "gptoss_training"}

SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜\s]+｜>|</?s>|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<bos>")
AWKWARD = [
    "\n",
    " ",
    "\t",
    "\u00a0",
    "🙂",
    "한국어",
    "e\u0301",
    "\u200b",
    "\x85",
    "\x00",
    "  a",
    "a \n",
    "\n\n",
    "<b>",
    "</think>",
]
AWKWARD += [
    "<tool_call>",
    "[INST]",
    "{{ x }}",
    "assistant",
    "user\n",
    "ΓειάΣου",
    "\\n",
    "'",
    '"',
    "<|im",
    "👩‍👩‍👧",
    "\u2028",
    "▁",
    "Ġ",
]
texts = st.text(max_size=25) | st.lists(st.sampled_from(AWKWARD), min_size=1, max_size=4).map("".join)
answers = texts.filter(lambda text: bool(text.strip()))


@cache
def byte_level(name: str) -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with the template and the special tokens that it writes."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(_FOLDERS["byte-level"])
    return _with_template(tokenizer, name)


@cache
def sentencepiece(name: str) -> PreTrainedTokenizerBase:
    """The same for a SentencePiece model as Llama's."""
    return _with_template(AutoTokenizer.from_pretrained(_FOLDERS["sentencepiece"]), name)


_FOLDERS: dict[str, str] = {}
FAMILIES = {"byte-level": byte_level, "sentencepiece": sentencepiece}


def _with_template(tokenizer: Any, name: str) -> PreTrainedTokenizerBase:
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    written = sorted({*SPECIAL.findall(source), "<s>", "</s>", "<|im_end|>"})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": written})
    if name.startswith("deepseek"):
        tokenizer.eos_token = "<｜end▁of▁sentence｜>"
    if name.startswith("llama3"):
        tokenizer.eos_token = "<|eot_id|>"
    tokenizer.chat_template = source
    return tokenizer  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def tokenizer_folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("sentencepiece")
    train_llama_sentencepiece(
        ["The quick brown fox says: hello, user! I am an assistant.\nOne two three."] * 50
        + ["".join(chr(i) for i in range(32, 127)) * 3],
        str(folder / "tokenizer"),
        vocab_size=400,
    )
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    _FOLDERS.update({"byte-level": str(tokenizer_folder), "sentencepiece": str(folder)})


def run(tokenizer: PreTrainedTokenizerBase, *messages: list[dict[str, Any]], **options: Any) -> Finished:
    settings = {"max_length": 100_000, "overlong": "truncate", **options}
    preprocessor = Preprocessor(tokenizer, "auto", **settings)
    records = [(i, RawRecord(Source("f", i + 1), {"messages": turns})) for i, turns in enumerate(messages)]
    return preprocessor(records)


def learnt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each run of learnt tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (IGNORE_INDEX, token)
        if label != IGNORE_INDEX:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [str(tokenizer.decode(run, skip_special_tokens=False)) for run in runs if run]


def is_said(decoded: str, content: str, end: str) -> bool:
    """Whether it is the content and the end, but for blanks at the content's edges, which templates trim.

    Around the tag that ends a thought, templates lay the text out anew, in blanks only.
    """
    if decoded.endswith(end.replace("▁", " ")):  # as a SentencePiece decoder writes it
        end = end.replace("▁", " ")
    written = decoded[: len(decoded) - len(end)]
    if "</think>" in content:
        written, content = "".join(written.split()), "".join(content.split())
    return decoded.endswith(end) and written.strip() == content.strip()


def chat(turns: Sequence[tuple[str, str]], system: str | None = None) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answered in turns:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", list(ENDS))
class TestEveryTemplate:
    """Each template with each family of tokenizers."""

    @given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=3), system=st.none() | answers)
    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    def test_learnt_text_is_what_the_assistant_says(
        self, name: str, family: str, turns: list[tuple[str, str]], system: str | None
    ) -> None:
        tokenizer = FAMILIES[family](name)
        done = run(tokenizer, chat(turns, system))
        rows = done.rows.to_pylist()
        assert done.read == 1 == len(done.rejections) + len({row["record"] for row in rows})
        if done.rejections:
            assert not rows
            return
        said = [text for row in rows for text in learnt(row, tokenizer)]
        assert len(said) == len(turns)
        for _, answer in turns:  # rows follow each other by their last answers, so the order may differ
            said.remove(next(text for text in said if is_said(text, answer, ENDS[name])))

    @given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=3), guess=st.sampled_from([1, 5]))
    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    def test_beginning_has_the_tokens_that_it_has_in_the_whole(
        self, name: str, family: str, turns: list[tuple[str, str]], guess: int
    ) -> None:
        """Of a text that will be cut only the beginning is tokenised; the rows are those of the whole text."""
        tokenizer = FAMILIES[family](name)
        long = [(asked, f"{answer} {i} and so on " * 4) for i, (asked, answer) in enumerate([*turns, *turns])]
        rows, tokenised = [], []
        for cut in (True, False):
            preprocessor = Preprocessor(tokenizer, "auto", max_length=90, overlong="truncate")
            if not cut:
                preprocessor.encoder.edges = ()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastchat_qlora.data.tokenization.CHARACTERS_PER_TOKEN", guess)
                batch = preprocessor.prepare([(0, RawRecord(Source("f", 1), {"messages": chat(long)}))])
                encoded = preprocessor.encode(batch)
                done = preprocessor.finish(batch, encoded)
            columns = ("input_ids", "labels", "length", "supervised", "turns")
            rows.append([{column: row[column] for column in columns} for row in done.rows.to_pylist()])
            tokenised.append([part.share for part in encoded])
        if rows[1]:  # what cannot be learnt exactly may stand only in the end that is cut off
            assert rows[0] == rows[1]
        assert all(share == 1 for share in tokenised[1])
        characters = sum(len(text) for turn in long for text in turn)
        if rows[0] and len(tokenised[0]) == 1 and characters > 3 * 90 * 5:
            assert tokenised[0][0] < 1

    def test_plain_conversations_are_accepted(self, name: str, family: str) -> None:
        """So that the property above is not one of rejections only."""
        tokenizer = FAMILIES[family](name)
        turns = [("Count, please!", "One, two."), ("And then?", "Three 🙂\n\nfour"), ("Thanks", "  welcome")]
        done = run(tokenizer, chat(turns[:2]), chat(turns[:2], "Be brief."), chat(turns[1:2]))
        rejected = [rejection.source.line for rejection in done.rejections]
        assert rejected == ([2] if name in NO_SYSTEM else [])
        [said] = learnt(done.rows.to_pylist()[-1], tokenizer)
        assert is_said(said, "Three 🙂\n\nfour", ENDS[name])

    def test_rows_are_what_a_server_shows(self, name: str, family: str) -> None:
        """Up to each answer, the ids are those of the prompt that a server would make of the messages before it."""
        tokenizer = FAMILIES[family](name)
        messages = chat([("Count, please!", "One, two."), ("And then?", "Three.")])
        rows = run(tokenizer, messages).rows.to_pylist()
        assert (len(rows) > 1) == (name in REWRITES)
        prompts = []
        for i in (1, 3):
            text = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            if name.startswith(OPENS_THOUGHT):
                text = text.removesuffix("<think>\n")
            prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
        for prompt, row in zip(prompts, rows if len(rows) > 1 else rows * 2, strict=True):
            assert row["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("name", sorted(name for name in ENDS if f"{name}_training" in ENDS and name not in REWRITES))
def test_generation_markers_change_nothing(name: str, tokenizer_folder: Path) -> None:
    """Where the twin with markers writes the same text, it gives the same rows."""
    turns = [("Count, please!", "One, two."), ("And then?", "Three.")]
    plain, marked = byte_level(name), byte_level(f"{name}_training")
    texts = [tokenizer.apply_chat_template(chat(turns), tokenize=False) for tokenizer in (plain, marked)]
    if texts[0] != texts[1]:
        pytest.skip("the twin writes another text")
    rows = [
        [learnt(row, tokenizer) for row in run(tokenizer, chat(turns)).rows.to_pylist()]
        for tokenizer in (plain, marked)
    ]
    assert rows[0] == rows[1]
