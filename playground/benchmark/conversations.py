"""Conversations to measure with: as long as people's are, of words that a tokenizer takes as it takes English.

Nothing but the standard library up here: contestants import this in environments of their own.
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
SHORTEST_RUN, LONGEST_RUN = 5, 60  # words that are copied in one go, so that spacing and phrases stay those of prose

# Lengths are drawn in tokens and written in words, so one number turns the one into the other. It is set so that the
# SmolLM2 tokenizer makes about 1,440 tokens of a ShareGPT-like conversation, template included, which is somewhat more
# than it makes of a word: by the means below a conversation would be a tenth longer.
TOKENS_PER_WORD = 1.92


class Shape(NamedTuple):
    """How long the conversations of a data set are.

    Attributes:
        mean_exchanges: mean of a geometric distribution: questions with their answers.
        most_exchanges: no conversation has more.
        user_tokens: mean of a log-normal distribution, by message.
        user_sigma: its sigma.
        assistant_tokens: the same of the answers.
        assistant_sigma: its sigma.
    """

    mean_exchanges: float
    most_exchanges: int
    user_tokens: float
    user_sigma: float
    assistant_tokens: float
    assistant_sigma: float


SHAPES = {
    # WildChat's paper counts 3.51 exchanges of 94.46 and 348.45 tokens; ShareGPT's conversations are like them.
    "sharegpt": Shape(3.51, 60, 94.46, 1.3, 348.45, 0.85),
    # One question and one answer: 189 tokens with SmolLM2's template (31 of them its own), 68 % of them the answer's.
    "alpaca": Shape(1, 1, 34.5, 0.8, 145.5, 0.8),
}


def collect_words() -> list[str]:
    """Words with the punctuation and the white space that follow them, as real English has them.

    They come from the example conversations, from Python's licence and from the docstrings of its standard library.
    Words with a "<" are left out: some tool or tokenizer may take "<image>" or "</s>" for more than text.
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
    """The docstrings of a Python file; none if it cannot be parsed."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return [text for text in found if text]


def draw_conversations(count: int, shape: Shape, seed: int = SEED) -> list[dict[str, Any]]:
    """ShareGPT records; the same numbers, the same Python and the same words make the same text.

    Args:
        count: how many.
        shape: how long they are.
        seed: of the random numbers.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    words = collect_words()

    def write(mean: float, sigma: float) -> str:
        # The mean of a log-normal distribution is exp(mu + sigma^2 / 2).
        left = max(1, round(random.lognormal(np.log(mean) - sigma**2 / 2, sigma) / TOKENS_PER_WORD))
        pieces: list[str] = []
        while left > 0:
            run = min(left, int(random.integers(SHORTEST_RUN, LONGEST_RUN + 1)))
            start = int(random.integers(0, len(words) - run))
            pieces += words[start : start + run]
            left -= run
        return "".join(pieces).strip()

    def talk() -> list[dict[str, str]]:
        turns = []
        for _ in range(min(shape.most_exchanges, int(random.geometric(1 / shape.mean_exchanges)))):
            turns.append({"from": "human", "value": write(shape.user_tokens, shape.user_sigma)})
            turns.append({"from": "gpt", "value": write(shape.assistant_tokens, shape.assistant_sigma)})
        return turns

    return [{"id": f"talk_{i}", "conversations": talk()} for i in range(count)]


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Write a JSON array, a record a line."""
    with path.open("w", encoding="utf-8") as file:
        for i, record in enumerate(records):
            file.write(("[\n" if i == 0 else ",\n") + json.dumps(record, ensure_ascii=False))
        file.write("\n]\n")


def make_data(path: Path, conversations: int, seed: int = SEED) -> None:
    """Write a file of ShareGPT-like conversations."""
    write_records(path, draw_conversations(conversations, SHAPES["sharegpt"], seed))


def count_words(record: dict[str, Any]) -> int:
    """Words of a conversation."""
    return sum(len(turn["value"].split()) for turn in record["conversations"])


def has_something_to_learn(record: dict[str, Any], max_length: int) -> bool:
    """Whether an answer begins within so many tokens; taken from the words of the first question, to be safe.

    This program rejects a conversation without, others train on it in vain: so it would not be the same data for all.
    """
    return len(record["conversations"][0]["value"].split()) * 1.5 * TOKENS_PER_WORD < max_length


def cut_to_fit(record: dict[str, Any], limit: int, count: Callable[[list[dict[str, str]]], int]) -> dict[str, Any]:
    """The exchanges that fit, at least the first one, of whose answer as many words are kept as fit.

    Every contestant would shorten a longer conversation in its own way, and learn another number of tokens.

    Args:
        record: a ShareGPT record whose first question fits.
        limit: the most tokens.
        count: tokens of a conversation.
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
    """Groups of records, each with lengths that are spread as those of all.

    Sorted by length, the records at evenly spaced ranks are taken for a group, and shuffled. A run that takes a group
    at a step can be short: no step of it has too many short conversations or too many long ones.

    Args:
        records: all of them; more than are picked.
        groups: how many groups, one behind the other in the result.
        size: records of a group.
        length: of a record, in any unit.
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
