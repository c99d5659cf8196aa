"""What happens to a conversation longer than model_max_length."""

from fastchat_qlora.data.conversation import RejectedRecord
from fastchat_qlora.data.tokenization import IGNORE_INDEX, TokenizedConversation


def truncate(tokens: TokenizedConversation, max_length: int) -> TokenizedConversation:
    """Keep the beginning, up to the end of the last whole assistant turn that fits.

    If even the first turn is too long it is cut inside, and then it has no end token: the model must not learn to stop
    where the record goes on.

    Args:
        tokens: one conversation.
        max_length: the most tokens to keep.

    Raises:
        RejectedRecord: nothing that the assistant says fits.
    """
    if len(tokens.input_ids) <= max_length:
        return tokens
    whole_turns = [end for end in tokens.turn_ends if end <= max_length]
    cut = whole_turns[-1] if whole_turns else max_length
    labels = tokens.labels[:cut]
    if all(label == IGNORE_INDEX for label in labels):
        raise RejectedRecord(f"nothing the assistant says stands within the first {max_length} tokens")
    return TokenizedConversation(tokens.input_ids[:cut], labels, whole_turns or [cut])
