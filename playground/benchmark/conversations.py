"""Conversations for benchmarks: as long as people's, of words that tokenize as English does.

Only the standard library is imported at the top: contestants import this in environments of their own.
"""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DUMMY_DATA = Path(__file__).resolve().parents[2] / "data" / "dummy_conversation.json"
SEED = 20
SHORTEST_RUN, LONGEST_RUN = 5, 60  # words copied at once, which keeps the spacing and phrases of prose

# Lengths are drawn in tokens and written in words; this number converts between them. With it the SmolLM2 tokenizer
# makes about 1,440 tokens of a ShareGPT-like conversation, template included. The tokenizer makes fewer tokens of a
# word: by the means below a conversation would be a tenth longer.
TOKENS_PER_WORD = 1.92


class Shape(NamedTuple):
    """Lengths of the conversations of a data set.

    Attributes:
        mean_exchanges: mean of a geometric distribution of questions with their answers.
        most_exchanges: maximum in a conversation.
        user_tokens: mean of a log-normal distribution of a message's tokens.
        user_sigma: its sigma.
        assistant_tokens: the same for answers.
        assistant_sigma: its sigma.
    """

    mean_exchanges: float
    most_exchanges: int
    user_tokens: float
    user_sigma: float
    assistant_tokens: float
    assistant_sigma: float


SHAPES = {
    # WildChat's paper counts 3.51 exchanges of 94.46 and 348.45 tokens; ShareGPT's conversations are similar.
    "sharegpt": Shape(3.51, 60, 94.46, 1.3, 348.45, 0.85),
    # One question and one answer: 189 tokens with SmolLM2's template (31 of them its own), 68 % of them the answer's.
    "alpaca": Shape(1, 1, 34.5, 0.8, 145.5, 0.8),
}


def collect_words() -> list[str]:
    """Return words of English with the punctuation and the white space that follow them.

    They come from the example conversations, from Python's license and from the docstrings of its standard library.
    Words with a "<" are omitted: a tool or tokenizer may give "<image>" or "</s>" a special meaning.
    """
    records = json.loads(DUMMY_DATA.read_text(encoding="utf-8"))
    texts = [message["value"] for record in records for message in record["conversations"]]
    library = Path(sysconfig.get_paths()["stdlib"])
    texts += [path.read_text(encoding="utf-8") for path in [library / "LICENSE.txt"] if path.is_file()]
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if path.parent.name not in {"test", "idlelib", "site-packages", "dist-packages", "lib2to3"}:
            texts += read_docstrings(path)
    pieces = re.findall(r"\S+\s*", "\n\n".join([*texts, ""]))
    return [piece for piece in pieces if "<" not in piece]


def read_docstrings(path: Path) -> list[str]:
    """Return the docstrings of a Python file; none if it cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text]


class Writer:
    """A writer of prose that copies runs of words from English texts.

    Attributes:
        random: the generator that everything is drawn from.
    """

    def __init__(self, seed: int) -> None:
        import numpy as np

        self.random = np.random.default_rng(seed)
        self._words = collect_words()

    def write(self, count: int) -> str:
        """Return that many words."""
        pieces: list[str] = []
        while len(pieces) < count:
            run = min(count - len(pieces), int(self.random.integers(SHORTEST_RUN, LONGEST_RUN + 1)))
            start = int(self.random.integers(0, len(self._words) - run))
            pieces += self._words[start : start + run]
        return "".join(pieces).strip()


def draw_conversations(count: int, shape: Shape, seed: int = SEED) -> list[dict[str, Any]]:
    """Return that many ShareGPT records; the same arguments, Python and words give the same text."""
    import numpy as np

    writer = Writer(seed)

    def write(mean: float, sigma: float) -> str:
        # The mean of a log-normal distribution is exp(mu + sigma^2 / 2).
        tokens = writer.random.lognormal(np.log(mean) - sigma**2 / 2, sigma)
        return writer.write(max(1, round(tokens / TOKENS_PER_WORD)))

    def talk() -> list[dict[str, str]]:
        turns = []
        for _ in range(min(shape.most_exchanges, int(writer.random.geometric(1 / shape.mean_exchanges)))):
            turns.append({"from": "human", "value": write(shape.user_tokens, shape.user_sigma)})
            turns.append({"from": "gpt", "value": write(shape.assistant_tokens, shape.assistant_sigma)})
        return turns

    return [{"id": f"talk_{i}", "conversations": talk()} for i in range(count)]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSON array with one record per line."""
    with path.open("w", encoding="utf-8") as file:
        for i, record in enumerate(records):
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")


def make_data(path: Path, conversations: int, seed: int = SEED) -> None:
    """Write a file of ShareGPT-like conversations."""
    write_records(path, draw_conversations(conversations, SHAPES["sharegpt"], seed))


def count_words(record: dict[str, Any]) -> int:
    """Return the number of words of a conversation."""
    return sum(len(turn["value"].split()) for turn in record["conversations"])


def has_something_to_learn(record: dict[str, Any], max_length: int) -> bool:
    """Return whether an answer surely begins within that many tokens, by the words of the first question.

    This program rejects a conversation without a supervised token, and others train on it without effect, so the data
    would not be the same for all.
    """
    return len(record["conversations"][0]["value"].split()) * 1.5 * TOKENS_PER_WORD < max_length


def cut_to_fit(record: dict[str, Any], limit: int, count: Callable[[list[dict[str, str]]], int]) -> dict[str, Any]:
    """Cut a conversation to the exchanges that fit, but keep the first one, and cut its answer if necessary.

    Otherwise every contestant would shorten it in its own way, and supervise another number of tokens.

    Args:
        record: a ShareGPT record whose first question fits.
        limit: maximum of tokens.
        count: returns the tokens of a conversation.
    """
    turns = record["conversations"]
    while len(turns) > 2 and count(turns) > limit:
        turns = turns[:-2]
    question, answer = turns[0], turns[1]
    words = answer["value"].split()
    while len(turns) == 2 and len(words) > 1 and count([question, answer]) > limit:
        words = words[: -max(1, len(words) // 50)]
        answer = answer | {"value": " ".join(words)}
    return record | {"conversations": [question, answer, *turns[2:]]}


def pick_typical(
    records: Sequence[dict[str, Any]], groups: int, size: int, length: Callable[[dict[str, Any]], float], seed: int
) -> list[dict[str, Any]]:
    """Pick groups of records, each with the same distribution of lengths as all records.

    Sorted by length, the records at evenly spaced ranks form a group, which is shuffled. A run that takes one group per
    step can be short: none of its steps has too many short or too many long conversations.

    Args:
        records: more than are picked.
        groups: number of groups, which follow each other in the result.
        size: records of a group.
        length: returns the length of a record, in any unit.
        seed: of the shuffling.

    Raises:
        ValueError: there are too few records.
    """
    import numpy as np

    if groups * size > len(records):
        raise ValueError(f"{groups} x {size} records cannot be picked from {len(records)}")
    random = np.random.default_rng(seed)
    left = sorted(records, key=length)
    picked: list[dict[str, Any]] = []
    for _ in range(groups):
        ranks = {int((i + 0.5) * len(left) / size) for i in range(size)}
        picked += [left[rank] for rank in random.permutation(sorted(ranks))]
        left = [record for rank, record in enumerate(left) if rank not in ranks]
    return picked
