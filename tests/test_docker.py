"""What can be known of the containers without a container engine: form, cross references, and what they promise."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from slos_serve.backend import probe
from slos_serve.backend.cli import SUBCOMMANDS
from slos_serve.backend.config import parse_config, read_config
from slos_serve.backend.launcher import Server
from slos_serve.backend.metrics import FAMILIES
from slos_serve.backend.replicas import write_router_repository
from slos_serve.backend.trtllm_settings import check_settings

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
FILES = ("Dockerfile", "Dockerfile.cpu")
KUBERNETES = "1.37"  # whose schemas the manifests are held against; `autoscaling/v2` is the newest kind, of 1.23
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # `make` puts them here
# Of the Dockerfile reference; anything else is a slip of the pen.
KEYWORDS = {"ARG", "FROM", "COPY", "SHELL", "RUN", "ENV", "USER", "EXPOSE", "ENTRYPOINT"}


def instructions(name: str) -> list[tuple[str, str]]:
    """Keyword and argument of each instruction; continued lines are joined, comments are left out."""
    text = "\n".join(line for line in (DOCKER / name).read_text().splitlines() if not line.lstrip().startswith("#"))
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.partition(" ")[0], line.partition(" ")[2].strip()) for line in lines]


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DOCKER / name).read_text()))


@pytest.mark.parametrize("name", FILES)
def test_a_dockerfile_is_pinned_and_runs_without_root(name: str) -> None:
    """A fixed base, sources that exist, no root, no shell between the signal and the server."""
    steps = instructions(name)
    assert {keyword for keyword, _ in steps} <= KEYWORDS
    base = next(value for keyword, value in steps if keyword == "FROM")
    if base == "${TRITON}":
        base = next(value for keyword, value in steps if keyword == "ARG").partition("=")[2]
    assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*", base), base
    for keyword, value in steps:
        if keyword == "COPY":
            *sources, _ = value.split()
            assert all((ROOT / source).exists() for source in sources)
        if keyword == "RUN":
            assert value.count("pip install") == value.count("--no-cache-dir")
    assert [value for keyword, value in steps if keyword == "USER"] == ["1000:1000"]
    entry = json.loads(next(value for keyword, value in steps if keyword == "ENTRYPOINT"))
    assert entry[:2] == ["slos-serve", "serve"]


def test_the_images_hold_every_package() -> None:
    """A package that is not copied would be missing from the installation without a word."""
    for name in FILES:
        copied = " ".join(value for keyword, value in instructions(name) if keyword == "COPY")
        assert all(f"{package} " in copied for package in ("scheduler", "backend", "client", "loadtest"))


def test_compose_names_what_is_there() -> None:
    """Mounted files exist, images are pinned, two instances have two GPUs, ports are open on this machine only."""
    compose = documents("compose.yaml")[0]
    services = compose["services"]
    assert set(services) == {"instance-0", "instance-1", "router", "prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":[\w.]+$", service["image"])
        assert service["restart"] == "unless-stopped"
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (DOCKER / source).exists(), volume
            assert source.startswith((".", "$")) or source in compose["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    devices = [
        services[name]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name in ("instance-0", "instance-1")
    ]
    assert devices == [["0"], ["1"]]
    for name in ("instance-0", "instance-1", "router"):
        assert services[name]["read_only"]
        assert services[name]["cap_drop"] == ["ALL"]
        assert "healthcheck" in services[name]


def engine_settings() -> Iterator[str]:
    yield (DOCKER / "instance/slos_llm/1/engine.json").read_text()
    yield next(
        item["data"]["engine.json"] for item in documents("kubernetes/instances.yaml") if item["kind"] == "ConfigMap"
    )


def test_the_shipped_engine_settings_are_served() -> None:
    """They are read, contradict nothing, and ask for the engine that the image has."""
    for text in engine_settings():
        config = parse_config(text)
        assert config.engine == "tensorrt_llm"
        check_settings(config, Path("/models/slos_llm/1"))
    read_config(DOCKER / "instance/slos_llm/1")


def test_the_router_finds_the_instances_by_their_service() -> None:
    """Its settings name the headless service, in compose and in the cluster."""
    compose = json.loads((DOCKER / "router/slos_router/1/router.json").read_text())
    config = next(item for item in documents("kubernetes/router.yaml") if item["kind"] == "ConfigMap")
    cluster = json.loads(config["data"]["router.json"])
    service = next(item for item in documents("kubernetes/instances.yaml") if item["kind"] == "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert compose["dns"] == cluster["dns"] == f"{service['metadata']['name']}:8001"


def test_the_routers_serve_what_the_command_would_write(tmp_path: Path) -> None:
    """Router and ensemble are those of `slos-serve serve --router`, in compose and in the cluster."""
    written = write_router_repository(tmp_path, {"model": "slos_llm", "dns": "instances:8001"})
    data = next(item for item in documents("kubernetes/router.yaml") if item["kind"] == "ConfigMap")["data"]
    keys = {
        "slos_router/config.pbtxt": "config.pbtxt",
        "slos_router/1/model.py": "model.py",
        "slos_ensemble/config.pbtxt": "ensemble.pbtxt",
    }
    for name, key in keys.items():
        expected = (written / name).read_text()
        assert (DOCKER / "router" / name).read_text() == expected
        assert data[key] == expected
    settings = json.loads((written / "slos_router/1/router.json").read_text())
    assert json.loads((DOCKER / "router/slos_router/1/router.json").read_text()) == settings
    assert json.loads(data["router.json"]) == settings


WORKLOADS = [
    item
    for name in ("kubernetes/instances.yaml", "kubernetes/router.yaml")
    for item in documents(name)
    if item["kind"] in ("StatefulSet", "Deployment")
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda item: str(item["metadata"]["name"]))
def test_a_pod_is_restricted_and_probed(workload: dict[str, Any]) -> None:
    """The restricted pod security standard, limits, three probes, and mounts of volumes that exist."""
    template = workload["spec"]["template"]
    pod = template["spec"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in pod["containers"]:
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True
        assert security["allowPrivilegeEscalation"] is False
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        ports = {port["name"] for port in container["ports"]}
        for name in ("startupProbe", "readinessProbe"):
            assert container[name]["httpGet"]["port"] in ports
        alive = container["livenessProbe"]
        program, name, *options = alive["exec"]["command"]
        parser = argparse.ArgumentParser()
        probe.add_arguments(parser)
        assert (program, name in SUBCOMMANDS) == ("slos-serve", True)
        assert parser.parse_args(options).timeout < alive["timeoutSeconds"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == set(volumes)
        writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
        assert writable == {"/tmp", "/dev/shm"}
        assert container["image"].startswith("IMAGE_")


def test_the_cluster_s_parts_point_at_each_other() -> None:
    """Services, budgets, policies and the scaler select what exists; every file is in the kustomization."""
    names = documents("kubernetes/kustomization.yaml")[0]["resources"]
    items = [item for name in names for item in documents(f"kubernetes/{name}")]
    assert {path.name for path in (DOCKER / "kubernetes").glob("*.yaml")} == {*names, "kustomization.yaml"}
    labels = [item["spec"]["template"]["metadata"]["labels"] for item in items if "template" in item.get("spec", {})]
    for item in items:
        assert {"apiVersion", "kind", "metadata"} <= set(item)
        selector = item.get("spec", {}).get("selector") or item.get("spec", {}).get("podSelector") or {}
        wanted = selector.get("matchLabels", selector)
        assert not wanted or any(wanted.items() <= each.items() for each in labels), item["metadata"]["name"]
    scaler = next(item for item in items if item["kind"] == "HorizontalPodAutoscaler")
    target = scaler["spec"]["scaleTargetRef"]
    assert any(i["kind"] == target["kind"] and i["metadata"]["name"] == target["name"] for i in items)
    claims = {item["kind"] for item in items}
    assert {"StatefulSet", "Deployment", "PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"} <= claims
    images = {image["name"] for image in documents("kubernetes/kustomization.yaml")[0]["images"]}
    assert images == {"IMAGE_TRTLLM", "IMAGE_ROUTER"}


def exported() -> set[str]:
    """Names as they appear on the metrics page."""
    names: set[str] = set()
    for family in FAMILIES:
        names.add(family.name)
        if family.kind == "histogram":
            names |= {f"{family.name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    return names


def queries() -> Iterator[tuple[str, str]]:
    dashboard = json.loads((DOCKER / "grafana/dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for group in documents("prometheus/alerts.yml")[0]["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]
    for item in documents("kubernetes/autoscaling.yaml"):
        if item["kind"] == "ConfigMap":
            for rule in yaml.safe_load(item["data"]["config.yaml"])["rules"]:
                yield "adapter", rule["seriesQuery"]


@pytest.mark.parametrize(("where", "expression"), list(queries()))
def test_a_query_asks_for_metrics_that_are_exported(where: str, expression: str) -> None:
    """A dashboard of an unknown name stays empty, and an alert on one never fires."""
    asked = set(re.findall(r"\bslos_serve_\w+", expression))
    assert asked or "slos_serve:" in expression
    assert asked <= exported(), where


def test_the_dashboard_shows_what_it_should() -> None:
    """Attainment and admission per class, queue, KV, predicted against observed time, drafts, and the mode."""
    asked = " ".join(expression for _, expression in queries())
    for name in (
        "slos_serve_slo_total", "slos_serve_waiting_tokens", "slos_serve_kv_blocks", "slos_serve_accepted_tokens_total",
        "slos_serve_iteration_predicted_seconds_total", "slos_serve_iteration_seconds_total", "slos_serve_trtllm_mode",
    ):  # fmt: skip
        assert name in asked


# What the official tools say


def run(*command: str, cwd: Path = DOCKER) -> subprocess.CompletedProcess[str]:
    """A tool of this environment, or of the machine."""
    path = shutil.which(command[0], path=TOOLS)
    assert path is not None, f"{command[0]} is not installed: make test"
    return subprocess.run([path, *command[1:]], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FILES)
def test_hadolint_has_nothing_to_say(name: str) -> None:
    """The Dockerfile linter, with the shell commands in RUN."""
    done = run("hadolint", name)
    assert (done.returncode, done.stdout) == (0, "")


def composed(path: Path) -> int:
    """How the official schema of the compose specification likes a file: 0 when it does."""
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return run(sys.executable, *command).returncode


def test_compose_follows_the_official_schema(tmp_path: Path) -> None:
    """And a slip of the pen would not."""
    assert composed(DOCKER / "compose.yaml") == 0
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((DOCKER / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    assert composed(wrong) != 0


MANIFESTS = [
    item
    for path in sorted((DOCKER / "kubernetes").glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for item in documents(f"kubernetes/{path.name}")
]


@pytest.mark.parametrize("item", MANIFESTS, ids=lambda item: f"{item['kind']}-{item['metadata']['name']}")
def test_a_manifest_follows_the_official_schema(item: dict[str, Any]) -> None:
    """No field is unknown, none has the wrong type."""
    kubernetes_validate.validate(item, KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**item, "sepc": {}}, KUBERNETES, strict=True)


promtool = pytest.mark.skipif(
    shutil.which("promtool", path=TOOLS) is None, reason="promtool is not installed: make test, or its Debian package"
)


@promtool
@pytest.mark.parametrize(
    "command",
    [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"], ["check", "config", "prometheus.yml"]],
    ids=" ".join,
)
def test_promtool_accepts_rules_and_their_unit_tests(command: list[str]) -> None:
    """Prometheus's own tool reads the configuration and plays the alerts' tests."""
    done = run("promtool", *command, cwd=DOCKER / "prometheus")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_unit_test() -> None:
    """An alert that was never seen firing may be one that cannot."""
    rules = [rule for group in documents("prometheus/alerts.yml")[0]["groups"] for rule in group["rules"]]
    tests = [case for test in documents("prometheus/alerts_test.yml")[0]["tests"] for case in test["alert_rule_test"]]
    assert {rule["alert"] for rule in rules if "alert" in rule} == {c["alertname"] for c in tests if c["exp_alerts"]}


@promtool
def test_promtool_can_read_every_query_of_the_dashboard(tmp_path: Path) -> None:
    """Written down as recording rules, which it parses."""
    dashboard = json.loads((DOCKER / "grafana/dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [{"record": f"panel:{i}", "expr": expression} for i, expression in enumerate(asked)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = run("promtool", "check", "rules", "rules.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def samples(server: Server) -> dict[str, set[str]]:
    """Metrics by name, with their labels' names, off a real tritonserver's page."""
    with urllib.request.urlopen(f"http://{server.metrics}/metrics", timeout=10) as answer:
        page = answer.read().decode()
    return {name: set(re.findall(r"(\w+)=", some)) for name, some in re.findall(r"^(slos_serve_\w+){(.*)}", page, re.M)}


# What only TensorRT-LLM (see test_server_trtllm.py), guesses and evictions bring about.
RARE = {
    "slos_serve_trtllm_mode", "slos_serve_trtllm_events_total", "slos_serve_preemptions_total",
    "slos_serve_drafted_tokens_total", "slos_serve_accepted_tokens_total",
}  # fmt: skip


def test_a_running_server_exports_what_the_queries_ask_for(server: Server) -> None:
    """Names and labels, of a server that has answered a request."""
    body = json.dumps({"text_input": "def f(x)", "max_tokens": 12, "slo_class": "coding"}).encode()
    urllib.request.urlopen(f"http://{server.http}/v2/models/slos_llm/generate", body, timeout=60).read()
    # written one family after another, so a look may come in between
    asked = {name for _, expression in queries() for name in re.findall(r"\bslos_serve_\w+", expression)} - RARE
    until = time.monotonic() + 10
    while asked - set(exports := samples(server)) and time.monotonic() < until:
        time.sleep(0.1)
    for where, expression in queries():
        for name, selector in re.findall(r"\b(slos_serve_\w+)(?:{([^}]*)})?", expression):
            wanted = set(re.findall(r"(\w+)[=!]", selector)) - {"namespace", "pod"}  # these two are the scraper's
            assert name in RARE or wanted <= exports[name], where
