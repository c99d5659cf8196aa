#!/usr/bin/env bash
# Library   transformers 5.23.0 (apply_chat_template with return_assistant_tokens_mask), tokenizers 0.23.3
# Expected  assistant_masks marks the tokens of every answer that is in input_ids.
# Actual    Marking ends at the first answer whose first character belongs to no token; later answers stay unmarked.
#           Two valid setups reach that. With truncation_side="left" the first answer is cut off, and the last one,
#           kept whole, is unmarked. With a byte-level post-processor and trim_offsets=True, its default, a template
#           that puts a space first inside {% generation %} marks nothing.
# Affected  Training on assistant tokens only: such conversations have no loss, or only that of their first answers.
# Remedy    Decode the marked tokens before training. Truncate ids and mask yourself instead of on the left by the
#           tokenizer. Put the space before {% generation %}, or set trim_offsets=False.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -I -m pip install --quiet --no-compile --disable-pip-version-check \
    transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
export HF_HOME="$folder/cache" HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cd "$folder"

venv/bin/python -I - <<'PYTHON'
import sys
from importlib.metadata import version

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
ANSWER_ALONE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}U:{{ m.content }}{% endif %}{% endfor %}"
)
SPACE_INSIDE = ANSWER_ALONE.replace("{% generation %}", "{% generation %} ")
SPACE_BEFORE = ANSWER_ALONE.replace("{% generation %}", " {% generation %}")


def byte_tokenizer(trim_offsets):
    """Return a tokenizer with one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def marked(what, template, trim_offsets=False, **truncation):
    tokenizer = byte_tokenizer(trim_offsets)
    tokenizer.truncation_side = truncation.pop("side", "right")
    encoded = tokenizer.apply_chat_template(
        CHAT, chat_template=template, return_assistant_tokens_mask=True, return_dict=True, **truncation
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    chosen = tokenizer.decode([number for number, bit in zip(ids, mask, strict=True) if bit])
    print(f"{what}: {tokenizer.decode(ids)!r}, marked {chosen!r}")
    return chosen


print("transformers", version("transformers"), "and tokenizers", version("tokenizers"))
right = [
    marked("no truncation", ANSWER_ALONE),
    marked("right truncation", ANSWER_ALONE, truncation=True, max_length=20),
    marked("space inside, offsets not trimmed", SPACE_INSIDE),
    marked("space before, offsets trimmed", SPACE_BEFORE, trim_offsets=True),
]
wrong = [
    marked("left truncation", ANSWER_ALONE, truncation=True, max_length=15, side="left"),
    marked("space inside, offsets trimmed", SPACE_INSIDE, trim_offsets=True),
]
if right != ["First.Second.", "First.", " First. Second.", "First.Second."] or wrong != ["", ""]:
    sys.exit("The behavior is not the one described any more.")
print("As described: a whole answer is in the tokens, and none of it is marked.")
PYTHON
