"""What retrievers have in common that answer once, with all they have."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Sequence

from retrieval.deadlines import DeadlinePassed, in_time
from retrieval.source import Passage, Query, Ranked, SourceFailed


async def ranked_once(
    query: Query, found: Awaitable[Sequence[Passage]]
) -> AsyncGenerator[Ranked, None]:
    """One ranking, or none if it is not there by the deadline.

    Raises:
        SourceFailed: whatever went wrong.
    """
    try:
        passages = await in_time(query, found)
    except DeadlinePassed:
        return
    except Exception as exc:  # other people's code: there is no list of what it raises
        raise SourceFailed(f"{type(exc).__name__}: {exc}") from exc
    yield Ranked(tuple(passages))


def passage_id(named: str | None, text: str) -> str:
    """The id that a document has, else one of its text, so that it is the same next time."""
    return str(named) if named else hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
