"""The Dockerfile's own steps, run without an engine, and the server that they leave."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import dockerfile
import pytest
import tiny

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def python():
    """An interpreter that another user may run, where this process can become one."""
    own = Path(os.path.realpath(sys._base_executable))
    if os.geteuid() or all(path.stat().st_mode & 0o001 for path in (own, *own.parents)):
        return own
    if not Path("/usr/bin/python3").exists():
        pytest.skip("no Python on this machine that every user may run")
    return Path("/usr/bin/python3")


@pytest.fixture(scope="module")
def shared():
    """A folder that everyone may enter, as those of tmp_path are not."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.fixture(scope="module")
def image(shared):
    """What the Dockerfile leaves."""
    base = dockerfile.clean_environment(python(), shared / "bin")
    return dockerfile.build(ROOT / "serve" / "Dockerfile", ROOT, shared, base), base


@pytest.fixture(scope="module")
def folder(shared):
    from yunque.export.arguments import ExportArguments
    from yunque.export.folder import export

    place = shared / "models"
    tiny.t5().save_pretrained(place / "torch")
    tiny.tokenizer().save_pretrained(place / "torch")
    export(ExportArguments(model_name_or_path=str(place / "torch"), output_dir=str(place / "onnx"), parity_prompts=2))
    for path in (place, *place.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return place / "onnx"


def start(image, command, **options):
    """A process of the image: its environment, its folder and its user, where this one may become it."""
    found, base = image
    if os.geteuid() == 0:
        user, _, group = found.user.partition(":")
        options |= {"user": int(user), "group": int(group), "extra_groups": []}
    return subprocess.Popen(command, cwd=found.place("."), env=found.environment(base), text=True, **options)


def run(image, *command):
    process = start(image, command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return out


def written(place):
    return {path: path.lstat().st_mtime_ns for path in place.rglob("*")}


def test_it_holds_the_base_install_and_nothing_that_installs(image):
    code = (
        "import importlib.util as u, json, sys, yunque;"
        "names = ('torch', 'transformers', 'pip', 'setuptools', 'onnxruntime');"
        "print(json.dumps([[n for n in names if u.find_spec(n)], yunque.__file__]))"
    )
    there, file = json.loads(run(image, "python", "-c", code))
    assert there == ["onnxruntime"]
    assert Path(file).is_relative_to(image[0].place("/opt/yunque"))
    assert all(base.endswith("-slim") for base in image[0].bases)


def test_its_server_answers_as_another_user_writes_nothing_and_stops(image, folder):
    found, _ = image
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = written(found.root)
    command = [word.replace("8000", str(port)) for word in found.entrypoint]
    with start(image, [*command, f"tiny={folder}"], stderr=subprocess.PIPE) as process:
        try:
            answer = _complete(port, process)
            check = [word.replace("8000", str(port)) for word in found.healthcheck]
            run(image, *check)
        finally:
            process.send_signal(getattr(signal, found.stop_signal))
        _, log = process.communicate(timeout=30)
    assert process.returncode == 0, log
    assert answer["model"] == "tiny"
    assert answer["usage"]["completion_tokens"] > 0
    assert written(found.root) == before
    check = [word.replace("8000", str(port)) for word in found.healthcheck]
    with start(image, check, stderr=subprocess.DEVNULL) as process:  # nothing answers any more
        assert process.wait(30) == 1


def _complete(port, process):
    body = json.dumps({"model": "tiny", "prompt": "w5 w6 w7", "max_tokens": 5}).encode()
    end = time.monotonic() + 60
    while True:
        assert process.poll() is None, process.stderr.read()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=2)
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)
