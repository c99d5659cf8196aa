"""Real chat templates x both families of tokenizers x any text: only the assistant's text is supervised, or nothing.

The templates are those that TRL has: stock templates of the common model families, and their twins with `{% generation
%}` markers. The expected text is computed here from the conversation alone; the package gives only the sequences.
"""

import random
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_templates import ENDS, FAMILIES, byte_level, chat, make_folders, run, supervised_texts

from fastchat_qlora.data.sources.readers import RawRecord, Source
from fastchat_qlora.data.tokenization.preprocess import Preprocessor
from fastchat_qlora.data.tokenization.settings import PreprocessingSettings

NO_SYSTEM = {"gemma", "gemma_training"}
OPENS_THOUGHT = ("deepseek", "nemotron")  # their prompt ends with <think>, which earlier answers do not have
REWRITES = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "gptoss", "gptoss_training"}
HEADER = re.compile(r"<\|channel\|> ?final<\|message\|>")  # of gpt-oss, which the model writes itself

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


@pytest.fixture(scope="module", autouse=True)
def tokenizer_folders(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    make_folders(tokenizer_folder, tmp_path_factory.mktemp("sentencepiece"))


def equals_answer(decoded: str, content: str, end: str) -> bool:
    """Return whether a text is the content and the end, apart from blanks at the content's edges, which templates trim.

    Around the tag that ends reasoning, templates change blanks only.
    """
    if decoded.endswith(end.replace("▁", " ")):  # as a SentencePiece decoder writes it
        end = end.replace("▁", " ")
    written = HEADER.sub("", decoded[: len(decoded) - len(end)], count=1)
    if "</think>" in content:
        written, content = "".join(written.split()), "".join(content.split())
    return decoded.endswith(end) and written.strip() == content.strip()


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("name", list(ENDS))
class TestEveryTemplate:
    """Each template with each family of tokenizers."""

    @given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=3), system=st.none() | answers)
    @settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
    def test_supervised_text_equals_the_answers(
        self, name: str, family: str, turns: list[tuple[str, str]], system: str | None
    ) -> None:
        tokenizer = FAMILIES[family](name)
        done = run(tokenizer, chat(turns, system))
        rows = done.sequences.to_pylist()
        assert done.read == 1 == len(done.rejections) + len({row["record"] for row in rows})
        if done.rejections:
            assert not rows
            return
        said = [text for row in rows for text in supervised_texts(row, tokenizer)]
        assert len(said) == len(turns)
        for _, answer in turns:  # sequences are ordered by their last answers, so the order may differ
            said.remove(next(text for text in said if equals_answer(text, answer, ENDS[name])))

    @given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=3), guess=st.sampled_from([1, 5]))
    @settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
    def test_beginning_has_the_tokens_of_the_whole_text(
        self, name: str, family: str, turns: list[tuple[str, str]], guess: int
    ) -> None:
        """Only the beginning of a text that will be cut is tokenized; its sequences equal those of the whole text."""
        tokenizer = FAMILIES[family](name)
        long = [(asked, f"{answer} {i} and so on " * 4) for i, (asked, answer) in enumerate([*turns, *turns])]
        rows, shares = [], []
        for cut in (True, False):
            preprocessor = Preprocessor(tokenizer, PreprocessingSettings("auto", max_length=90, overlong="truncate"))
            if not cut:
                preprocessor.encoder.safe_cuts = ()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("fastchat_qlora.data.tokenization.labels.MAX_CHARACTERS_PER_TOKEN", guess)
                batch = preprocessor.prepare([(0, RawRecord(Source("f", 1), {"messages": chat(long)}))])
                encoded = preprocessor.encode(batch)
                done = preprocessor.finish(batch, encoded)
            columns = ("input_ids", "labels", "length", "supervised", "turns")
            rows.append([{column: row[column] for column in columns} for row in done.sequences.to_pylist()])
            shares.append([part.share for part in encoded])
        if rows[1]:  # only the end that is cut off may hold what cannot be supervised exactly
            assert rows[0] == rows[1]
        assert all(share == 1 for share in shares[1])
        characters = sum(len(text) for turn in long for text in turn)
        if rows[0] and len(shares[0]) == 1 and characters > 3 * 90 * 5:
            assert shares[0][0] < 1

    def test_plain_conversations_are_accepted(self, name: str, family: str) -> None:
        """Otherwise the property above would hold for rejections only."""
        tokenizer = FAMILIES[family](name)
        turns = [("Count, please!", "One, two."), ("And then?", "Three 🙂\n\nfour"), ("Thanks", "  welcome")]
        done = run(tokenizer, chat(turns[:2]), chat(turns[:2], "Be brief."), chat(turns[1:2]))
        rejected = [rejection.source.line for rejection in done.rejections]
        assert rejected == ([2] if name in NO_SYSTEM else [])
        [said] = supervised_texts(done.sequences.to_pylist()[-1], tokenizer)
        assert equals_answer(said, "Three 🙂\n\nfour", ENDS[name])

    def test_odd_contents_are_rarely_rejected(self, name: str, family: str) -> None:
        """Odd contents are accepted, but "▁" is a blank in tokens, and templates cut off incomplete reasoning."""
        chance = random.Random(0)
        pieces = [text for text in AWKWARD if text not in ("▁", "</think>")] + ["Some ", "words, ", "and ", "others "]
        turns = [["".join(chance.sample(pieces, 4)) + "." for _ in range(4)] for _ in range(60)]
        done = run(FAMILIES[family](name), *(chat([(a, b), (c, d)]) for a, b, c, d in turns))
        assert done.read == 60
        assert len(done.rejections) <= 12, [rejection.reason for rejection in done.rejections]

    def test_sequences_begin_with_the_prompts_of_a_server(self, name: str, family: str) -> None:
        """Up to each answer, the ids equal the prompt of a server for the messages before it."""
        tokenizer = FAMILIES[family](name)
        messages = chat([("Count, please!", "One, two."), ("And then?", "Three.")])
        rows = run(tokenizer, messages).sequences.to_pylist()
        assert (len(rows) > 1) == (name in REWRITES or name.startswith(OPENS_THOUGHT))
        prompts = []
        for i in (1, 3):
            text = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
            prompts.append(tokenizer(text, add_special_tokens=False).input_ids)
        for prompt, row in zip(prompts, rows if len(rows) > 1 else rows * 2, strict=True):
            assert row["input_ids"][: len(prompt)] == prompt


@pytest.mark.parametrize("name", sorted(name for name in ENDS if f"{name}_training" in ENDS and name not in REWRITES))
def test_generation_markers_change_nothing(name: str, tokenizer_folder: Path) -> None:
    """If the twin with markers renders the same text, it gives the same sequences."""
    turns = [("Count, please!", "One, two."), ("And then?", "Three.")]
    plain, marked = byte_level(name), byte_level(f"{name}_training")
    texts = [tokenizer.apply_chat_template(chat(turns), tokenize=False) for tokenizer in (plain, marked)]
    if texts[0] != texts[1]:
        pytest.skip("the twin writes another text")
    rows = [
        [supervised_texts(row, tokenizer) for row in run(tokenizer, chat(turns)).sequences.to_pylist()]
        for tokenizer in (plain, marked)
    ]
    assert rows[0] == rows[1]
