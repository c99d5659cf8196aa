"""Names of roles and fields in published data sets."""

from fastchat_qlora.data.conversation import REASONING_FIELDS, Role

CALL_ROLES = ("function_call", "tool_call")  # whose text is the call, as JSON
ROLE_NAMES: dict[Role, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "model", "chatgpt", "bot", *CALL_ROLES),
    "tool": ("tool", "function", "observation", "tool_response", "ipython"),
}
"""Role -> its names."""

ROLES = {name: role for role, names in ROLE_NAMES.items() for name in names}
TEXT_ROLES = {name: role for name, role in ROLES.items() if name not in CALL_ROLES}

ID_FIELDS = ("id", "conversation_id", "prompt_id")
TURN_FIELDS = ("messages", "conversations", "conversation")
SYSTEM_FIELDS = ("system", "system_prompt")
TOOL_FIELDS = ("tools", "functions")
CONTENT_FIELDS = ("content", "value", "text")
WEIGHT_FIELDS = ("loss", "loss_weight", "train", "weight")
MASK_FIELD = "masked"
KWARGS_FIELD = "chat_template_kwargs"
HISTORY_FIELD = "history"

ANSWER_FIELDS: dict[str, tuple[str, ...]] = {
    "human": ("assistant", "gpt", "bot"),
    "user": ("assistant", "bot"),
    "prompt": ("completion", "response", "output", "answer"),
    "instruction": ("output", "response", "completion", "answer"),
    "question": ("answer", "response", "output"),
    "query": ("response", "answer", "output"),
    "problem": ("solution",),
    "input": ("output", "response", "answer"),
}
"""Field of a question -> fields of its answer."""

BELOW_QUESTION = ("input", "context")  # fields whose text stands below the question

MEDIA_FIELDS = ("images", "audios", "videos", "image", "audio", "video")
PREFERENCE_FIELDS = ("chosen", "rejected", "rejected_response", "rejected_messages")
LABEL_FIELDS = ("label", "kto_tag", "train", "loss")  # false where the answer is a bad one, or none to learn

UNFIT_FIELDS = frozenset((*MEDIA_FIELDS, *PREFERENCE_FIELDS, *LABEL_FIELDS))
"""Fields of data on which a run cannot train."""

PAIR_FIELDS = {*ANSWER_FIELDS, *(name for names in ANSWER_FIELDS.values() for name in names)}
CONVERSATION_FIELDS = {*TURN_FIELDS, *PAIR_FIELDS, *BELOW_QUESTION, HISTORY_FIELD, *REASONING_FIELDS}
"""Fields whose values are messages or parts of them."""

FIELDS = frozenset(
    (*ID_FIELDS, *CONVERSATION_FIELDS, *SYSTEM_FIELDS, *TOOL_FIELDS, KWARGS_FIELD, *UNFIT_FIELDS),
)
"""Fields of a record that are looked at; all others need not be read."""
