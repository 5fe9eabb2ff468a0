"""Which addresses may be fetched: the rules, without any network.

What a client may name is judged twice: its URL (`FetchPolicy.check_url`) and then every IP address
that its host resolves to (`FetchPolicy.check_address`).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from functools import lru_cache

import httpx

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

# Written out, and not `is_global`: what that says of some of these differs between the Python
# releases that the project runs on.
_SPECIAL_IPV4 = {
    "0.0.0.0/8": "this network",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "carrier-grade NAT",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "a cloud's metadata",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "reserved",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "6to4 relay",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
_SPECIAL_IPV6 = {
    "::/128": "unspecified",
    "::1/128": "loopback",
    "::/96": "IPv4-compatible",
    "64:ff9b:1::/48": "local NAT64",
    "fc00::/7": "private",
    "fe80::/10": "link-local",
    "fec0::/10": "site-local",
    "ff00::/8": "multicast",
    "2001::/32": "Teredo",
    "2001::/23": "reserved",
    "2001:db8::/32": "documentation",
    "2002::/16": "6to4",
    "3fff::/20": "documentation",
}
_SPECIAL: tuple[tuple[IPNetwork, str], ...] = tuple(
    (ipaddress.ip_network(network), kind)
    for network, kind in (_SPECIAL_IPV4 | _SPECIAL_IPV6).items()
)
_PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
_IPV4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")


class FetchFailed(Exception):
    """There is no page to be had from an address. Says which and why."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(f"{address[:200]}: {reason}")
        self.reason = reason


class AddressRefused(FetchFailed):
    """An address that is not fetched, whatever is there."""


@dataclass(frozen=True, slots=True)
class FetchPolicy:
    """What may be fetched, and how much of it. As it stands it is fit for URLs of strangers."""

    ports: frozenset[int] = frozenset({80, 443})
    allowed_hosts: tuple[str, ...] = ()
    """If any: only these. A host's name, or `.name` for that and all beneath it."""
    denied_hosts: tuple[str, ...] = ()
    """Never these, allowed or not."""
    allowed_networks: tuple[str, ...] = ()
    """Networks to be fetched from although they are not public, as `10.1.0.0/16`."""
    max_redirects: int = 5
    max_body_bytes: int = 2 << 20
    """Of a page, decoded; a larger one is refused."""
    max_ratio: float = 100.0
    """How many times its own size a compressed body may become, beyond the first 256 KiB."""
    connect_s: float = 5.0
    idle_s: float = 5.0
    """The longest wait for the next bytes."""
    total_s: float = 15.0
    """For one page, its redirects included."""

    def __post_init__(self) -> None:
        _networks(self.allowed_networks)  # a ValueError now rather than at the first page

    def check_url(self, text: str | httpx.URL) -> httpx.URL:
        """The URL, parsed as it will be used.

        Raises:
            AddressRefused: it is not one, or not to be fetched, wherever its host may be.
        """
        try:
            url = httpx.URL(text)
        except (httpx.InvalidURL, ValueError) as error:
            raise AddressRefused(str(text), f"not a URL ({error})") from error
        shown = str(url.copy_with(userinfo=b"")) if url.userinfo else str(url)
        if (reason := self._wrong_in(url)) is not None:
            raise AddressRefused(shown, reason)
        return url

    def _wrong_in(self, url: httpx.URL) -> str | None:
        if url.scheme not in ("http", "https"):
            return f"scheme {url.scheme or 'missing'!r} is not http or https"
        if url.userinfo:
            return "credentials in the URL"
        if (port := port_of(url)) not in self.ports:
            return f"port {port} is not allowed"
        return _wrong_name(host_of(url)) or self._wrong_host(host_of(url))

    def _wrong_host(self, host: str) -> str | None:
        if any(host_matches(host, pattern) for pattern in self.denied_hosts):
            return "this host is denied"
        allowed = self.allowed_hosts
        if allowed and not any(host_matches(host, pattern) for pattern in allowed):
            return "this host is not among the allowed ones"
        return None

    def check_address(self, host: str, text: str) -> str:
        """An address that `host` resolves to, ready to connect to.

        Raises:
            AddressRefused: it is none of the public internet nor of `allowed_networks`.
        """
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise AddressRefused(host, f"resolves to {text!r}, which is no address") from error
        meant = _embedded(address)
        if any(meant in network for network in _networks(self.allowed_networks)):
            return text
        if (kind := special(meant)) is not None:
            way = "" if host == text else f"resolves to {text}, "
            raise AddressRefused(host, f"{way}not a public address ({kind})")
        return text


def host_of(url: httpx.URL) -> str:
    """The host in the form that rules are written in: lower case, no dot at the end."""
    return url.raw_host.decode("ascii", "replace").lower().removesuffix(".")


def port_of(url: httpx.URL) -> int:
    """The port, also where the URL leaves it out."""
    return url.port if url.port is not None else (443 if url.scheme == "https" else 80)


def host_matches(host: str, pattern: str) -> bool:
    """Whether a pattern covers a host: `name` itself only, `.name` all beneath it as well."""
    pattern = pattern.lower().removesuffix(".")
    return host == pattern.removeprefix(".") or (pattern[:1] == "." and host.endswith(pattern))


def special(address: IPAddress) -> str | None:
    """What kind of not public address this is, or None if it is a public one."""
    for network, kind in _SPECIAL:
        if address in network:
            return kind
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address not in _PUBLIC_IPV6:
        return "reserved"
    return "ISATAP" if int(address) >> 32 & 0xFFFFFFFF in _ISATAP else None


def _embedded(address: IPAddress) -> IPAddress:
    """The IPv4 address that packets to an IPv6 one end at, where there is one."""
    if isinstance(address, ipaddress.IPv6Address) and (
        address in _IPV4_MAPPED or address in _NAT64
    ):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


@lru_cache(maxsize=64)
def _networks(texts: tuple[str, ...]) -> tuple[IPNetwork, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


def _wrong_name(host: str) -> str | None:
    """What makes this a host that is not even looked up."""
    if not host:
        return "no host"
    if ":" in host:
        return _wrong_ipv6(host)
    if not all(_LABEL.fullmatch(label) for label in host.split(".")) or len(host) > 253:
        return "not a host name"
    try:
        ipaddress.IPv4Address(host)
    except ValueError:
        # what the C library would still read as a number: 0x7f.1, 017700000001, 2130706433
        return "an IPv4 address in an unusual form" if _is_number(host) else None
    return None


def _wrong_ipv6(host: str) -> str | None:
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return "not an IPv6 address"
    return "an address with a zone" if address.scope_id is not None else None


def _is_number(host: str) -> bool:
    try:
        socket.inet_aton(host)
    except OSError:
        return False
    return True
