"""Who may use the gateway: tenants, their keys, their secrets and what each may use.

    python -m gateway.tenants new NAME >> tenants.toml

makes a tenant. The key is shown once, on the terminal; the file has its hash only:

    [defaults]                    # of all tenants; each may say otherwise
    requests_per_minute = 600

    [[tenants]]
    name = "acme"
    keys = ["sha256:..."]         # several while a key is being changed
    secret = "..."                # 64 hexadecimal digits; keeps its cached prefixes apart
    weight = 2.0                  # its share of a busy engine, against the others'

A key has 256 random bits, so one SHA-256 is enough: there is nothing to guess that a slow hash
would protect, and a slow one at every request would be a way to keep the gateway busy.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import secrets
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import msgspec

from gateway.settings import SettingsError

KEY_PREFIX = "s2l-"
SECRET_BYTES = 32
HASH = "sha256:"

Count = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
Hash = Annotated[str, msgspec.Meta(pattern=r"^sha256:[0-9a-f]{64}$")]
Secret = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]


class TenantsError(SettingsError):
    """The file of tenants can't be read or contradicts itself."""

    def __init__(self, reason: str) -> None:
        super().__init__("tenants", reason)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one tenant may use at one replica; None: what the gateway itself bounds."""

    streams: Count | None = None
    """Not ended, at once."""
    requests_per_minute: Count | None = None
    """Of those that ask for a stream or for an answer."""
    tokens_per_minute: Count | None = None
    """Of context taken in and of answers."""
    context_tokens: Count | None = None
    """Of one stream's documents."""
    chunk_bytes: Count | None = None
    """Of a chunk post or an NDJSON line."""
    body_bytes: Count | None = None
    """Of any other request."""
    stream_s: Seconds | None = None
    """From a stream's beginning to its end."""
    idle_s: Seconds | None = None
    """That an open stream may be without input."""


LIMITS = Limits.__struct_fields__


class Tenant(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One tenant."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    keys: list[Hash] = []
    secret: Secret | None = None
    """None only where there are no tenants."""
    weight: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0
    collections_write: bool = False
    """May change the collections, which all tenants may search."""

    def __repr__(self) -> str:
        return f"Tenant({self.name!r})"

    @property
    def cache_salt(self) -> str | None:
        """Separates its cached prefixes from those of others, in engines and in the index."""
        return self._derived("cache salt") if self.secret else None

    @property
    def voucher(self) -> str:
        """By which a replica shows another that it has a request of this tenant's to send on. No
        client can make it; it is empty where there are no tenants."""
        return self._derived("sent on by a replica") if self.secret else ""

    def stream_id(self, key: str) -> str:
        """The id of the stream that is made under an idempotency key; the same at all replicas."""
        return "st-" + self._derived(f"stream {key}")[:32]

    def _derived(self, purpose: str) -> str:
        secret = bytes.fromhex(self.secret or "")
        return hmac.digest(secret, f"stream2llm {purpose}".encode(), "sha256").hex()


EVERYBODY = Tenant(name="everybody")
"""The only tenant of a gateway without a file of tenants: no key, no salt, no limits."""


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    tenants: list[dict[str, Any]]
    defaults: Limits = Limits()


class Tenants:
    """The tenants of one gateway, by key; `reload` reads the file again."""

    def __init__(self, file: Path | None) -> None:
        """
        Args:
            file: None for a gateway that is open to everybody.

        Raises:
            TenantsError
        """
        self._file = file
        self._by_hash: dict[bytes, Tenant] = {}
        self._by_name = {EVERYBODY.name: EVERYBODY}
        self.reload()

    @property
    def open(self) -> bool:
        """Whether no key is asked for."""
        return self._file is None

    def reload(self) -> None:
        """Read the file again. Streams of a tenant that is gone end by their idle time.

        Raises:
            TenantsError: nothing has changed then.
        """
        if self._file is not None:
            tenants = read(self._file)
            self._by_hash = {_digest_of(key): t for t in tenants for key in t.keys}
            self._by_name = {t.name: t for t in tenants}

    def of(self, key: bytes) -> Tenant | None:
        """The tenant with this key. Takes equally long for every wrong key."""
        digest, found = hashlib.sha256(key).digest(), None
        for known, tenant in self._by_hash.items():
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def named(self, name: str) -> Tenant | None:
        """The tenant of this name, as it is now."""
        return self._by_name.get(name)


def read(file: Path) -> list[Tenant]:
    """The tenants of a file.

    Raises:
        TenantsError
    """
    try:
        raw = msgspec.convert(tomllib.loads(file.read_text()), File)
        defaults = {name: getattr(raw.defaults, name) for name in LIMITS}
        tenants = [msgspec.convert(defaults | one, Tenant) for one in raw.tenants]
    except (OSError, ValueError, msgspec.ValidationError) as e:
        raise TenantsError(f"{file}: {e}") from e
    keys = [key for tenant in tenants for key in tenant.keys]
    secret = [tenant.secret for tenant in tenants]
    for what, found in (("name", [t.name for t in tenants]), ("key", keys), ("secret", secret)):
        if len(found) != len(set(found)):
            raise TenantsError(f"{file}: two tenants have the same {what}")
    if None in secret:
        raise TenantsError(f"{file}: a tenant has no secret")
    return tenants


def hashed(key: str) -> str:
    """A key as the file has it."""
    return HASH + hashlib.sha256(key.encode()).hexdigest()


def _digest_of(key_hash: str) -> bytes:
    return bytes.fromhex(key_hash.removeprefix(HASH))


def new(name: str) -> tuple[str, str]:
    """A new tenant: its key, and its part of the file."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    quoted = msgspec.json.encode(name).decode()  # a basic string of TOML too
    part = (
        f'[[tenants]]\nname = {quoted}\nkeys = ["{hashed(key)}"]\n'
        f'secret = "{secrets.token_hex(SECRET_BYTES)}"\n'
    )
    return key, part


def main() -> int:
    """The command. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gateway.tenants")
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("new", help="a tenant's part of the file; its key to the terminal")
    make.add_argument("name")
    check = commands.add_parser("check", help="read a file and name its tenants")
    check.add_argument("file", type=Path)
    given = parser.parse_args()
    if given.command == "check":
        try:
            print("\n".join(tenant.name for tenant in read(given.file)))
        except TenantsError as e:
            print(f"gateway: {e}", file=sys.stderr)
            return 2
        return 0
    key, part = new(given.name)
    print(f"the key of {given.name}, shown only now: {key}", file=sys.stderr)
    print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
