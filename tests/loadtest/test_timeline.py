"""What the recorder sees of a query from step to step."""

from __future__ import annotations

from loadtest.timeline import Recorder
from loadtest.workload import Document, Input, Query

QUERY = Query(4, 10.0, False, (Input(0.5, (Document(1, 5),)), Input(2.0, (Document(2, 5),))), 3)


class Engine:
    """Holds tokens of one query; every step is a tenth of a second."""

    def __init__(self) -> None:
        self.held: int | None = None
        self.now_s = 10.5
        self.recorder = Recorder([QUERY], lambda name: self.held)

    def step(self, held: int | None, finished: tuple[str, ...] = ()) -> None:
        self.recorder.before()
        begun_s, self.held = self.now_s, held
        self.now_s += 0.125
        self.recorder.after(begun_s, self.now_s, finished)


def test_steps_in_a_row_are_one_span_and_pauses_end_it() -> None:
    engine = Engine()
    for held in (3, 5, 5, 8):
        engine.step(held)
    engine.step(None, ("4", "another"))
    (line,) = engine.recorder.lines()
    assert line.inputs_s == (10.5, 12.0)
    assert line.computed == [(10.5, 10.75), (10.875, 11.125)]
    assert line.first_token_s == line.end_s == 11.125
    assert line.preempted == []


def test_tokens_that_are_gone_after_a_step_were_taken() -> None:
    engine = Engine()
    for held in (8, 2, 2):
        engine.step(held)
    (line,) = engine.recorder.lines()
    assert line.preempted == [(10.625, 6)]


def test_what_an_update_takes_is_not_taken_by_others() -> None:
    engine = Engine()
    engine.step(8)
    engine.recorder.invalidated("4", 10.7, 6)
    engine.recorder.invalidated("nobody", 10.7, 6)
    engine.held = 2
    engine.step(4)
    (line,) = engine.recorder.lines()
    assert line.invalidated == [(10.7, 6)]
    assert line.preempted == []
