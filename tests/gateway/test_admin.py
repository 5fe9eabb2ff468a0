"""What operators do: who is let in, engines, settings."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.keys import SETTINGS
from gateway.pool import configured
from gateway.reloading import difference, in_force, shown
from gateway.settings import Settings, SettingsError, load
from tests.conftest import until
from tests.fake_engine import MODEL
from tests.gateway.pools import QUESTION, Breakable, Front, front, served

KEY = "a long admin key"


async def call(f: Front, method: str, path: str, body: Any = None) -> httpx.Response:
    return await f.http.request(method, f.admin_url + path, json=body)


@pytest.mark.parametrize("said", [KEY, "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()])
async def test_nothing_is_said_without_the_key(model_dir: Path, tmp_path: Path, said: str) -> None:
    file = tmp_path / "key"
    file.write_text(said + "\n")
    async with front(model_dir, 0, key_file=str(file)) as f:
        url = f.admin_url + "/admin/engines"
        for headers in ({}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": KEY}):
            refused = await f.http.get(url, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_admin_key"
        let_in = await f.http.get(url, headers={"Authorization": f"Bearer {KEY}"})
        assert let_in.json() == {"engines": []}
        assert (await f.http.get(f.url + "/admin/engines")).status_code == 404


async def test_a_web_page_can_not_use_the_browser_of_an_operator(model_dir: Path) -> None:
    async with front(model_dir, 0) as f:
        url = f.admin_url + "/admin/drain"
        refused = await f.http.post(url, headers={"Origin": "https://example.org"})
        assert refused.status_code == 401


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--admin-port", "9000", "--admin-host", "0.0.0.0"], "admin_key_file"),
        (["--admin-port", "70000"], "admin_port"),
        (["--engine", "http://a", "--plain-engine", "http://a/"], "engine"),
        (["--eject-after", "0"], "eject_after"),
    ],
)
def test_settings_that_can_not_be_are_named(flags: list[str], key: str) -> None:
    with pytest.raises(SettingsError, match=f"^{key}"):
        load(flags, {})


async def test_engines_are_listed_added_drained_and_removed(model_dir: Path) -> None:
    more = Breakable()
    async with front(model_dir, 1) as f, served(more.app()) as more.url:
        created = await call(f, "POST", "/admin/engines", {"url": more.url})
        assert created.status_code == 201
        engine_id = created.json()["id"]
        assert (await call(f, "POST", "/admin/engines", {"url": more.url})).status_code == 409
        await f.standing(more, "healthy")
        listed = (await call(f, "GET", "/admin/engines")).json()["engines"]
        assert [(e["url"], e["standing"]) for e in listed] == [
            (f.engines[0].url, "healthy"),
            (more.url, "healthy"),
        ]
        assert listed[1]["model"] == MODEL
        path = f"/admin/engines/{engine_id}"
        assert (await call(f, "POST", path + "/drain")).status_code == 202
        await f.standing(more, "drained")
        back = await call(f, "DELETE", path + "/drain")
        assert back.json()["standing"] == "healthy"
        assert (await call(f, "DELETE", path)).status_code == 202

        async def gone() -> bool:
            return (await call(f, "DELETE", path)).status_code == 404

        await until(gone, within_s=5)
        assert more.url not in (await call(f, "GET", "/metrics")).text


async def test_bad_requests_say_what_is_wrong(model_dir: Path) -> None:
    async with front(model_dir, 0) as f:
        for body, status in (
            ({"url": "somewhere"}, 400),
            ({"url": "http://a", "role": "spare"}, 400),
            ({"role": "engine"}, 400),
            ({"url": "http://a", "more": 1}, 400),
            ({"url": "http://a", "role": "decode"}, 503),  # nothing here can speak with one
        ):
            answer = await call(f, "POST", "/admin/engines", body)
            assert answer.status_code == status, body
            assert answer.json()["error"]["message"]
        assert (await call(f, "DELETE", "/admin/engines/a")).status_code == 404
        assert (await call(f, "GET", "/admin/nothing")).status_code == 404


async def test_streams_are_counted_without_a_word_of_theirs(model_dir: Path) -> None:
    async with front(model_dir, 1) as f, f.client.stream(MODEL, QUESTION) as stream:
        await stream.send("a secret")
        answer = await call(f, "GET", "/admin/streams")
        assert answer.json() == {
            "streams": 1,
            "by_state": {"open": 1},
            "by_model": {MODEL: 1},
            "by_engine": {f.engines[0].url: 1},
            "requests": 0,
        }


async def test_settings_are_shown_without_what_is_secret_in_urls(model_dir: Path) -> None:
    async with front(model_dir, 0) as f:
        assert (await call(f, "GET", "/admin/config")).json()["max_streams"] == 10_000
    settings = Settings(
        index="rediss://user:word@redis:1/0?password=word", engine=("http://me:word@a:1",)
    )
    assert "word" not in str(shown(settings))
    assert shown(settings)["index"] == "rediss://***@redis:1/0?***"


# Reload.

urls = st.sets(st.sampled_from([f"http://{name}" for name in "abcdef"]))


@st.composite
def configurations(draw: st.DrawFn) -> Settings:
    named = sorted(draw(urls))
    roles = [draw(st.sampled_from(["engine", "plain_engine", "decode_engine"])) for _ in named]
    engines = {
        role: tuple(u for u, r in zip(named, roles, strict=True) if r == role) for role in roles
    }
    return Settings(
        **engines, poll_s=draw(st.sampled_from([0.5, 1.0])), port=draw(st.integers(1, 3))
    )


@given(before=configurations(), wanted=configurations())
def test_a_difference_leads_from_one_set_of_engines_to_the_other(
    before: Settings, wanted: Settings
) -> None:
    found = difference(before, wanted)
    engines = dict(configured(before))
    for url in found.removed:
        del engines[url]
    assert not engines.keys() & found.added.keys()
    assert engines | found.changed | found.added == configured(wanted)
    after = in_force(before, wanted)
    assert after.port == before.port
    assert found.restart == (() if before.port == wanted.port else ("port",))
    assert found.applied == (() if before.poll_s == wanted.poll_s else ("poll_s",))
    assert difference(after, wanted).restart == found.restart
    assert not difference(after, wanted).applied


async def test_a_file_that_has_changed_is_put_into_force(model_dir: Path, tmp_path: Path) -> None:
    file, more = tmp_path / "gateway.toml", Breakable()

    def read_again() -> Settings:
        return load(["--config", str(file)], {})

    async with front(model_dir, 1, read_again=read_again) as f, served(more.app()) as more.url:
        old = f.engines[0]
        common = f'tokenizer = "{model_dir}"\npoll_s = 0.05\n'
        async with f.client.stream(MODEL, QUESTION) as stream:
            await stream.send("at the old engine")
            file.write_text(f'{common}engine = ["{more.url}"]\nmax_streams = 2\nport = 81\n')
            answer = await call(f, "POST", "/admin/reload")
            assert answer.json() == {
                "added": {more.url: "engine"},
                "removed": [old.url],
                "changed": {},
                "applied": ["max_streams"],
                "restart": ["port"],
            }
            assert f.at(old).standing == "draining"
            await f.standing(more, "healthy")
            await stream.finish()
        assert old.fake.finished

        async def replaced() -> bool:
            return [e.url for e in f.pool.members] == [more.url]

        await until(replaced, within_s=5)
        file.write_text(f'{common}engine = ["{more.url}"]\nmax_streams = 1\npolicy = "best"\n')
        refused = await call(f, "POST", "/admin/reload")
        assert refused.status_code == 400
        assert "policy" in refused.json()["error"]["message"]
        assert f.app[SETTINGS].now.max_streams == 2
        created = [
            await f.http.post(f.url + "/v1/streams", json={"model": MODEL, "messages": QUESTION})
            for _ in range(3)
        ]
        assert [response.status_code for response in created] == [201, 201, 503]


async def test_an_engine_whose_role_has_changed_joins_again(
    model_dir: Path, tmp_path: Path
) -> None:
    wanted: list[Settings] = []
    async with front(model_dir, 1, read_again=lambda: wanted[0]) as f:
        url = f.engines[0].url
        wanted.append(Settings(plain_engine=(url,), tokenizer=str(model_dir), poll_s=0.05))
        answer = (await call(f, "POST", "/admin/reload")).json()
        assert answer["changed"] == {url: "plain"}

        async def plain() -> bool:
            return [e.role for e in f.pool.members] == ["plain"]

        await until(plain, within_s=5)
