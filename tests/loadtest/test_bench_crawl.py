"""What the crawl's benchmark says of pages that only one of two has."""

from __future__ import annotations

from pathlib import Path

from loadtest.bench_crawl import Read, Site, Stored, compared, is_html, written_by_pydoc

SITE = Site("site", "http://s.test/", depth=1)


def read(*urls: str, seconds: float = 2.0) -> Read:
    return Read(urls, frozenset(f"text of {url}" for url in urls), 0.1, seconds)


def test_a_page_is_lost_only_if_its_text_is_nowhere_else() -> None:
    texts = {"a": "text of a", "again": "text of a", "empty": "", "c": "text of c"}
    stored = Stored(texts, took_s=1.0, reading_s=4.0)
    figures = compared(SITE, read("a", "b"), [read("a", "b")], [stored])
    assert (figures.lost, figures.same_text, figures.only_here) == (1, 2, 1)
    assert (figures.pages, figures.wget_pages, figures.twice) == (2, 4, 0)
    assert (figures.pages_per_s, figures.wget_pages_per_s) == (1.0, 4.0)


def test_order_is_compared_with_a_crawl_one_after_another() -> None:
    figures = compared(SITE, read("a", "b", "c", "d"), [read("a", "d", "b", "c", "c")], [])
    assert figures.moved_places_max == 2
    assert figures.twice == 1
    assert figures.wget_pages is figures.lost is None


def test_a_site_is_written_where_none_is_installed(tmp_path: Path) -> None:
    folder = written_by_pydoc(tmp_path / "site", ["json", "json.decoder"])
    assert {path.name for path in folder.iterdir()} == {
        "index.html",
        "json.html",
        "json.decoder.html",
    }
    assert all(is_html(path.read_bytes()) for path in folder.iterdir())
