"""Who sends a request: its tenant by the key, and whether another replica has sent it on."""

from __future__ import annotations

import hmac

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.errors import Unauthorized
from gateway.keys import KEEPER, TENANTS
from gateway.logs import bind
from gateway.openapi import PATH as DESCRIPTION
from gateway.tenants import EVERYBODY, Tenant

TENANT = web.RequestKey("tenant", Tenant)
OPEN_PATHS = ("/health", "/ready", "/metrics", DESCRIPTION)
"""For those who watch over the gateway, and the description; they tell nothing of any tenant."""
FORWARDED = "X-Stream2llm-Forwarded"
"""On a request that another replica sent on: it is not sent on again. Its value is the tenant's
voucher, so a client can't pretend."""
CREDENTIALS = ("Authorization", "X-Api-Key")
"""The headers that can carry a key. Replicas pass them on, and each checks the key itself."""


@web.middleware
async def identified(request: web.Request, handler: Handler) -> web.StreamResponse:
    """No request without a tenant gets further than here."""
    if request.path not in OPEN_PATHS:
        tenant = request[TENANT] = _tenant(request)
        if tenant is not EVERYBODY:
            bind(tenant=tenant.name)
    return await handler(request)


def _tenant(request: web.Request) -> Tenant:
    tenants = request.app[TENANTS]
    if tenants.open:
        return EVERYBODY
    key = _key(request)
    if key is None:
        raise Unauthorized("there is no API key: send it as `Authorization: Bearer KEY`")
    tenant = tenants.of(as_sent(key))
    if tenant is None:
        raise Unauthorized("the API key is not known here")
    return tenant


def _key(request: web.Request) -> str | None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer" and key.strip():
        return key.strip()
    return request.headers.get("X-Api-Key")


def as_sent(header: str) -> bytes:
    """The bytes of a header's value, of which aiohttp makes a string whatever they are."""
    return header.encode("utf-8", "surrogateescape")


def tenant_of(request: web.Request) -> Tenant:
    """The tenant that sends a request."""
    return request[TENANT]


def is_forwarded(request: web.Request) -> bool:
    """Whether another replica has sent the request on."""
    value = request.headers.get(FORWARDED)
    voucher = tenant_of(request).voucher
    return value is not None and (
        not voucher or hmac.compare_digest(as_sent(value), voucher.encode())
    )


def sent_on(request: web.Request) -> dict[str, str]:
    """Headers with which another replica takes a request for one of the same tenant."""
    said = tenant_of(request).voucher or request.app[KEEPER].replica
    kept = {name: request.headers[name] for name in CREDENTIALS if name in request.headers}
    return {FORWARDED: said, **kept}
