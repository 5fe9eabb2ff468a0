"""Reading a page: from bytes to its title, its main text and its links. No network, much CPU."""

from __future__ import annotations

import codecs
import logging
import re
from dataclasses import dataclass
from email.message import Message
from itertools import islice

import httpx
import lxml.html
import trafilatura
from bs4.dammit import EncodingDetector, UnicodeDammit
from lxml import etree

from retrieval.fetch import media_type

log = logging.getLogger(__name__)

HTML_TYPES = ("text/html", "application/xhtml+xml")
READABLE_TYPES = (*HTML_TYPES, "text/plain")
MAX_LINKS = 5000
"""Different ones looked at on one page."""
MAX_ELEMENTS = 20_000
"""Of a page whose main text is looked for: that takes some 50 microseconds for each."""
_MAX_ADDRESS_CHARS = 2000
_LINKS = "//a/@href | //area/@href | //frame/@src | //iframe/@src"

# What pages may call their charset. Python has codecs that no page needs and that cost a hostile
# one's reader minutes ("idna"), so this says which are taken.
_CHARSETS = re.compile(
    r"utf-(8|16|32)(-sig)?(-[bl]e)?|iso8859-\d+|cp\d+|koi8-[rtu]|mac-\w+|ptcp154|tis-620"
    r"|shift_jis\w*|euc_\w+|iso2022_\w+|gb2312|gbk|gb18030|hz|big5\w*|johab"
)


@dataclass(frozen=True, slots=True)
class Page:
    """What there is to read at an address."""

    title: str
    text: str
    links: tuple[httpx.URL, ...]
    """Absolute, normalised, each once, in the order of the page."""


def read_page(url: httpx.URL, content_type: str, body: bytes) -> Page:
    """Read a page, however broken it is; what can't be read is empty."""
    text = decode(content_type, body)
    if media_type(content_type) == "text/plain":
        return Page("", tidy(text), ())
    try:
        tree = lxml.html.document_fromstring(
            text.encode(errors="replace"), parser=lxml.html.HTMLParser(encoding="utf-8")
        )
    except (etree.LxmlError, ValueError):  # nothing in it
        return Page("", "", ())
    title = " ".join((tree.findtext(".//title") or "").split())
    links = _links(url, tree)
    return Page(title, tidy(_main_text(tree)), links)


def decode(content_type: str, body: bytes) -> str:
    """The characters of a page: by its byte-order mark, its header, what it says itself, UTF-8,
    or a guess; the first of these by which it can be read."""
    header = Message()
    header["Content-Type"] = content_type
    inside = _charset(EncodingDetector.find_declared_encoding(body[:8192], is_html=True))
    if inside is not None and inside.startswith(("utf-16", "utf-32")):
        inside = None  # then its name could not have been read
    said = (_charset(header.get_content_charset()), inside)
    named = [name for name in said if name is not None]
    found = UnicodeDammit(body, user_encodings=[*named, "utf-8"], is_html=False)
    text = found.unicode_markup
    return text if text is not None else body.decode("utf-8", "replace")


def _charset(name: str | None) -> str | None:
    """The codec of a charset that a page names, or None if it helps nothing."""
    try:
        codec = codecs.lookup(name or "").name
    except (LookupError, ValueError):
        return None
    if codec == "iso8859-1":
        return "cp1252"  # as browsers take it
    return codec if _CHARSETS.fullmatch(codec) else None


def tidy(text: str) -> str:
    """Without empty lines and repeated blanks."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def cut(text: str, max_chars: int) -> str:
    """At most this many characters, whole lines if the first is not longer."""
    if len(text) <= max_chars:
        return text
    return text[: max_chars + 1].rpartition("\n")[0] or text[:max_chars]


def normalised(url: httpx.URL) -> httpx.URL:
    """The same page has the same address: without fragment; httpx does the rest (case, default
    port, dots in the path)."""
    return url.copy_with(fragment=None, raw_path=url.raw_path or b"/")


def _links(url: httpx.URL, tree: lxml.html.HtmlElement) -> tuple[httpx.URL, ...]:
    base = _join(url, tree.xpath("string(//base/@href)").strip()) or url
    # many links of a page are to places in it, or the same again: parsing each would be slow
    said = (str(link).strip().partition("#")[0] for link in tree.xpath(_LINKS))
    found = (_join(base, link) for link in islice(dict.fromkeys(said), MAX_LINKS) if link)
    links = {str(link): link for link in map(normalised, filter(None, found))}
    return tuple(link for text, link in links.items() if len(text) <= _MAX_ADDRESS_CHARS)


def _join(base: httpx.URL, reference: str) -> httpx.URL | None:
    try:
        link = base.join(reference)
    except (httpx.InvalidURL, ValueError):
        return None
    return link if link.scheme in ("http", "https") and link.host else None


def _main_text(tree: lxml.html.HtmlElement) -> str:
    """What a reader came for; of pages too large or too odd to tell, all text."""
    if sum(1 for _ in islice(tree.iter(), MAX_ELEMENTS + 1)) > MAX_ELEMENTS:
        return _all_text(tree)
    try:
        found = trafilatura.extract(tree, favor_recall=True, include_comments=False)
    except Exception:  # a library's mistake about one page, which a crawl survives
        log.warning("a page's main text could not be found", exc_info=True)
        found = None
    return found or _all_text(tree)


def _all_text(tree: lxml.html.HtmlElement) -> str:
    etree.strip_elements(
        tree, "head", "script", "style", "noscript", etree.Comment, with_tail=False
    )
    return "\n".join(tree.itertext())
