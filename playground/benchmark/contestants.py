"""The contestants of run.py, and the data that they train on. Only the standard library is imported."""

from __future__ import annotations

from typing import Any, NamedTuple


class Contestant(NamedTuple):
    """One line of the report.

    Attributes:
        title: its name there.
        environment: name of the environment whose interpreter runs it.
        settings: description of the run for a reader.
        at_once: sequences that are computed at once; None is all of an optimizer step.
        options: its own settings.
        packed: whether it packs several conversations into sequences of the maximal length.
        as_cut: whether it takes as many passes a step as this program took in the round.
        is_warm: whether steps before the timed ones warm it up.
        busy: processes beside it that keep a core busy each.
        rate: positions that it computes in a second, roughly; for the estimate of the time.
    """

    title: str
    environment: str
    settings: str
    at_once: int | None = 1
    options: dict[str, Any] = {}  # noqa: RUF012  # never changed
    packed: bool = False
    as_cut: bool = False
    is_warm: bool = True
    busy: int = 0
    rate: int = 350

    @property
    def is_ours(self) -> bool:
        """Whether it is this program as it is now."""
        return self.environment == "ours"


TRL_SETTINGS = "SFTTrainer, assistant_only_loss, SmolLM2's template with generation markers added by hand"
FACTORY_SETTINGS = "its train command, template chatml with SmolLM2's system message"
FACTORY_THOUGHTS = {"template": "qwen3", "default_system": None}
PACKED = {"packing": True, "train_sampling_strategy": "random"}

CONTESTANTS = {
    "ours": Contestant("this program", "ours", "defaults", None, rate=800),
    "ours_packed": Contestant("this program, packed", "ours", "--packing True", None, PACKED, packed=True, rate=800),
    "ours_off": Contestant(
        "this program, one conversation at a time",
        "ours",
        "--micro_batch_tokens off --per_device_train_batch_size 1",
        1,
        {"micro_batch_tokens": "off"},
        rate=650,
    ),
    "ours_busy": Contestant("this program, beside a busy process", "ours", "defaults", None, busy=1, rate=400),
    "before": Contestant("before, one at a time", "before", "one sequence at a time", rate=650),
    "before_four": Contestant("before, four at once", "before", "four sequences at once", 4, rate=750),
    "before_cut": Contestant(
        "before, the same cut", "before", "as many passes a step as this program", None, as_cut=True, rate=750
    ),
    "before_whole": Contestant(
        "before, one pass",
        "before",
        "all sequences of an optimizer step at once; one step without a warm-up, for its memory",
        None,
        is_warm=False,
        rate=700,
    ),
    "before_busy": Contestant(
        "before, beside a busy process", "before", "all sequences of an optimizer step at once", None, busy=1, rate=30
    ),
    "fastchat": Contestant(
        "FastChat",
        "fastchat",
        "train_lora.py, its published flags (per_device_train_batch_size 2) but for what is equal for all; pads every "
        "sequence to the maximal length; its tokenizer changed to count as Llama's, for which its masks are written",
        2,
    ),
    "trl": Contestant(
        "TRL, best flags",
        "trl",
        f"{TRL_SETTINGS}; one sequence at a time, so nothing is padded and no mask is built",
        rate=300,
    ),
    "trl_packed": Contestant("TRL, packed", "trl", TRL_SETTINGS, options=PACKED, packed=True),
    "trl_default": Contestant("TRL, defaults", "trl", f"{TRL_SETTINGS}; at most 8 sequences at a time", 8),
    "trl_busy": Contestant(
        "TRL, beside a busy process", "trl", f"{TRL_SETTINGS}; one sequence at a time", busy=1, rate=45
    ),
    "trl_thoughts": Contestant(
        "TRL, its own sequences",
        "trl",
        f"{TRL_SETTINGS.replace('SmolLM2', 'the model')}; one sequence of a conversation, in which the template leaves "
        "the last thought only",
        rate=300,
    ),
    "llamafactory": Contestant(
        "LLaMA-Factory, best flags", "llamafactory", f"{FACTORY_SETTINGS}; one sequence at a time", rate=400
    ),
    "llamafactory_packed": Contestant(
        "LLaMA-Factory, packed",
        "llamafactory",
        FACTORY_SETTINGS,
        options={"neat_packing": True, "disable_shuffling": False},
        packed=True,
    ),
    "llamafactory_default": Contestant(
        "LLaMA-Factory, defaults",
        "llamafactory",
        f"{FACTORY_SETTINGS}; one sequence at a time, as in its example for LoRA",
    ),
    "llamafactory_thoughts": Contestant(
        "LLaMA-Factory, its own sequences",
        "llamafactory",
        "its train command, template qwen3; one sequence of a conversation, which keeps all thoughts",
        options=FACTORY_THOUGHTS,
        rate=350,
    ),
}


class DataSet(NamedTuple):
    """Data, an optimizer step on it, and who trains on it.

    Attributes:
        source: name of the conversations, which several data sets may share.
        conversations: of a step.
        steps: number of timed steps.
        contestants: that run in every round, where the command line names none.
        once: those that run in the first round only.
        sequences: that the chat template makes of a conversation, for a program that counts sequences.
        packed_rows: packed sequences of the maximal length that hold as many conversations on average.
        max_length: maximum of tokens of a sequence.
        processes: ranks.
        is_even: whether its sequences are so alike that a part of a step has the speed of a whole one.
        positions: of a step, roughly; for the estimate of the time.
    """

    source: str
    conversations: int
    steps: int
    contestants: tuple[str, ...]
    once: tuple[str, ...] = ()
    sequences: int = 1
    packed_rows: int = 0
    max_length: int = 1024
    processes: int = 1
    is_even: bool = False
    positions: int = 0


BEFORE = ("ours", "before", "before_four")
DATA = {
    "sharegpt": DataSet(
        "sharegpt",
        conversations=4,
        steps=4,
        contestants=("ours", "before_cut", "llamafactory"),
        once=("ours_packed", "before", "fastchat", "trl"),
        packed_rows=3,
        positions=2_350,
    ),
    "alpaca": DataSet(
        "alpaca",
        conversations=16,
        steps=4,
        contestants=("ours", "before_cut", "llamafactory", "trl"),
        once=("ours_packed", "before_four"),
        packed_rows=3,
        positions=2_930,
    ),
    "sharegpt_two": DataSet(
        "sharegpt",
        conversations=2,
        steps=6,
        contestants=("ours", "ours_busy", "before_cut", "fastchat", "trl"),
        once=("before_busy", "trl_busy"),
        positions=1_180,
    ),
    "alpaca_four": DataSet(
        "alpaca", conversations=4, steps=6, contestants=("ours", "fastchat"), once=("before_four",), positions=730
    ),
    "sharegpt_ranks": DataSet("sharegpt", conversations=16, steps=2, contestants=BEFORE, processes=2, positions=9_400),
    "agent": DataSet(
        "agent",
        conversations=16,
        steps=3,
        contestants=(*BEFORE, "llamafactory"),
        once=("before_whole", "trl"),
        max_length=2048,
        is_even=True,
        positions=28_000,
    ),
    "thinking": DataSet(
        "thinking",
        conversations=1,
        steps=2,
        contestants=BEFORE,
        once=("before_whole", "trl_thoughts", "llamafactory_thoughts"),
        sequences=12,
        max_length=8192,
        positions=15_000,
    ),
    "answers": DataSet(
        "answers",
        conversations=16,
        steps=3,
        contestants=BEFORE,
        once=("before_whole", "trl", "llamafactory"),
        is_even=True,
        positions=11_400,
    ),
}
