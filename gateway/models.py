"""The models behind this gateway, by the engines' own lists: their adapters and aliases too."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec
from aiohttp import web

from gateway.engines import Engine
from gateway.errors import EngineFailed, ModelNotFound
from gateway.keys import ENGINES, SESSION

LISTING_S = 5.0
"""How long an engine may take to list its models."""

Cards = dict[str, dict[str, Any]]
"""What is said of each model, by its name."""


class _List(msgspec.Struct):
    data: list[dict[str, Any]]


async def listed(app: web.Application, headers: Mapping[str, str]) -> dict[Engine, Cards]:
    """The lists of the engines that answer.

    Args:
        headers: what engines are to hear of the request.
    """
    engines = app[ENGINES].ready
    lists = await asyncio.gather(*(_list(app, engine, headers) for engine in engines))
    return dict(zip(engines, lists, strict=True))


async def _list(app: web.Application, engine: Engine, headers: Mapping[str, str]) -> Cards:
    """An engine's list; of one that gives none, the model that it is known to serve."""
    known = "" if engine.info is None else engine.info.model
    url, timeout = engine.url + "/v1/models", aiohttp.ClientTimeout(total=LISTING_S)
    plain = {name: value for name, value in headers.items() if name != "Accept-Encoding"}
    with suppress(aiohttp.ClientError, TimeoutError, ValueError):
        async with app[SESSION].get(url, headers=plain, timeout=timeout) as answer:
            if answer.status == 200:
                found = msgspec.json.decode(await answer.read(), type=_List)
                return {card["id"]: card for card in found.data if isinstance(card.get("id"), str)}
    return {known: {"id": known, "object": "model"}}


async def engines_of(
    app: web.Application, model: object, headers: Mapping[str, str]
) -> list[Engine]:
    """The engines to which a request for a model may be passed on, one or more. Where all serve
    the same, that is any, also for a name that is none of theirs: they know their adapters, and
    say it best.

    Args:
        model: as the request names it, if it does.
        headers: what engines are to hear of the request.

    Raises:
        EngineFailed: no engine answers.
        ModelNotFound
    """
    ready = app[ENGINES].ready
    if not ready:
        raise EngineFailed("no engine can be reached")
    served = sorted({engine.info.model for engine in ready if engine.info is not None})
    if len(served) == 1:
        return ready
    fit = [engine for engine in ready if engine.info is not None and engine.info.model == model]
    if not fit and isinstance(model, str):
        lists = await listed(app, headers)
        fit = [engine for engine, cards in lists.items() if model in cards]
    if not fit:
        raise ModelNotFound(f"no engine serves {model!r}; served: {served}", param="model")
    return fit
