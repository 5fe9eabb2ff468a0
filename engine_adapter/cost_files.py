"""Cost models as files: one for each engine set-up, in a folder, under a name that says which."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import msgspec

from engine_adapter.scheduling.cost import CostModel, Setup


class BadCostModel(ValueError):
    """A file that can't be read, is no cost model, or is one of another model."""


def file_name(setup: Setup) -> str:
    """`<model>--<hardware>--<settings>.json`, in lower case and safe for every file system."""
    return "--".join(map(_slug, (setup.model, setup.hardware, setup.settings))) + ".json"


def _slug(text: str) -> str:
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-") or "unknown"


def save(cost: CostModel, folder: Path) -> Path:
    """Write a cost model under its name; a reader finds the old file or the new one, whole.

    Returns the path of the file. The folder is made if it is not there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(cost.setup)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        file.write(msgspec.json.format(msgspec.json.encode(cost), indent=2) + b"\n")
    unfinished = Path(file.name)
    unfinished.chmod(0o644)
    unfinished.rename(path)
    return path


def read(path: Path) -> CostModel:
    """The cost model in a file.

    Raises:
        BadCostModel: it can't be read or is none.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=CostModel)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as e:
        raise BadCostModel(f"no cost model in {path}: {e}") from e


def find(place: Path, setup: Setup) -> CostModel | None:
    """The cost model for a set-up.

    Args:
        place: a file, or a folder where it has the name of the set-up.

    Returns:
        None if `place` is a folder without one for this set-up.

    Raises:
        BadCostModel: the file can't be read, or is of another model.
    """
    if place.is_dir():
        place = place / file_name(setup)
        if not place.exists():
            return None
    cost = read(place)
    if cost.setup.model != setup.model:
        raise BadCostModel(
            f"the cost model in {place} is of {cost.setup.model!r}, "
            f"this engine serves {setup.model!r}"
        )
    return cost
