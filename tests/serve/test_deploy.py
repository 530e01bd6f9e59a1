"""The deployment files agree with each other and with the server's own options."""

import re
import shutil
import subprocess
from pathlib import Path

import dockerfile
import pytest
import yaml

from yunque.serving.routes import OPERATIONS
from yunque.serving.settings import parse_settings

SERVE = Path(__file__).parents[2] / "serve"
KUBERNETES = SERVE / "kubernetes"
PORT, USER, DRAIN_S = 8000, 10001, 30.0
OPEN = {operation.path for operation in OPERATIONS if operation.access == "open"}


def image():
    """What the Dockerfile says, without running a step."""
    found = dockerfile.Image(Path("/nowhere"))
    for word, text in dockerfile.read(SERVE / "Dockerfile"):
        if word in ("USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"):
            dockerfile._step(found, word, text, SERVE, {}, {})
    return found


def manifests():
    wanted = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["resources"]
    assert {*wanted, "kustomization.yaml"} == {path.name for path in KUBERNETES.iterdir()}
    found = [yaml.safe_load((KUBERNETES / name).read_text()) for name in wanted]
    return {each["kind"]: each for each in found}


def pod():
    spec = manifests()["Deployment"]["spec"]["template"]["spec"]
    [container] = spec["containers"]
    return spec, container


def settings(arguments):
    """The server's settings as it would be started in the image."""
    started = image().entrypoint
    assert started[:2] == ["yunque", "serve"]
    return parse_settings([*started[2:], *arguments], "yunque serve")


def unit():
    text = (SERVE / "yunque.service").read_text()
    return dict(line.split("=", 1) for line in text.splitlines() if re.match(r"[A-Za-z]+=", line))


def seconds(text):
    return float(text.removesuffix("s"))


def test_the_image_starts_the_server_on_its_port_as_nobody_in_particular():
    found = image()
    options = settings(found.command)
    assert (options.host, options.port) == ("0.0.0.0", PORT)
    assert found.ports == [PORT]
    assert found.user == f"{USER}:{USER}"
    assert found.stop_signal == "SIGTERM"
    [address] = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", found.healthcheck[-1])
    assert address == (str(PORT), "/health")
    assert "/health" in OPEN


def test_what_the_image_copies_is_there_and_not_ignored():
    allowed = [line[1:] for line in (SERVE / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"]
    copies = [text.split()[:-1] for word, text in dockerfile.read(SERVE / "Dockerfile") if word == "COPY"]
    sources = {source for words in copies if not words[0].startswith("--from") for source in words}
    assert sources == {*allowed}
    assert all((SERVE.parent / source).exists() for source in sources)


def test_compose_runs_the_image_hardened_and_gives_it_time_to_drain():
    compose = yaml.safe_load((SERVE / "compose.yaml").read_text())
    service = compose["services"]["yunque"]
    options = settings(service["command"])
    assert seconds(service["stop_grace_period"]) > options.drain_timeout_s == DRAIN_S
    assert service["ports"] == [f"127.0.0.1:${{YUNQUE_PORT:-8000}}:{PORT}"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["user"] == image().user
    assert options.threads == int(service["deploy"]["resources"]["limits"]["cpus"])
    assert (SERVE / service["build"]["context"] / service["build"]["dockerfile"]).exists()
    assert options.api_key_file == Path("/run/secrets") / service["secrets"][0]
    assert {path.parent for path in options.models.values()} == {Path("/models")}
    assert service["volumes"][0].endswith(":/models:ro")
    wanted = set(re.findall(r"\$\{(\w+)", (SERVE / "compose.yaml").read_text()))
    given = set(re.findall(r"^(\w+)=", (SERVE / "serve.env.example").read_text(), re.MULTILINE))
    assert wanted == given


def test_the_pod_is_probed_drained_and_hardened():
    spec, container = pod()
    options = settings(container["args"])
    sleep = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep[0] == "sleep"
    assert spec["terminationGracePeriodSeconds"] > float(sleep[1]) + options.drain_timeout_s
    [port] = container["ports"]
    assert port["containerPort"] == PORT
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready", "readiness": "/ready", "liveness": "/health",
    }  # fmt: skip
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert {probe["path"] for probe in probes.values()} <= OPEN
    # not one probe answered while a pod stops sends it new requests
    ready = container["readinessProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] <= float(sleep[1])
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] == USER
    inside = container["securityContext"]
    assert (inside["readOnlyRootFilesystem"], inside["allowPrivilegeEscalation"]) == (True, False)
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert options.threads == int(container["resources"]["requests"]["cpu"])
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert all(mount["readOnly"] for mount in mounts.values())
    assert {str(path.parent) for path in options.models.values()} <= {*mounts}
    assert str(options.api_key_file.parent) in mounts
    assert {volume["name"] for volume in spec["volumes"]} == {mount["name"] for mount in mounts.values()}


def test_the_manifests_mean_the_same_pods():
    found = manifests()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == pod()[1]["ports"][0]["name"]
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", found["Deployment"]["metadata"]["name"])
    assert "replicas" not in found["Deployment"]["spec"]  # a second hand on what the autoscaler sets
    assert (
        found["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > found["PodDisruptionBudget"]["spec"]["minAvailable"]
    )
    [image_name] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())["images"]
    assert image_name["name"] == pod()[1]["image"]
    scraped = found["Deployment"]["spec"]["template"]["metadata"]["annotations"]
    assert scraped["prometheus.io/port"] == str(PORT)
    assert scraped["prometheus.io/path"] in {operation.path for operation in OPERATIONS}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
def test_kubectl_builds_the_manifests():
    done = subprocess.run(["kubectl", "kustomize", KUBERNETES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = {each["kind"] for each in yaml.safe_load_all(done.stdout)}
    assert kinds == {*manifests()}
    assert "image: registry.example.com/yunque-serve:latest" in done.stdout


def test_the_unit_and_its_settings_agree():
    found = unit()
    command = found["ExecStart"].split()
    assert command[:2] == ["/opt/yunque/bin/yunque", "serve"]
    arguments = [word.replace("/etc/yunque/serve.yaml", str(SERVE / "serve.yaml")) for word in command[2:]]
    options = parse_settings(arguments, "yunque serve")
    assert float(found["TimeoutStopSec"]) > options.drain_timeout_s
    assert options.port == PORT
    credential, _, _ = found["LoadCredential"].partition(":")
    assert options.api_key_file.name == credential
    assert found["KillSignal"] == "SIGTERM"
    assert found["RestartPreventExitStatus"] == "2"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on this machine")
def test_systemd_takes_the_unit_and_finds_it_little_exposed(tmp_path):
    text = (SERVE / "yunque.service").read_text().replace("/opt/yunque/bin/yunque", "/bin/true")
    (tmp_path / "yunque.service").write_text(text)
    for command in (["verify"], ["security", "--offline=true", "--threshold=20"]):
        done = subprocess.run(
            ["systemd-analyze", *command, tmp_path / "yunque.service"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "yunque.service:" not in done.stderr  # unknown keys are only warned about
