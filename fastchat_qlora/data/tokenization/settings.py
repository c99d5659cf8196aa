"""Settings that decide how records become sequences; part of the cache's key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EmptyThoughts = Literal["mask", "train", "prompt"]
ContentTokens = Literal["reject", "allow"]


@dataclass(frozen=True)
class PreprocessingSettings:
    """Values of the data flags of the same names; `max_length` is --model_max_length."""

    conv_template: str
    max_length: int
    overlong: str
    train_on: str = "assistant"
    lazy: bool = False  # keep texts in place of tokens
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of the run; a record's own come first
    empty_thoughts: EmptyThoughts = "mask"
    content_tokens: ContentTokens = "reject"
    columns: Mapping[str, str] = field(default_factory=dict)
    system_prompt: str = ""
    date: str = ""  # --chat_template_date, if the template reads the clock
