"""The report: its files, its tables, its pictures, and the way through a gateway."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import aiohttp
import pytest

from loadtest import compare
from loadtest.compare import main
from loadtest.plots import draw
from loadtest.results import BASE, REAL, SIMULATED, Result, load, markdown, save
from loadtest.scripts import script
from loadtest.targets import Clock, ThroughGateway
from loadtest.texts import ExactTexts
from loadtest.timeline import Line
from loadtest.trial import play
from loadtest.workload import Document, Input, Query
from tests.fake_engine import MODEL

pytestmark = pytest.mark.slow

LINES = (
    Line(0, (0.0, 1.0, 2.0), 2.5, 2.5, [(0.1, 0.2), (2.0, 2.5)], [(0.5, 9)], [(1.0, 7)]),
    Line(1, (0.5, 3.0)),
)


def result(target: str, qps: float = 4.0, ttft_s: float = 1.0, engine: str = SIMULATED) -> Result:
    waits = tuple(ttft_s * (i + 1) / 10 for i in range(10))
    return Result(engine, "crawl", qps, 1.0, target, 10, 0, waits, 20.0, 900, 0, 2, 1.5, LINES)


RESULTS = [result(BASE), result("srpf", ttft_s=0.25), result(BASE, 2.0), result("srpf", 2.0, 0.5)]


def test_results_are_read_as_they_were_saved(tmp_path: Path) -> None:
    save(tmp_path / "report.json", RESULTS, {"seed": 1})
    assert load(tmp_path / "report.json") == (RESULTS, {"seed": 1})


def test_the_table_has_speed_ups_and_what_is_published() -> None:
    table = markdown(RESULTS)
    ours, base = (
        next(line for line in table.splitlines() if line.startswith(f"| {target} |"))
        for target in ("srpf", BASE)
    )
    assert "4.0 / 4.0 / 4.0" in ours
    assert "0.956 / 4.923 / 6.318" in base
    assert table.count("### crawl") == 2


def test_speed_ups_are_not_claimed_for_a_row_that_answered_less() -> None:
    stuck = replace(result("srpf"), ttft_s=(0.1,), completion_s=None, preemptions=None)
    row = markdown([result(BASE), stuck]).splitlines()[-1]
    assert row == "| srpf | 0.100 / 0.100 / 0.100 |  |  |  | 1/10 |  | 0 | 900 |  | 1.5 |"


def test_a_real_engine_is_not_set_beside_the_published_figures() -> None:
    assert "0.956" not in markdown([result(BASE, engine=REAL)])


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    names = [path.name for path in draw(RESULTS, tmp_path)]
    assert names == [
        "ttft-ccdf-crawl-simulated.png",
        "ttft-qps-crawl-simulated.png",
        "gantt-crawl-simulated.png",
    ]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
    lone = replace(result("gateway srpf", engine=REAL), lines=())
    assert [p.name for p in draw([lone], tmp_path)] == ["ttft-ccdf-crawl-real.png"]
    assert draw([replace(lone, ttft_s=())], tmp_path) == []


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
    return main()


def test_one_command_writes_json_tables_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(compare.TARGETS, "waiting", lambda options: iter(RESULTS[:1]))
    monkeypatch.setitem(compare.TARGETS, SIMULATED, lambda options: iter(RESULTS[1:2]))
    out = tmp_path / "report"
    assert run(monkeypatch, "--targets", "waiting,simulated", "--seed", "7", "--out", out) == 0
    results, about = load(out / "report.json")
    assert results == RESULTS[:2]
    assert about["settings"]["seed"] == 7
    assert about["machine"]
    assert about["versions"]["aiohttp"]
    text = (out / "report.md").read_text()
    assert "seed 7" in text
    assert "| srpf |" in text
    assert "(gantt-crawl-simulated.png)" in text
    assert run(monkeypatch, "--redraw", "--out", out) == 0
    assert (out / "report.md").read_text() == text


def test_a_row_with_errors_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = replace(result("srpf"), errors=1)
    monkeypatch.setitem(compare.TARGETS, SIMULATED, lambda options: iter([broken]))
    assert run(monkeypatch, "--targets", "simulated", "--out", tmp_path) == 1


def test_unknown_targets_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--targets", "simulated,nobody")
    assert "'nobody' is none of simulated" in capsys.readouterr().err


def query(update: bool) -> Query:
    a, b, c = (Document(i, 30) for i in (1, 2, 3))
    lists = ((a, b), (c, b)) if update else ((a,), (b, c))
    inputs = tuple(Input(0.02 * i, documents) for i, documents in enumerate(lists))
    return Query(5, 0.0, update, inputs, 6)


@pytest.mark.parametrize("update", [False, True])
async def test_a_query_goes_through_a_gateway(
    gateway_url: str, model_dir: Path, update: bool
) -> None:
    texts = ExactTexts(str(model_dir))
    played = script(query(update), texts.tokens_of)
    async with aiohttp.ClientSession() as http:
        target = partial(ThroughGateway, texts=texts)(http, gateway_url, MODEL, "a row", 2)
        clock = Clock()
        outcome = await play(target, played, clock, 2)
    assert outcome.error == ""
    assert outcome.ttft_s is not None
    assert outcome.ttft_s > 0
    assert [tokens for _, tokens in outcome.invalidated] == ([60] if update else [])


@pytest.mark.parametrize(
    ("given", "rates", "tokens"),
    [
        ([], {}, {"crawl": 288, "ann": 288}),
        (["--real-qps", "1,2"], {"crawl": [1, 2], "ann": [1, 2]}, {"crawl": 288, "ann": 288}),
        (
            ["--real-qps", "crawl=1.2,ann=1.6", "--tokens", "ann=144"],
            {"crawl": [1.2], "ann": [1.6]},
            {"crawl": 288, "ann": 144},
        ),
    ],
)
def test_each_workload_may_have_its_own_rate_and_length(
    monkeypatch: pytest.MonkeyPatch,
    given: list[str],
    rates: dict[str, list[float]],
    tokens: dict[str, int],
) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", *given])
    options = compare.arguments()
    assert (options.real_qps, options.tokens) == (rates, tokens)
