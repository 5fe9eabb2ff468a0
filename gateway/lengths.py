"""How long a prompt may be."""

from __future__ import annotations

from gateway.errors import ContextTooLong
from gateway.prompt import Prompt


def check_length(
    prompt: Prompt,
    answer_tokens: int,
    *,
    max_model_len: int | None,
    max_context_tokens: int | None,
    param: str,
) -> None:
    """Refuse a prompt that is longer than its tenant or its model takes.

    Args:
        answer_tokens: for which there must be room behind it.
        max_model_len, max_context_tokens: of prompt and answer, and of the documents; None: any.
        param: what the client sent.

    Raises:
        ContextTooLong
    """
    if max_context_tokens is not None and prompt.context_tokens > max_context_tokens:
        raise ContextTooLong(
            f"the documents would have {prompt.context_tokens} tokens, but one stream may have "
            f"{max_context_tokens}",
            param=param,
        )
    if max_model_len is not None and prompt.length + answer_tokens > max_model_len:
        raise ContextTooLong(
            f"the prompt would have {prompt.length} tokens and the answer up to {answer_tokens}, "
            f"but the model takes {max_model_len}",
            param=param,
        )
