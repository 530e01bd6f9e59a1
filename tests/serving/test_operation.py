"""The server's life: killed and started again, its models swapped, ended under load."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from exported import exported, prompts  # noqa: F401
from served import Server

PROMPT = "w3 w4 w5"
LONG = {"prompt": PROMPT, "min_new_tokens": 1000, "max_new_tokens": 1000}


@pytest.fixture(scope="module")
def models(exported, tmp_path_factory):  # noqa: F811
    """Two models, and a link that points to the first."""
    first, second = exported("llama_grouped"), exported("llama")
    link = tmp_path_factory.mktemp("models") / "current"
    link.symlink_to(first.folder)
    return first, second, link


def ask(server, stream=False, **changed):
    """An answer's status, manifest and text; in full whatever happens to the server meanwhile."""
    body = {**LONG, "stream": stream, **changed}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
    manifest = answer.headers.get("x-yunque-manifest")
    if answer.status_code != 200:
        return answer.status_code, manifest, answer.json()["error"]["code"]
    if not stream:
        return 200, manifest, answer.json()["answers"][0]["text"]
    events = [line[6:] for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return 200, manifest, "".join(json.loads(event).get("text", "") for event in events[:-1])


def test_killed_started_again_swapped_and_ended_under_load(models, tmp_path):
    first, second, link = models
    options = (f"m={link}", "--threads", 1, "--drain_timeout_s", 30)
    texts = {
        _manifest(each.folder): each.runtime.generate([PROMPT], min_new_tokens=1000, max_new_tokens=1000)[0].text
        for each in (first, second)
    }
    with Server(tmp_path, *options, "--port", 0) as server, ThreadPoolExecutor(8) as pool:
        first_ready_ticks, port = server.ready_ticks, server.address[1]
        asking = [pool.submit(ask, server) for _ in range(4)]
        _until_running(server, 4)
        server.send(signal.SIGKILL)
        assert server.end() == -signal.SIGKILL
        assert all(isinstance(each.exception(), httpx.TransportError) for each in asking)
    with Server(tmp_path, *options, "--port", port) as server, ThreadPoolExecutor(12) as pool:
        assert server.ready_ticks < 2 * first_ready_ticks  # of the processor: others may be busy on this machine
        _swap_under_load(server, pool, models, texts)
        _end_under_load(server, pool, texts[_manifest(second.folder)])
        assert server.end() == 0
        (stopped,) = server.events("stopped")
        assert stopped["cut_off"] == 0


def _swap_under_load(server, pool, models, texts):
    first, second, link = models
    before = [pool.submit(ask, server, stream=number % 2 == 0) for number in range(4)]
    _until_running(server, 4)
    replacement = link.with_name("replacement")
    replacement.symlink_to(second.folder)
    os.replace(replacement, link)
    server.send(signal.SIGHUP)
    between = []
    while not server.events("swapped"):
        between.append(pool.submit(ask, server, max_new_tokens=20, min_new_tokens=20))
        time.sleep(0.05)
    server.wait_for("reloaded")
    after = pool.submit(ask, server, max_new_tokens=1000)
    for each in [*before, after]:
        status, manifest, text = each.result()
        assert (status, text) == (200, texts[manifest])
    assert {each.result()[1] for each in before} == {_manifest(first.folder)}
    assert after.result()[1] == _manifest(second.folder)
    assert [each.result()[0] for each in between] == [200] * len(between)


def _end_under_load(server, pool, text):
    accepted = [pool.submit(ask, server, stream=number % 2 == 0) for number in range(8)]
    _until_running(server, 8)
    server.send(signal.SIGTERM)
    server.wait_for("draining")
    assert ask(server, max_new_tokens=5, min_new_tokens=5)[::2] == (503, "draining")
    assert httpx.get(f"{server.url}/ready").json() == {"status": "draining"}
    assert [each.result()[::2] for each in accepted] == [(200, text)] * 8


def test_a_second_signal_hurries(models, tmp_path):
    with (
        Server(tmp_path, f"m={models[0].folder}", "--port", 0, "--threads", 1) as server,
        ThreadPoolExecutor(4) as pool,
    ):
        asking = [pool.submit(ask, server, prompt=[PROMPT] * 30) for _ in range(4)]
        _until_running(server, 4)
        server.send(signal.SIGTERM)
        server.wait_for("draining")
        began = time.monotonic()
        server.send(signal.SIGTERM)
        assert server.end() == 1  # some were cut off
        assert time.monotonic() - began < 5
        assert 503 in {each.result()[0] for each in asking if not each.exception()} | {503}
        assert "cut off" in server.events("text")[-1]["text"]


def test_admin_swaps_among_configured_folders(models, tmp_path):
    first, second, _ = models
    environment = {"YUNQUE_ADMIN_KEYS": "the-admin-key-of-this-test"}
    with Server(
        tmp_path, f"m={first.folder}", "--folders", f"next={second.folder}", f"broken={tmp_path}", "--port", 0,
        "--threads", 1, environment=environment,
    ) as server, server.client(headers={"Authorization": "Bearer the-admin-key-of-this-test"}) as client:  # fmt: skip
        swapped = client.post("/admin/swap", json={"model": "m", "folder": "next"})
        assert swapped.json() == {"model": "m", "manifest_sha256": _manifest(second.folder)}
        broken = client.post("/admin/swap", json={"model": "m", "folder": "broken"})
        assert (broken.status_code, broken.json()["error"]["code"]) == (409, "swap_failed")
        assert client.post("/admin/swap", json={"model": "m", "folder": str(first.folder)}).status_code in (400, 404)
        assert client.get("/v1/models").json()["data"][0]["manifest_sha256"] == _manifest(second.folder)
        _stalled = socket.create_connection(server.address)  # an idle connection keeps nobody
        server.send(signal.SIGTERM)
        assert server.end(10) == 0
        _stalled.close()


def _manifest(folder):
    from yunque.artifacts import MANIFEST, sha256_file

    return sha256_file(folder / MANIFEST)


def _until_running(server, count):
    """Wait until so many texts are in the batch or the queue."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        values = [
            line.split() for line in lines if line.startswith(('yunque_running{model="m"}', 'yunque_queued{model="m"}'))
        ]
        if sum(float(value) for _, value in values) >= count:
            return
        time.sleep(0.01)
    raise AssertionError("the requests did not arrive")
