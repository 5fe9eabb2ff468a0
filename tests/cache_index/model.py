"""What an index must do, as simply as it can be said; and sequences of operations on one.

Streams, engines and replicas are entries of one dictionary, each with the time at which it ends.
"""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import strategies as st

from cache_index.index import NAME_BYTES, Change, OutOfOrder, Splice, Stale, StreamRecord

STREAMS, HOLDERS, FAMILIES, ENGINES = ("s1", "s2"), ("g1", "g2"), ("f1", "f2"), ("e1", "e2")
NAMES = [bytes([n]) * NAME_BYTES for n in range(4)]


class Model:
    def __init__(self) -> None:
        self.now_s = 0
        self.entries: dict[tuple[str, ...], tuple[Any, int]] = {}

    def find(self, *key: str) -> Any:
        value, until_s = self.entries.get(key, (None, 0))
        return value if until_s > self.now_s else None

    def keep(self, value: Any, lease_s: int, *key: str) -> None:
        self.entries[key] = (value, self.now_s + lease_s)

    def epoch_and_version(self, stream: str) -> tuple[int, int]:
        record = self.find(stream)
        return (record["epoch"], record["version"]) if record else (-1, -1)

    def expected(self, family: str, engine: str) -> int:
        held = self.find(family, engine)
        return held["next"] if held else 0

    def instance(self, family: str, engine: str) -> str:
        held = self.find(family, engine)
        return held["instance"] if held else ""

    def get(self, stream: str) -> StreamRecord | None:
        record = self.find(stream)
        return StreamRecord(**record) if record else None

    def put(self, stream: str, record: StreamRecord, lease_s: int) -> None:
        if self.epoch_and_version(stream) >= (record.epoch, record.version):
            raise self.stale(stream)
        self.keep(msgspec.structs.asdict(record), lease_s, stream)

    def change(self, stream: str, epoch: int, version: int, change: Change, lease_s: int) -> None:
        if self.epoch_and_version(stream) != (epoch, version) or epoch < 0:
            raise self.stale(stream)
        record = self.find(stream) | {"version": version + 1}
        for field in ("engine", "state", "about"):
            if getattr(change, field) is not None:
                record[field] = getattr(change, field)
        for field in ("posts", "documents", "tail", "names"):
            splice = getattr(change, field)
            kept = list(record[field])[splice.drop :][: splice.keep]
            record[field] = bytes(kept) + splice.add
        self.keep(record, lease_s, stream)

    def claim(self, stream: str, epoch: int, holder: str, lease_s: int) -> StreamRecord:
        old_epoch, version = self.epoch_and_version(stream)
        if old_epoch != epoch or epoch < 0:
            raise self.stale(stream)
        news = {"epoch": epoch + 1, "version": version + 1, "holder": holder}
        self.keep(self.find(stream) | news, lease_s, stream)
        return StreamRecord(**self.find(stream))

    def delete(self, stream: str, epoch: int) -> None:
        if self.epoch_and_version(stream)[0] == epoch:
            self.entries.pop((stream,), None)

    def stale(self, stream: str) -> Stale:
        record = self.find(stream)
        return Stale(*self.epoch_and_version(stream), record["holder"] if record else "")

    def beat(self, replica: str, lease_s: int) -> bool:
        known = self.find("replica", replica) is True
        self.keep(True, lease_s, "replica", replica)
        return known

    def replicas(self) -> set[str]:
        return {key[1] for key in list(self.entries) if key[0] == "replica" and self.find(*key)}

    def longest(self, family: str, names: bytes, engines: list[str]) -> dict[str, int]:
        counts = {}
        for engine in engines:
            held = self.find(family, engine)
            count = 0
            for name in split(names):
                if held is None or name not in held["names"]:
                    break
                count += 1
            counts[engine] = count
        return counts

    def apply(
        self, family: str, engine: str, instance: str, first: int, after: int,
        stored: bytes, removed: bytes, lease_s: int,
    ) -> None:  # fmt: skip
        held = self.find(family, engine)
        if held is None or held["instance"] != instance:
            raise OutOfOrder(None)
        if held["next"] != first:
            raise OutOfOrder(held["next"])
        names = (held["names"] | set(split(stored))) - set(split(removed))
        self.keep({"instance": instance, "next": after, "names": names}, lease_s, family, engine)

    def rebuild(
        self, family: str, engine: str, instance: str, after: int, names: bytes, lease_s: int
    ) -> None:
        held = {"instance": instance, "next": after, "names": set(split(names))}
        self.keep(held, lease_s, family, engine)

    def drop(self, family: str, engine: str) -> None:
        self.entries.pop((family, engine), None)


def split(names: bytes) -> list[bytes]:
    return [names[i : i + NAME_BYTES] for i in range(0, len(names), NAME_BYTES)]


def near(number: int) -> st.SearchStrategy[int]:
    """Mostly the number itself."""
    return st.sampled_from([number] * 10 + [number - 1, number + 1]).map(lambda n: max(n, 0))


def mostly(both: tuple[str, str]) -> st.SearchStrategy[str]:
    return st.sampled_from([both[0]] * 6 + [both[1]])


leases_s = st.sampled_from([100, 200, 300])
holders = st.sampled_from(HOLDERS)
streams, families, engines = (mostly(both) for both in (STREAMS, FAMILIES, ENGINES))
instances = mostly(("i1", "i2"))
some_bytes = st.binary(max_size=12) | st.just(bytes(range(12)))
some_names = st.lists(st.sampled_from(NAMES), unique=True)
names = some_names | st.integers(1, len(NAMES)).map(lambda count: NAMES[:count])
splices = st.builds(
    Splice,
    drop=st.integers(0, 5),
    keep=st.none() | st.integers(0, 9),
    add=st.binary(max_size=9),
) | st.just(Splice())
changes = st.builds(
    Change,
    engine=st.none() | st.text(max_size=3),
    state=st.none() | st.sampled_from(["open", "finished"]),
    about=st.none() | some_bytes,
    posts=splices,
    documents=splices,
    tail=splices,
    names=splices,
)
records = st.builds(
    StreamRecord,
    epoch=st.integers(0, 3),
    version=st.integers(0, 4),
    holder=holders,
    engine=st.text(max_size=3),
    state=st.just("open"),
    about=some_bytes,
    posts=some_bytes,
    documents=some_bytes,
    tail=some_bytes,
    names=some_bytes,
)

ABOUT_STREAMS = [
    *("get", "get", "put", "put", "put", "change", "change", "change", "change"),
    *("claim", "claim", "delete", "advance"),
]
ABOUT_REPLICAS = ["beat", "replicas", "advance"]
ABOUT_BLOCKS = [
    *("longest", "longest", "longest", "longest", "apply", "apply", "apply", "apply"),
    *("rebuild", "rebuild", "rebuild", "drop", "advance"),
]
METHODS = [ABOUT_STREAMS, ABOUT_BLOCKS, ABOUT_STREAMS + ABOUT_REPLICAS + ABOUT_BLOCKS]
"""What a sequence is made of; most are about one thing, so that calls meet often."""

Call = tuple[str, tuple[Any, ...]]
"""Name of a method, and its arguments."""


@st.composite
def next_call(draw: st.DrawFn, model: Model, methods: list[str]) -> Call:
    """A call that is mostly one the model would take now; `advance` lets time pass."""
    method = draw(st.sampled_from(methods))
    place = draw(families), draw(engines)
    if method == "apply" and model.find(*place) is None:
        method = draw(mostly(("rebuild", "apply")))
    if method in ("change", "claim") and model.find(STREAMS[0]) is None:
        method = draw(mostly(("put", method)))
    match method:
        case "get":
            return method, (draw(streams),)
        case "put":
            return method, (draw(streams), draw(records), draw(leases_s))
        case "change":
            epoch, version = model.epoch_and_version(stream := draw(streams))
            numbers = (draw(near(epoch)), draw(near(version)))
            return method, (stream, *numbers, draw(changes), draw(leases_s))
        case "claim":
            epoch, _ = model.epoch_and_version(stream := draw(streams))
            return method, (stream, draw(near(epoch)), draw(holders), draw(leases_s))
        case "delete":
            epoch, _ = model.epoch_and_version(stream := draw(streams))
            return method, (stream, draw(near(epoch)))
        case "beat":
            return method, (draw(holders), draw(leases_s))
        case "replicas":
            return method, ()
        case "longest":
            wanted = b"".join(draw(names))
            return method, (place[0], wanted, draw(st.permutations(ENGINES)))
        case "apply":
            instance = draw(mostly((model.instance(*place), "i3")))
            first = draw(near(model.expected(*place)))
            stored = draw(names)
            removed = [name for name in draw(some_names) if name not in stored]
            batches = first, first + draw(st.integers(0, 3))
            both = b"".join(stored), b"".join(removed)
            return method, (*place, instance, *batches, *both, draw(leases_s))
        case "rebuild":
            held = b"".join(draw(names))
            after = draw(st.integers(0, 3))
            return method, (*place, draw(instances), after, held, draw(leases_s))
        case "drop":
            return method, place
        case _:
            return method, (draw(st.sampled_from([30, 60, 130])),)
