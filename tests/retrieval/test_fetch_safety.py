"""What a stranger may make this machine connect to: nothing that is not public."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from retrieval.addresses import AddressRefused, FetchPolicy
from retrieval.crawl import Crawl
from retrieval.fetch import Fetcher, TooManyRedirects
from retrieval.source import SourceFailed
from retrieval.transport import system_resolve
from tests.retrieval.sites import Site, gather, html, local, moved, names, serving

NOT_PUBLIC = "not a public address"
UNUSUAL = "unusual form"

LITERALS = {
    # this machine
    "http://127.0.0.1/": "loopback",
    "http://127.255.255.254/": "loopback",
    "http://0.0.0.0/": "this network",
    "http://[::1]/": "loopback",
    "http://[::]/": "unspecified",
    "http://[0:0:0:0:0:0:0:1]/": "loopback",
    # written as numbers that only the C library understands
    "http://2130706433/": UNUSUAL,
    "http://0x7f000001/": UNUSUAL,
    "http://017700000001/": UNUSUAL,
    "http://0x7f.0.0.1/": UNUSUAL,
    "http://0177.0.0.1/": "not a URL",
    "http://127.1/": UNUSUAL,
    "http://127.0.1/": UNUSUAL,
    "http://0/": UNUSUAL,
    "http://0x7f.1/": UNUSUAL,
    "http://127.0.0.01/": "not a URL",
    "http://2852039166/": UNUSUAL,
    # IPv4 inside IPv6
    "http://[::ffff:127.0.0.1]/": "loopback",
    "http://[::ffff:7f00:1]/": "loopback",
    "http://[0:0:0:0:0:ffff:10.0.0.1]/": "private",
    "http://[::127.0.0.1]/": "IPv4-compatible",
    "http://[64:ff9b::7f00:1]/": "loopback",
    "http://[64:ff9b::169.254.169.254]/": "link-local",
    "http://[64:ff9b:1::a00:1]/": "NAT64",
    "http://[2002:7f00:1::]/": "6to4",
    "http://[2002:a9fe:a9fe::1]/": "6to4",
    "http://[2001:0:4136:e378:8000:63bf:80ff:fffe]/": "Teredo",
    "http://[2600::5efe:a00:1]/": "ISATAP",
    # where clouds keep their secrets
    "http://169.254.169.254/latest/meta-data/": "link-local",
    "http://169.254.170.2/v2/credentials": "link-local",
    "http://100.100.100.200/latest/meta-data/": "NAT",
    "http://168.63.129.16/machine": "metadata",
    "http://192.0.0.192/opc/v1/": "reserved",
    "http://[fd00:ec2::254]/latest/": "private",
    "http://[fd20:ce::254]/": "private",
    # private and reserved
    "http://10.0.0.1/": "private",
    "http://172.16.0.1/": "private",
    "http://172.31.255.255/": "private",
    "http://192.168.1.1/": "private",
    "http://100.64.0.1/": "NAT",
    "http://192.0.2.1/": "documentation",
    "http://198.18.0.1/": "benchmarking",
    "http://192.88.99.1/": "6to4",
    "http://224.0.0.1/": "multicast",
    "http://239.255.255.250/": "multicast",
    "http://240.0.0.1/": "reserved",
    "http://255.255.255.255/": "reserved",
    "http://[fe80::1]/": "link-local",
    "http://[fe80::1%25eth0]/": "zone",
    "http://[fc00::1]/": "private",
    "http://[fec0::1]/": "site-local",
    "http://[ff02::1]/": "multicast",
    "http://[2001:db8::1]/": "documentation",
    "http://[4000::1]/": "reserved",
}
TRICKS = {
    "http://127。0。0。1/": "loopback",  # dots that IDNA takes for dots
    "http://①②⑦.0.0.1/": "not a URL",
    "http://127.0.0.1./": "loopback",
    "http://%31%32%37.0.0.1/": "not a host name",
    "http://127.0.0.1%00.good.test/": "not a host name",
    "http://user:secret@good.test/": "credentials",
    "http://good.test@127.0.0.1/": "credentials",
    "http://good.test\\@127.0.0.1/": "credentials",
    "file:///etc/passwd": "scheme",
    "ftp://good.test/": "scheme",
    "gopher://127.0.0.1:6379/_INFO": "scheme",
    "data:text/html,hello": "scheme",
    "javascript:alert(1)": "scheme",
    "//good.test/": "scheme",
    "good.test": "scheme",
    "http://": "no host",
    "http:///etc/passwd": "no host",
    "http://good.test:22/": "port 22",
    "http://good.test:6379/": "port 6379",
    "https://good.test:80000/": "port 80000",
    "http://good..test/": "not a host name",
    "http://good.test\n.evil.test/": "not a URL",
}
NAMES = {
    "localhost": ["127.0.0.1"],
    "localhost.": ["::1"],
    "private.test": ["10.1.2.3"],
    "metadata.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:192.168.0.1"],
    "nat64.test": ["64:ff9b::c0a8:1"],
    "mixed.test": ["93.184.216.34", "127.0.0.1"],
    "mixed6.test": ["2606:2800:220:1::1", "fd00::1"],
    "broken.test": ["not-an-address"],
}


async def look_up(host: str, port: int) -> Sequence[str]:
    return NAMES.get(host) or await system_resolve(host, port)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def canary() -> AsyncIterator[Site]:
    """Listens on this machine, to hear what must not reach it."""

    async def answer(request: web.Request) -> web.Response:
        return html("secret")

    async with serving(answer, host="127.0.0.1") as site:
        yield site
        assert not site.asked


async def refusal(url: str, policy: FetchPolicy | None = None) -> str:
    async with Fetcher(policy or FetchPolicy(), resolve=look_up) as fetcher:
        with pytest.raises(AddressRefused) as caught:
            await fetcher.fetch(url)
    return str(caught.value)


@pytest.mark.parametrize("url", [*LITERALS, *TRICKS])
async def test_a_url_is_refused_with_its_reason(url: str) -> None:
    assert (LITERALS | TRICKS)[url] in await refusal(url)


@pytest.mark.parametrize("host", NAMES)
async def test_a_name_of_a_private_address_is_refused(host: str) -> None:
    said = await refusal(f"http://{host}/")
    assert host in said
    assert NOT_PUBLIC in said or "is no address" in said


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "0.0.0.0"])
async def test_nothing_reaches_a_server_of_this_machine(canary: Site, host: str) -> None:
    policy = FetchPolicy(ports=frozenset({canary.port}))
    assert NOT_PUBLIC in await refusal(canary.url("/admin", host), policy)


@given(
    st.ip_addresses(v=4, network="10.0.0.0/8")
    | st.ip_addresses(v=4, network="127.0.0.0/8")
    | st.ip_addresses(v=4, network="169.254.0.0/16")
    | st.ip_addresses(v=4, network="192.168.0.0/16"),
    st.sampled_from(["{}", "::ffff:{}", "64:ff9b::{}", "::{}"]),
)
def test_a_private_address_is_refused_in_whatever_it_is_wrapped(
    address: ipaddress.IPv4Address, wrapping: str
) -> None:
    with pytest.raises(AddressRefused, match=NOT_PUBLIC):
        FetchPolicy().check_address("name.test", wrapping.format(address))


@given(st.integers(0, 2**32 - 1), st.sampled_from(["{:d}", "0x{:x}", "0{:o}"]))
def test_numbers_that_the_c_library_takes_for_addresses_are_refused(
    number: int, spelling: str
) -> None:
    host = spelling.format(number)
    socket.inet_aton(host)  # it does
    with pytest.raises(AddressRefused, match=UNUSUAL):
        FetchPolicy().check_url(f"http://{host}/")


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822"])
def test_public_addresses_pass(address: str) -> None:
    assert FetchPolicy().check_address("example.org", address) == address


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://bad.test/", "denied"),
        ("http://BAD.test./", "denied"),
        ("http://www.bad.test/", "denied"),
        ("http://sub.exact.test/", None),
        ("http://exact.test/", "denied"),
        ("http://notbad.test/", None),
        ("http://other.example/", "not among the allowed"),
    ],
)
def test_hosts_are_allowed_and_denied_by_name(url: str, reason: str | None) -> None:
    policy = FetchPolicy(allowed_hosts=(".test",), denied_hosts=(".bad.test", "exact.test"))
    if reason is None:
        policy.check_url(url)
    else:
        with pytest.raises(AddressRefused, match=reason):
            policy.check_url(url)


def test_a_network_that_is_none_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match="does not appear to be"):
        FetchPolicy(allowed_networks=("intranet",))


async def test_the_checked_address_is_the_one_connected_to() -> None:
    """A name whose answer changes between check and use (rebinding) gains nothing by it."""
    looked_up: list[str] = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        looked_up.append(host)
        return ["127.0.0.1"] if len(looked_up) == 1 else ["127.0.0.2"]

    async def good(request: web.Request) -> web.Response:
        return html("good")

    async def secret(request: web.Request) -> web.Response:
        return html("secret")

    async with serving(good) as site, serving(secret, "127.0.0.2", site.port) as inner:
        async with Fetcher(local(site), resolve=rebinding) as fetcher:
            answer = await fetcher.fetch(site.url(host="rebind.test"))
        async with Fetcher(local(site), resolve=rebinding) as fetcher:
            with pytest.raises(AddressRefused, match=r"resolves to 127\.0\.0\.2"):
                await fetcher.fetch(site.url(host="rebind.test"))
        assert b"good" in answer.body
        assert looked_up == ["rebind.test"] * 2  # once for each connection
        assert site.hosts == {f"rebind.test:{site.port}"}  # the name stays in the Host header
        assert not inner.asked


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://127.0.0.2:{port}/", "loopback"),
        ("http://inner.test:{port}/", "resolves to 10.0.0.5"),
        ("http://[::1]:{port}/", "loopback"),
        ("http://0x7f000002:{port}/", UNUSUAL),
        ("//127.0.0.3:{port}/x", "loopback"),
        ("http://169.254.169.254/", "port 80 is not allowed"),
        ("http://user@127.0.0.1:{port}/", "credentials"),
        ("file:///etc/passwd", "scheme"),
        ("gopher://127.0.0.1:{port}/", "scheme"),
        ("http://①②⑦.0.0.1/", "not a URL"),
    ],
)
async def test_redirects_are_judged_like_first_addresses(location: str, reason: str) -> None:
    async def answer(request: web.Request) -> web.Response:
        return moved(location.format(port=site.port))

    resolve = names(outer_test=["127.0.0.1"], inner_test=["10.0.0.5"])
    async with serving(answer) as site, Fetcher(local(site), resolve=resolve) as fetcher:
        with pytest.raises(AddressRefused) as caught:
            await fetcher.fetch(site.url(host="outer.test"))
        assert reason in str(caught.value)
        assert sum(site.asked.values()) == 1


async def test_five_redirects_are_followed_and_no_more() -> None:
    async def answer(request: web.Request) -> web.Response:
        left = int(request.path[1:])
        return html("there") if left == 0 else moved(f"/{left - 1}")

    async with serving(answer) as site, Fetcher(local(site)) as fetcher:
        there = await fetcher.fetch(site.url("/5"))
        assert str(there.url) == site.url("/0")
        with pytest.raises(TooManyRedirects, match="more than 5"):
            await fetcher.fetch(site.url("/6"))


async def test_a_crawl_says_why_its_seeds_are_refused() -> None:
    with pytest.raises(SourceFailed, match=r"169\.254\.169\.254.*not a public address"):
        await gather(Crawl(), "What is at http://169.254.169.254/latest?")
    with pytest.raises(SourceFailed, match=r"resolves to 10\.1\.2\.3"):
        await gather(Crawl(["http://private.test/"], resolve=look_up))


async def test_nothing_of_the_environment_changes_where_requests_go(
    monkeypatch: pytest.MonkeyPatch, canary: Site
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, canary.url())

    async def answer(request: web.Request) -> web.Response:
        return html("good")

    async with serving(answer) as site, Fetcher(local(site)) as fetcher:
        assert (await fetcher.fetch(site.url())).status == 200


async def test_cookies_are_not_carried_from_page_to_page() -> None:
    sent: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        sent.append(request.headers.get("Cookie"))
        return web.Response(text="x", headers={"Set-Cookie": "id=1; Path=/"})

    async with serving(answer) as site, Fetcher(local(site)) as fetcher:
        await fetcher.fetch(site.url("/a"))
        await fetcher.fetch(site.url("/b"))
    assert sent == [None, None]
