"""Python's search for reference cycles: often among few objects, and seldom among all.

A search holds up every request, among the objects of thousands of streams for a good part of a
second. What ends leaves no cycles, so there is next to nothing to be found; what there is came into
being a moment ago, mostly with an exception.
"""

from __future__ import annotations

import gc

NEW = 1_000
"""So many more objects than before begin a search among the new ones: a few milliseconds."""
NEVER = 1 << 30
EVERY_S = 600.0
"""Between searches among all objects."""


def make_rare() -> None:
    """Leave out what is there now, which stays, and search among old objects only when told to.
    Called once all is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW, NEVER, NEVER)


async def search_all() -> None:
    """For cycles that have outlived a search among new objects."""
    gc.collect()
