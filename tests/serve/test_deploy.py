"""The files of deploy/: they parse, and what they name exists."""

import json
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

pytest.importorskip("fastapi", reason="the server is not installed: pip install '.[serve]'")

from prometheus_client.parser import text_string_to_metric_families

from dlm.cli import parse
from serve.api.operations import router
from serve.commands.serve import COMMAND
from serve.config import ServeConfig
from serve.front import merge_metrics
from serve.metrics import Metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
UNIT = (DEPLOY / "dlm.service").read_text()
YAML = sorted(path.name for path in DEPLOY.glob("*.yaml"))


def documents(name):
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def settings(words):
    """Settings that `dlm serve` reads from words; a misspelt option ends the test."""
    return parse("dlm serve", COMMAND, words)


def entrypoint():
    return json.loads(re.search(r"^ENTRYPOINT (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])


def unit(key):
    return re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)


@pytest.mark.parametrize("name", YAML)
def test_yaml_parses(name):
    assert all(isinstance(document, dict) for document in documents(name))


# ---- images -----------------------------------------------------------------------------------------------


def test_an_image_starts_the_server_as_a_user_without_rights():
    assert entrypoint()[:2] == ["dlm", "serve"]
    command = json.loads(re.search(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)[1])
    config = settings([*entrypoint()[2:], *command])
    assert (config.host, config.port, config.model) == ("0.0.0.0", 8000, "default")
    for target in ("cpu", "cuda", "ray"):
        last = re.findall(r"^USER (\S+)$", stage(target), re.MULTILINE)
        assert last[-1] == "10001:10001", target
        assert "/opt/dlm /opt/dlm" in stage(target)
    assert re.fullmatch(
        r"python:3\.\d+\.\d+-slim-\w+", re.search(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)[1]
    )


def stage(name):
    """Text of a stage, those that it builds on before it."""
    stages = {}
    for head, text in re.findall(r"^FROM (.+)\n((?:(?!FROM ).*\n?)*)", DOCKERFILE, re.MULTILINE):
        source, _, label = head.partition(" AS ")
        stages[label] = stages.get(source, "") + text
    return stages[name]


def test_paths_of_the_health_checks_are_paths_of_the_server(paths):
    probed = re.findall(r"127\.0\.0\.1:8000(/\w+)", DOCKERFILE)
    for document in documents("kubernetes.yaml"):
        probed += re.findall(r"'path': '(/\w+)'", str(document))
        probed += re.findall(r"'prometheus.io/path': '(/\w+)'", str(document))
    probed += [job["metrics_path"] for job in documents("prometheus.yaml")[0]["scrape_configs"]]
    assert set(probed) == {"/health", "/ready", "/metrics"}
    assert set(probed) <= paths


@pytest.fixture
def paths():
    service = type("Service", (), {"config": ServeConfig(page=False)})()
    return {route.path for route in router(service).routes}


def test_files_that_the_image_copies_are_let_through(tmp_path):
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    through = {line[1:] for line in lines if line.startswith("!")}
    copied = set(re.findall(r"^COPY ((?!\.|--).+) \./$", DOCKERFILE, re.MULTILINE)[0].split())
    assert copied <= through
    assert all((ROOT / name).exists() for name in through)
    packages = set(re.search(r"^packages = \[\n(.*?)^\]", project(), re.MULTILINE | re.DOTALL)[1].split('"'))
    assert {name.split(".")[0] for name in packages if re.match(r"\w", name)} <= through


def project():
    return (ROOT / "pyproject.toml").read_text()


def test_requirements_of_an_image_are_those_of_the_project():
    def printed(extra):
        command = ["python3", str(DEPLOY / "requirements.py"), extra]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )

    serve, ray = printed("serve"), printed("ray")
    assert any(line.startswith("torch>=") for line in serve)
    assert any(line.startswith("fastapi") for line in serve)
    assert [line for line in ray if line not in serve] == ["ray[serve]>=2.60"]


@pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0,
    reason="no Docker daemon",
)
def test_the_image_builds():
    command = ["docker", "build", "--file", "deploy/Dockerfile", "--target", "cpu", "--tag", "dlm:test", "."]
    subprocess.run(command, cwd=ROOT, check=True)
    done = subprocess.run(
        ["docker", "run", "--rm", "--read-only", "dlm:test", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--replicas" in done.stdout


def test_compose_starts_the_images_with_options_that_exist():
    services = documents("compose.yaml")[0]["services"]
    assert set(services) == {"cpu", "cuda"}
    for name, service in services.items():
        config = settings([*entrypoint()[2:], *service["command"]])
        assert config.api_key_file == "/run/secrets/keys"
        assert service["build"]["target"] == name
        assert seconds(service["stop_grace_period"]) > config.grace


def seconds(text):
    return int(text.removesuffix("s"))


# ---- Kubernetes -------------------------------------------------------------------------------------------


def test_a_pod_starts_the_server_and_leaves_it_time_to_drain():
    deployment, service = documents("kubernetes.yaml")
    pod = deployment["spec"]["template"]["spec"]
    container = pod["containers"][0]
    config = settings([*entrypoint()[2:], *container["args"]])
    slept = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= slept + config.grace + 10
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {str(Path(config.api_key_file).parent), "/cache", "/tmp"} == mounted
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_the_settings_of_a_ray_service_are_those_of_the_server():
    spec = documents("rayservice.yaml")[0]["spec"]
    application = yaml.safe_load(spec["serveConfigV2"])["applications"][0]
    assert application["import_path"] == "serve.replicas:application"
    assert (ROOT / "serve" / "replicas.py").read_text().count("\ndef application(") == 1
    config = ServeConfig(**application["args"])
    workers = spec["rayClusterConfig"]["workerGroupSpecs"][0]
    assert workers["maxReplicas"] == config.max_replicas
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={spec['rayClusterConfig']['rayVersion']}\n" in constraints


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make test-ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_ray_reads_the_configuration_of_the_service():
    from ray.serve.schema import ServeDeploySchema

    from serve import replicas

    text = documents("rayservice.yaml")[0]["spec"]["serveConfigV2"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    named = {deployment.name for deployment in schema.applications[0].deployments}
    built = replicas.application(schema.applications[0].args)._bound_deployment
    assert named == {built.name, built.init_args[0]._bound_deployment.name}


# ---- systemd ----------------------------------------------------------------------------------------------


def test_the_unit_starts_the_server_with_settings_that_exist():
    words = shlex.split(unit("ExecStart")[0].replace("/etc/dlm/serve.yaml", str(DEPLOY / "serve.yaml")))
    assert words[1] == "serve"
    config = settings(words[2:])
    assert config.api_key_file == "%d/" + unit("LoadCredential")[0].split(":")[0]
    assert int(unit("TimeoutStopSec")[0]) > config.grace
    assert unit("KillSignal") == ["SIGTERM"]
    assert unit("DynamicUser") == ["yes"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze")
def test_systemd_finds_no_fault_in_the_unit(tmp_path):
    def faults(text):
        (tmp_path / "dlm.service").write_text(text.replace("/opt/dlm/bin/dlm", shutil.which("true")))
        done = subprocess.run(
            ["systemd-analyze", "verify", str(tmp_path / "dlm.service")], capture_output=True, text=True
        )
        return done.returncode, done.stderr

    assert faults(UNIT) == (0, "")
    assert "Unknown key" in faults(UNIT.replace("KillMode=", "KilMode="))[1]


# ---- what is measured -------------------------------------------------------------------------------------


def test_numbers_of_the_dashboard_are_numbers_of_the_server():
    metrics = Metrics("m")
    for counter in (metrics.failed, metrics.refused, metrics.answers):
        counter.inc(label="x")
    text = merge_metrics({"a": metrics.text().decode()}).decode()
    labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(queries) >= 12
    for query in queries:
        names = re.findall(r"dlm:\w+", query)
        assert names
        assert set(names) <= set(labels), query
        for by in re.findall(r"by \((.*?)\)", query):
            assert {label.strip() for label in by.split(",")} <= labels[names[0]] | {"instance"}, query
    assert "dlm:num_requests_running" in labels
