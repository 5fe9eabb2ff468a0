"""Settings, prompts and request bodies: values in, values out."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import BadRequest, Unsupported
from gateway.prompt import place_documents
from gateway.requests import Create, Options, merged, read
from gateway.settings import Settings, SettingsError, load


def test_documents_go_before_the_last_question_or_where_the_client_says() -> None:
    def contents(*texts: str) -> list[str]:
        messages = [{"role": "user", "content": text} for text in texts]
        return [m["content"] for m in place_documents(messages)]

    first, last = contents("a", "b")
    assert first == "a"
    assert last.endswith("b")
    assert last != "b"
    first, last = contents("x {{documents}} y", "b")
    assert first.startswith("x ")
    assert "{{documents}}" not in first
    assert last == "b"
    with pytest.raises(BadRequest):
        contents("{{documents}}", "{{documents}}")
    with pytest.raises(BadRequest):
        place_documents([{"role": "system", "content": "a"}])


def test_settings_come_from_file_environment_and_flags_in_this_order(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('port = 1\nhost = "a"\nmax_streams = 7\nengine = ["http://x"]\n')
    environ = {"STREAM2LLM_PORT": "2", "STREAM2LLM_HOST": "b", "STREAM2LLM_CACHE": "elsewhere"}
    settings = load(["--config", str(file), "--port", "3"], environ)
    assert settings == Settings(port=3, host="b", max_streams=7, engine=("http://x",))


@pytest.mark.parametrize(
    ("argv", "environ", "key"),
    [
        (["--port", "many"], {}, "port"),
        (["--port", "70000"], {}, "port"),
        (["--engine", "somewhere"], {}, "engine"),
        ([], {"STREAM2LLM_LEASE_S": "-1"}, "lease_s"),
        ([], {"STREAM2LLM_LOG_LEVEL": "loud"}, "log_level"),
        (["--config", "/nonexistent.toml"], {}, "config"),
        ([], {"STREAM2LLM_CRAWL": "perhaps"}, "crawl"),
        (["--crawl-ports", "443,https"], {}, "crawl_ports"),
        (["--crawl-networks", "10.0.0.1/8"], {}, "crawl_networks"),
        (["--max-retrievals", "0"], {}, "max_retrievals"),
    ],
)
def test_a_bad_setting_is_named(argv: list[str], environ: dict[str, str], key: str) -> None:
    with pytest.raises(SettingsError, match=f"^{key}"):
        load(argv, environ)


def test_what_may_be_crawled_is_set_by_flags_environment_and_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('crawl_ports = [80, 8080]\ncrawl_deny = ["a.example", ".b.example"]\n')
    flags = [
        "--config",
        str(file),
        "--crawl-networks",
        "10.1.0.0/16",
        "--crawl-networks",
        "::1/128",
    ]
    for more, environ in ((["--crawl"], {}), ([], {"STREAM2LLM_CRAWL": "true"})):
        settings = load([*flags, *more], environ)
        assert settings.crawl
        policy = settings.fetch_policy
        assert policy.ports == {80, 8080}
        assert policy.denied_hosts == ("a.example", ".b.example")
        assert policy.allowed_networks == ("10.1.0.0/16", "::1/128")
    assert not load(flags, {}).crawl


def test_an_unknown_key_in_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text("prot = 1\n")
    with pytest.raises(SettingsError, match=r"^prot"):
        load(["--config", str(file)], {})


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        load(["--help"], {})
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name in Settings.__dataclass_fields__:
        assert "--" + name.replace("_", "-") in shown


def test_bodies_are_read_strictly() -> None:
    body = b'{"model": "m", "messages": [], "max_completion_tokens": 3, "stop": "x"}'
    sampling = read(Create, body).sampling()
    assert (sampling.max_tokens, sampling.stop) == (3, ["x"])
    with pytest.raises(Unsupported) as refused:
        read(Options, b'{"tools": []}')
    assert refused.value.param == "tools"
    with pytest.raises(BadRequest) as misspelt:
        read(Options, b'{"temprature": 1}')
    assert "temprature" in misspelt.value.message
    with pytest.raises(BadRequest) as wrong:
        read(Options, b'{"top_p": "high"}')
    assert wrong.value.param == "top_p"


def test_options_at_finish_override_those_of_the_stream() -> None:
    both = merged(Options(max_tokens=5, temperature=0.5), Options(max_tokens=7))
    assert (both.max_tokens, both.temperature) == (7, 0.5)


NAMES = ("max_tokens", "max_completion_tokens")


@pytest.mark.parametrize("before", NAMES)
@pytest.mark.parametrize("after", NAMES)
def test_the_length_said_at_finish_counts_by_whichever_name(before: str, after: str) -> None:
    first, later = Options(**{before: 5, "min_tokens": 2}), Options(**{after: 7})
    assert merged(first, later).answer_tokens == merged(later, Options()).answer_tokens == 7
    assert merged(first, Options(min_tokens=3)).answer_tokens == 5
    assert merged(first, later).min_tokens == 2
