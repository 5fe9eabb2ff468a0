"""What containers and pages are made of: linters where they are, and names that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy.check import metrics_of, queries
from deploy.compose import Project, read
from deploy.places import free_subnet, mounted, places
from deploy.stack import FILE, ROOT
from gateway.telemetry import Metrics

OF_OTHERS = {
    # vLLM 0.32
    "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc", "vllm:num_preemptions_total",
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total", "vllm:prompt_tokens_total",
    # Prometheus, HAProxy, the exporter of Redis, Locust
    "up", "haproxy_backend_http_responses_total", "redis_commands_processed_total",
    "redis_connected_clients", "locust_failures_total", "locust_requests_total", "locust_users",
}  # fmt: skip
"""Metrics that the dashboard may name, as seen at their `/metrics`; tests/engine asks for them."""


@pytest.fixture(scope="module")
def project() -> Project:
    return read(FILE, {"cpu"}, {})


def test_dockerfiles_pass_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    files = sorted(map(str, (ROOT / "deploy" / "images").glob("*.Dockerfile")))
    assert len(files) == 4
    done = subprocess.run([hadolint, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", sorted((ROOT / "deploy" / "images").glob("*.Dockerfile")))
def test_images_have_their_own_user_a_health_check_and_pinned_bases(path: Path) -> None:
    text = path.read_text()
    assert re.search(r"^USER 10001$", text, re.MULTILINE)
    assert "\nHEALTHCHECK " in text
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2, "one to build in, one to run in"
    assert all(re.search(r":v?\d+\.\d+\.\d+", base) for base in bases)
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert all((ROOT / source).exists() for source in sources)


def test_prometheus_takes_its_configuration_and_scrapes_services_of_the_stack(
    project: Project,
) -> None:
    file = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    names = {name for name, _ in project.names()}
    jobs = yaml.safe_load(file.read_text())["scrape_configs"]
    targets = [t for job in jobs for config in job["static_configs"] for t in config["targets"]]
    assert {target.split(":")[0] for target in targets} <= names
    if promtool := shutil.which("promtool"):
        command = [promtool, "check", "config", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_haproxy_takes_its_configuration_and_sends_to_both_gateways(
    project: Project, tmp_path: Path
) -> None:
    here = places(project, tmp_path, ROOT, free_subnet())
    (file,) = mounted(here, "proxy", project.services["proxy"], ROOT, tmp_path).values()
    text = file.read_text()
    for name in ("gateway-1", "gateway-2"):
        assert f"server {name} {here.addresses[name]}:8000 check" in text
    if haproxy := shutil.which("haproxy"):
        done = subprocess.run(
            [haproxy, "-c", "-f", str(file)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def test_every_metric_of_the_dashboard_exists() -> None:
    ours = set(re.findall(r"^# TYPE (\S+)", Metrics().render().decode(), re.MULTILINE))
    asked = list(queries())
    assert len(asked) > 30
    for query in asked:
        for name in metrics_of(query.expression):
            known = name in OF_OTHERS or name.removesuffix("_bucket") in ours
            assert known, f"{query.panel}: {name}"


def test_every_metric_of_an_alert_exists() -> None:
    ours = set(re.findall(r"^# TYPE (\S+)", Metrics().render().decode(), re.MULTILINE))
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        names = metrics_of(rule["expr"])
        assert names
        assert {name.removesuffix("_bucket") for name in names} <= ours | {"up"}
