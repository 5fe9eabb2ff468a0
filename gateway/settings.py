"""Settings of a gateway: one typed value, read once from a file, the environment and flags."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_type_hints

from gateway.routing import POLICIES
from retrieval.addresses import FetchPolicy

ENV_PREFIX = "STREAM2LLM_"


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set. Flags win over the environment, the environment over the file."""

    engine: tuple[str, ...] = _setting(
        (), "URL of an engine that runs the plug-in; may be given several times"
    )
    plain_engine: tuple[str, ...] = _setting(
        (),
        "URL of an OpenAI-compatible server without the plug-in, whose prefix cache is warmed "
        "instead; may be given several times",
    )
    decode_engine: tuple[str, ...] = _setting(
        (),
        "URL of an engine that decodes prompts which others have prefilled; may be given several "
        "times",
    )
    tokenizer: str | None = _setting(
        None, "folder or name of the model's tokenizer (default: the model name the engine says)"
    )
    host: str = _setting("127.0.0.1", "address to listen on")
    port: int = _setting(8000, "port to listen on")
    index: str | None = _setting(
        None,
        "URL of the Redis that replicas share, e.g. redis://127.0.0.1:6379/0 (also rediss://, "
        "redis+sentinel://, redis+cluster://; default: in this process, for a single gateway)",
    )
    index_timeout_s: float = _setting(0.5, "longest wait for the index; then without it")
    advertise: str | None = _setting(
        None, "URL under which other replicas reach this one (default: host and port)"
    )
    handoff_min_tokens: int = _setting(
        16, "answers of fewer tokens are decoded where their prompts were read"
    )
    handoff_idle_tokens: int = _setting(
        0,
        "answers are decoded where their prompts were read while no more tokens are queued there, "
        "each open prompt counting 256; -1: never",
    )
    handoff_timeout_s: float = _setting(
        10.0, "longest wait for a decode engine to fetch a prompt's KV; then it is read anew"
    )
    tenants: str | None = _setting(
        None,
        "TOML file of the tenants with their keys and limits, see `python -m gateway.tenants` "
        "(default: open to everybody)",
    )
    routing: str = _setting("prefix", "which engine: " + ", ".join(POLICIES))
    engine_max_streams: int = _setting(
        0, "streams and requests at once on one engine; more are answered 503 (0: any number)"
    )
    eject_after: int = _setting(
        3, "operations in a row that fail before an engine gets no streams for a while"
    )
    drain_timeout_s: float = _setting(
        30.0, "how long what is open may take to end when an engine or the gateway is drained"
    )
    admin_port: int = _setting(0, "port of the admin routes (0: none)")
    admin_host: str = _setting("127.0.0.1", "address of the admin routes")
    admin_key_file: str | None = _setting(
        None,
        "file with the key that admin routes ask for, or with `sha256:` and its hash in hex "
        "(default: none, on this machine only)",
    )
    max_streams: int = _setting(10_000, "streams at once; more are answered 503")
    max_connections: int = _setting(
        10_000, "connections of clients at once; more are answered 503 and closed"
    )
    client_timeout_s: float = _setting(
        30.0,
        "how long a client may take to send the head or the body of a request, or to take "
        "what is sent to it",
    )
    keepalive_s: float = _setting(75.0, "a connection without a request so long is closed")
    engine_timeout_s: float = _setting(
        300.0, "an engine that is silent so long on a request passed through to it has failed"
    )
    max_queued_tokens: int = _setting(
        1_000_000,
        "tokens that may wait to be computed at each engine; beyond, new streams are answered 503",
    )
    max_tokenizing_bytes: int = _setting(
        16 << 20, "text that may wait to be tokenized; beyond, chunks are answered 503"
    )
    max_chunk_bytes: int = _setting(1 << 20, "largest body of one chunk post or NDJSON line")
    max_body_bytes: int = _setting(16 << 20, "largest body of any other request")
    idle_timeout_s: float = _setting(300.0, "an open stream without input so long is cancelled")
    resume_s: float = _setting(
        30.0, "how long an answer with an Idempotency-Key waits for a reader that was cut off"
    )
    max_stream_s: float = _setting(3600.0, "a stream that is older is cancelled")
    keep_finished_s: float = _setting(60.0, "how long an ended stream can still be looked up")
    lease_s: float = _setting(60.0, "engines free a stream when the gateway is silent so long")
    poll_s: float = _setting(0.5, "how often engines are asked for their health and load")
    poll_timeout_s: float = _setting(
        10.0, "an engine that says nothing for so long is away: it may have a step under way"
    )
    heartbeat_s: float = _setting(5.0, "comment lines on a waiting SSE answer come this often")
    token_cache: int = _setting(4096, "chunks whose tokens are remembered")
    crawl: bool = _setting(False, "let streams have the gateway crawl web sites")
    crawl_allow: tuple[str, ...] = _setting(
        (), "hosts to be crawled, `.name` for all beneath a name too (default: any public one)"
    )
    crawl_deny: tuple[str, ...] = _setting((), "hosts never to be crawled, allowed or not")
    crawl_ports: tuple[str, ...] = _setting(("80", "443"), "ports to be crawled")
    crawl_networks: tuple[str, ...] = _setting(
        (), "networks to be crawled although they are not public, e.g. 10.1.0.0/16"
    )
    crawl_max_pages: int = _setting(100, "pages that one crawl may ask for")
    crawl_max_depth: int = _setting(3, "depth that one crawl may ask for")
    crawl_delay_s: float = _setting(0.5, "between two requests of one crawl to one site")
    collections: str | None = _setting(
        None, "folder of the collections that streams may search (default: none)"
    )
    retrieval_max_s: float = _setting(30.0, "longest and default deadline of retrieval")
    max_retrievals: int = _setting(100, "retrievals at once; more are answered 503")
    log_level: str = _setting("info", "debug, info, warning or error")
    log_format: str = _setting("text", "text, or json: one object per line")

    def __post_init__(self) -> None:
        for name in _FROM_ONE:
            if getattr(self, name) < 1:
                raise SettingsError(name, "must be at least 1")
        for name in _ABOVE_ZERO:
            if getattr(self, name) <= 0:
                raise SettingsError(name, "must be above 0")
        for name in ("crawl_max_depth", "crawl_delay_s", "engine_max_streams", "drain_timeout_s"):
            if getattr(self, name) < 0:
                raise SettingsError(name, "must not be below 0")
        if not all(port.isdecimal() and 0 < int(port) < 65536 for port in self.crawl_ports):
            raise SettingsError("crawl_ports", "must be between 1 and 65535")
        try:
            _ = self.fetch_policy
        except ValueError as e:
            raise SettingsError("crawl_networks", str(e)) from e
        if self.routing not in POLICIES:
            raise SettingsError("routing", f"must be one of {', '.join(POLICIES)}")
        for name in ("port", "admin_port"):
            if not 0 <= getattr(self, name) < 65536:
                raise SettingsError(name, "must be between 0 and 65535")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise SettingsError("log_level", "must be debug, info, warning or error")
        if self.log_format not in ("text", "json"):
            raise SettingsError("log_format", "must be text or json")
        advertise = (self.advertise,) if self.advertise else ()
        named = {
            "engine": self.engine,
            "plain_engine": self.plain_engine,
            "decode_engine": self.decode_engine,
            "advertise": advertise,
        }
        for name, urls in named.items():
            for url in urls:
                if not url.startswith(("http://", "https://")):
                    raise SettingsError(name, f"{url!r} is no http(s) URL")
        engines = [
            url.rstrip("/") for url in (*self.engine, *self.plain_engine, *self.decode_engine)
        ]
        for url in engines:
            if engines.count(url) > 1:
                raise SettingsError("engine", f"{url} is named twice")
        if self.admin_port and not self.admin_key_file and not _is_loopback(self.admin_host):
            raise SettingsError("admin_key_file", "admin routes that others can reach need a key")
        if self.index and not self.advertise and self.host in ("0.0.0.0", "::", ""):
            raise SettingsError("advertise", "other gateways need a URL to reach this one by")

    @property
    def replica(self) -> str:
        """URL under which other replicas reach this one."""
        return (self.advertise or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def fetch_policy(self) -> FetchPolicy:
        """What crawls may fetch."""
        return FetchPolicy(
            ports=frozenset(map(int, self.crawl_ports)),
            allowed_hosts=self.crawl_allow,
            denied_hosts=self.crawl_deny,
            allowed_networks=self.crawl_networks,
        )


AT_RUN_TIME = frozenset(
    {
        "engine", "plain_engine", "decode_engine", "routing", "engine_max_streams", "eject_after",
        "drain_timeout_s", "max_streams", "max_chunk_bytes", "max_body_bytes", "idle_timeout_s",
        "poll_s", "poll_timeout_s", "heartbeat_s", "log_level",
        "handoff_min_tokens", "handoff_idle_tokens", "handoff_timeout_s", "max_queued_tokens",
        "max_tokenizing_bytes", "resume_s", "max_stream_s", "max_connections", "client_timeout_s",
        "keepalive_s", "engine_timeout_s",
    }
)  # fmt: skip
"""What a running gateway can be told anew; the rest is read when it starts."""

_FROM_ONE = (
    "max_streams", "max_chunk_bytes", "max_body_bytes", "token_cache", "crawl_max_pages",
    "max_retrievals", "eject_after", "handoff_min_tokens", "max_queued_tokens",
    "max_tokenizing_bytes", "max_connections",
)  # fmt: skip
_ABOVE_ZERO = (
    "index_timeout_s", "idle_timeout_s", "keep_finished_s", "lease_s", "poll_s", "heartbeat_s",
    "retrieval_max_s", "poll_timeout_s", "handoff_timeout_s", "max_stream_s", "resume_s",
    "client_timeout_s", "keepalive_s", "engine_timeout_s",
)  # fmt: skip


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class SettingsError(Exception):
    """A key is unknown or its value can't be used. Says which."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")


_TYPES: Mapping[str, Any] = get_type_hints(Settings)


_SAID: Mapping[Any, bool] = {True: True, False: False, "true": True, "false": False}


def _convert(key: str, value: Any) -> Any:
    """A value from a file, the environment or a flag, in the type of its setting."""
    if key not in _TYPES:
        raise SettingsError(key, f"unknown; known are {', '.join(sorted(_TYPES))}")
    kind = _TYPES[key]
    if kind == tuple[str, ...]:
        parts = [value] if isinstance(value, str) else value
        return tuple(p.strip() for part in parts for p in str(part).split(",") if p.strip())
    target = str if kind == (str | None) else kind
    if kind is bool:
        if value not in _SAID:
            raise SettingsError(key, f"{value!r} is neither true nor false")
        return _SAID[value]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise SettingsError(key, f"{value!r} is no {target.__name__}")
    try:
        return target(value)
    except ValueError as e:
        raise SettingsError(key, f"{value!r} is no {target.__name__}") from e


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gateway",
        description="A gateway that lets an LLM read its context while retrieval still runs.",
        epilog=f"Every setting can also be given in the file of --config (TOML, names with "
        f"underscores) or in the environment ({ENV_PREFIX}PORT=8000). Flags win over the "
        "environment, the environment wins over the file.",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    for setting in fields(Settings):
        default = setting.default if setting.default is not MISSING else None
        if isinstance(default, tuple):
            default = ",".join(default)
        shown = "" if default in (None, "", False) else f" (default: {default})"
        flag, help = "--" + setting.name.replace("_", "-"), setting.metadata["help"] + shown
        if _TYPES[setting.name] is bool:
            parser.add_argument(flag, action="store_const", const=True, help=help)
            continue
        parser.add_argument(
            flag,
            action="append" if _TYPES[setting.name] == tuple[str, ...] else "store",
            metavar=setting.name.rsplit("_", 1)[-1].upper(),
            help=help,
        )
    return parser


def load(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Settings:
    """Read the settings.

    Raises:
        SettingsError: a key is unknown or a value can't be used.
        SystemExit: `--help`, or flags that argparse refuses.
    """
    flags = vars(_parser().parse_args(argv))
    file = flags.pop("config")
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values |= tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError) as e:
            raise SettingsError("config", f"{file}: {e}") from e
    values |= {
        setting.name: environ[ENV_PREFIX + setting.name.upper()]
        for setting in fields(Settings)
        if ENV_PREFIX + setting.name.upper() in environ
    }
    values |= {name: value for name, value in flags.items() if value is not None}
    return replace(Settings(), **{key: _convert(key, value) for key, value in values.items()})


class Current:
    """The settings in force. Whoever needs one that can change at run time reads it here, each time
    anew."""

    def __init__(self, settings: Settings) -> None:
        self.now = settings
