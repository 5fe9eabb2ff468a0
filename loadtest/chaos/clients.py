"""The clients of a chaos run: what each of them does with its stream."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import aiohttp
import httpx
import orjson

from gateway.client import Client, StreamError
from loadtest.chaos.answers import Answer
from loadtest.chaos.bed import MODEL
from loadtest.chaos.calls import BROKEN, REQUEST_S, Caller, Refused, code_of, parsed
from loadtest.chaos.history import History, Json, Kind, Post

SHARES: Mapping[Kind, float] = {
    "crawl": 45, "ann": 22, "simple": 9, "one request": 6, "delete": 6, "leave": 7, "silent": 5,
}  # fmt: skip
WORDS = ("river", "stone", "signal", "garden", "copper", "window", "letter", "engine", "winter",
         "paper", "island", "market", "silver", "bridge", "forest", "harbor")  # fmt: skip
GAPS_S = (0.02, 0.7)


class Player:
    """Plays one stream."""

    def __init__(
        self, http: aiohttp.ClientSession, urls: Sequence[str], history: History, seed: int
    ) -> None:
        self._rng = random.Random(f"client {seed} {history.number}")
        self._history = history
        self._call = Caller(http, urls, history, self._rng)
        self._key = f"chaos-{seed}-{history.number}"
        self._texts = {f"d{i}": self._text(i) for i in range(self._rng.randrange(2, 9))}
        self._known = set[str]()
        """Texts that its stream has by their ids."""
        self._path = ""

    async def play(self) -> None:
        """From its opening to its end, whatever that is."""
        plays: Mapping[Kind, Callable[[], Awaitable[None]]] = {
            "crawl": self._crawl, "ann": self._ann, "simple": self._simple,
            "one request": self._one_request, "delete": self._delete, "leave": self._leave,
            "silent": self._silent,
        }  # fmt: skip
        try:
            await plays[self._history.kind]()
        except Refused as e:
            self._history.gave_up = e.code
            if self._path:  # as a polite client does
                with suppress(Refused):
                    await self._call.asked("cancel", "DELETE", self._path, None)

    # What they do.

    async def _crawl(self) -> None:
        await self._open()
        await self._append(list(self._texts.values()))
        await self._answer()

    async def _ann(self) -> None:
        """Better and better rankings, in which an id stands for what was sent before."""
        await self._open()
        names = list(self._texts)
        for size in range(1, len(names) + 1):
            ranked = names[:size]
            self._rng.shuffle(ranked)
            await self._post(Post(tuple(self._texts[name] for name in ranked), True))
        await self._answer()

    async def _simple(self) -> None:
        """With the client of the project, without a second try."""
        history = self._history
        async with Client(self._call.url, timeout_s=REQUEST_S) as client:
            begun_s, what = time.monotonic(), "open"

            def note(outcome: str) -> None:
                self._call.note(what, outcome, begun_s)

            try:
                async with client.stream(
                    MODEL, history.messages, max_tokens=history.answer_tokens, temperature=0.0
                ) as stream:
                    note("ok")
                    for text in self._texts.values():
                        await asyncio.sleep(self._rng.uniform(*GAPS_S))
                        begun_s, what = time.monotonic(), "post"
                        post = Post((text,), False)
                        history.posts.append(post)
                        post.taken = {"tokens": await stream.send(text)}
                        note("ok")
                    begun_s, what = time.monotonic(), "answer"
                    async for piece in stream.answer():
                        history.text += piece
                    history.complete = True
                    note("ok")
            except StreamError as e:
                history.gave_up = e.code or "broken"
                note(history.gave_up)
            except httpx.TimeoutException:
                history.gave_up = "hung"
                note("hung")
            except httpx.TransportError:
                history.gave_up = "broken"
                note("broken")

    async def _one_request(self) -> None:
        """All in one body, which comes slowly."""
        history, begun_s, outcome = self._history, time.monotonic(), "broken"
        history.posts = [Post((text,), False, {}) for text in self._texts.values()]
        try:
            async with (
                asyncio.timeout(REQUEST_S),
                self._call.http.post(
                    self._call.url + "/v1/streams",
                    data=self._lines(),
                    headers={"Content-Type": "application/x-ndjson"},
                ) as response,
            ):
                answer = parsed(await response.read())
                outcome = "ok" if response.status == 200 else code_of(answer, response.status)
                if response.status == 200:
                    history.text = answer["choices"][0]["message"]["content"]
                    history.complete = True
        except TimeoutError:
            outcome = "hung"
        except BROKEN:
            pass
        self._call.note("one request", outcome, begun_s)
        history.gave_up = None if outcome == "ok" else outcome

    async def _delete(self) -> None:
        await self._open()
        await self._append(list(self._texts.values())[:2])
        await self._call.asked("cancel", "DELETE", self._path, None)

    async def _leave(self) -> None:
        """Hang up in the middle of the answer."""
        await self._open()
        await self._append(list(self._texts.values()))
        key = self._key if self._rng.random() < 0.5 else None
        body = self._last_post()
        await Answer(self._call, self._path, body, key).read(self._rng.randrange(1, 9))

    async def _silent(self) -> None:
        await self._open()
        await self._append(list(self._texts.values())[:2])

    # How they do it.

    async def _open(self) -> None:
        body = {
            "model": MODEL,
            "messages": self._history.messages,
            "max_tokens": self._history.answer_tokens,
            "temperature": 0.0,
        }
        created = await self._call.asked("open", "POST", "/v1/streams", body, self._key)
        self._path = f"/v1/streams/{created['id']}"

    async def _append(self, texts: Sequence[str]) -> None:
        for text in texts:
            await self._post(Post((text,), False))

    async def _post(self, post: Post) -> None:
        """One more; what a gateway has lost of those before is sent again first."""
        await asyncio.sleep(self._rng.uniform(*GAPS_S))
        self._history.posts.append(post)
        await self._bring(len(self._history.posts) - 1)

    async def _bring(self, seq: int) -> None:
        """Have posts from this number on acknowledged.

        Raises:
            Refused
        """
        posts = self._history.posts
        while seq < len(posts):
            try:
                taken = await self._send(posts[seq], seq)
            except Refused as e:
                expected = e.error.get("expected_seq")
                if e.code != "sequence_gap" or not isinstance(expected, int) or expected >= seq:
                    raise
                self._history.lost_posts += seq - expected
                seq = expected
                continue
            if taken.get("seq") != seq:
                self._history.odd.append(f"post {seq} was acknowledged as {taken.get('seq')}")
            posts[seq].taken = taken
            seq += 1

    async def _send(self, post: Post, seq: int) -> Json:
        if not post.replaces:
            body = {"text": post.texts[0], "seq": seq}
            return await self._call.asked("post", "POST", self._path + "/chunks", body)
        try:
            taken = await self._rank(post, seq)
        except Refused as e:
            if e.code != "unknown_document":
                raise
            self._known.clear()
            taken = await self._rank(post, seq)
        self._known.update(post.texts)
        return taken

    async def _rank(self, post: Post, seq: int) -> Json:
        names = {text: name for name, text in self._texts.items()}
        documents = [
            {"id": names[text]} | ({} if text in self._known else {"text": text})
            for text in post.texts
        ]
        body = {"documents": documents, "seq": seq}
        return await self._call.asked("list", "PUT", self._path + "/documents", body)

    async def _answer(self) -> None:
        """Ask, as often as the gateway lacks posts that were acknowledged."""
        body, in_one = self._last_post(), self._rng.random() < 0.3
        while True:
            try:
                if in_one:
                    await self._whole_body(body)
                else:
                    await Answer(self._call, self._path, body, self._key).whole()
                return
            except Refused as e:
                expected = e.error.get("expected_seq")
                if e.code != "sequence_gap" or not isinstance(expected, int):
                    raise
                self._history.lost_posts += len(self._history.posts) - expected
                await self._bring(expected)

    def _last_post(self) -> Json:
        """What `finish` says of the posts before it."""
        return {"seq": len(self._history.posts) - 1}

    async def _whole_body(self, body: Json) -> None:
        path, asked = self._path + "/finish", body | {"stream": False}
        answer = await self._call.asked("answer", "POST", path, asked, self._key)
        self._history.text = answer["choices"][0]["message"]["content"]
        self._history.complete = True

    async def _lines(self) -> AsyncIterator[bytes]:
        history = self._history
        options = {"max_tokens": history.answer_tokens, "temperature": 0.0, "stream": False}
        yield orjson.dumps({"model": MODEL, "messages": history.messages} | options) + b"\n"
        for text in self._texts.values():
            await asyncio.sleep(self._rng.uniform(*GAPS_S))
            yield orjson.dumps({"text": text}) + b"\n"
        yield b'{"finish": true}\n'

    def _text(self, number: int) -> str:
        """Like no other."""
        words = self._rng.choices(WORDS, k=self._rng.randrange(10, 120))
        return f"Stream {self._history.number}, document {number}: {' '.join(words)}."


def histories(seed: int, count: int) -> list[History]:
    """Streams to be played; the same ones for the same seed."""
    rng = random.Random(f"streams {seed}")
    kinds = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    return [
        History(i, kind, f"What is question {i} about?", rng.randrange(8, 120))
        for i, kind in enumerate(kinds)
    ]
