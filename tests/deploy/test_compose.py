"""Compose files as values: variables, durations, what is refused, and the project's own file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.compose import ComposeError, interpolate, read, seconds
from deploy.stack import FILE, variables

NAMES = {"SET": "value", "EMPTY": "", "OTHER": "other"}


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("$SET and ${SET}", "value and value"),
        ("$UNSET|${UNSET}", "|"),
        ("${UNSET:-a}${EMPTY:-b}${SET:-c}", "abvalue"),
        ("${UNSET-a}${EMPTY-b}${SET-c}", "avalue"),
        ("${SET:+a}${EMPTY:+b}${EMPTY+c}", "ac"),
        ("${UNSET:-${EMPTY:-${OTHER}}}", "other"),
        ('${UNSET:-{"a": {}}}', '{"a": {}}'),
        ("${SET:?why}", "value"),
        ("$$SET costs 5$", "$SET costs 5$"),
    ],
)
def test_variables_are_filled_in_as_compose_does(text: str, filled: str) -> None:
    assert interpolate(text, NAMES) == filled


@given(st.text())
def test_a_text_with_its_dollars_doubled_comes_out_as_it_was(text: str) -> None:
    assert interpolate(text.replace("$", "$$"), NAMES) == text


@given(st.text(st.characters(exclude_characters="${}")))
def test_a_default_comes_out_as_it_was(text: str) -> None:
    assert interpolate("a${UNSET:-" + text + "}z", NAMES) == f"a{text}z"


@pytest.mark.parametrize("text", ["${SET", "${UNSET:?must be named}", "${SET*}"])
def test_what_can_not_be_filled_in_is_an_error(text: str) -> None:
    with pytest.raises(ComposeError):
        interpolate(text, NAMES)


@pytest.mark.parametrize(
    ("text", "value_s"), [("5s", 5), ("1m30s", 90), ("10m", 600), ("200ms", 0.2), ("1h", 3600)]
)
def test_durations(text: str, value_s: float) -> None:
    assert seconds(text) == pytest.approx(value_s)
    with pytest.raises(ComposeError):
        seconds(text + "x")


@pytest.mark.parametrize(
    ("service", "names"),
    [
        ("{image: i, entrypoint: [e], hostname: h}", "hostname"),
        ("{image: i}", "entrypoint"),
        ("{image: i, entrypoint: [e], depends_on: {b: {condition: service_started}}}", "b"),
        ("{image: i, entrypoint: [e], healthcheck: {test: 5}}", "test"),
    ],
)
def test_what_a_run_would_pass_over_is_refused_by_name(
    service: str, names: str, tmp_path: Path
) -> None:
    file = tmp_path / "compose.yml"
    file.write_text(f"name: x\nservices:\n  a: {service}\n")
    with pytest.raises(ComposeError, match=names):
        read(file, set(), {})


def test_the_projects_file_fits_the_compose_specification() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_each_profile_has_the_whole_stack(profile: str) -> None:
    project = read(FILE, {profile}, variables(FILE, profile))
    names = {name for name, _ in project.names()}
    assert names > {"prefill", "decode", "gateway-1", "gateway-2", "proxy", "redis", "prometheus",
                    "grafana", "locust"}  # fmt: skip
    for name, service in project.services.items():
        has_health = service.healthcheck is not None
        assert has_health or name == "model", name
        # BusyBox takes localhost for an IPv6 address only, and the services listen on IPv4.
        assert "localhost" not in str(service.healthcheck)
        assert ":" in service.image
        assert not service.image.endswith("latest")


def test_only_the_front_door_and_the_pages_are_published_and_only_to_this_machine() -> None:
    project = read(FILE, {"cpu"}, {})
    hosts = {n: {p.host for p in s.published} for n, s in project.services.items() if s.ports}
    assert set(hosts) == {"proxy", "prometheus", "grafana", "locust"}
    assert set.union(*hosts.values()) == {"127.0.0.1"}
