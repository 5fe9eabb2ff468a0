"""Python's search for reference cycles, made rare.

A full search walks through every object: with thousands of streams open it holds up every request
for a good part of a second. What ends leaves no cycles, so there is next to nothing to be found.
"""

from __future__ import annotations

import gc

NEW = 20_000
"""So many more objects than before begin a search among the new ones."""
MIDDLE, FULL = 10, 100
"""So many searches of one age begin one of the next."""


def make_rare() -> None:
    """Leave out what is there now, which stays, and search seldom. Called once all is loaded."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(NEW, MIDDLE, FULL)
