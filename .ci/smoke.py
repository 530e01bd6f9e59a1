"""What an installed yunque does without torch: smoke.py FOLDER, an ONNX folder of a tiny model.

Prints the tokens it generates, so that environments can be compared; fails with the command that did not do its work.
"""

import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

YUNQUE = Path(sys.executable).with_name("yunque")
PROMPTS = ["w5 w6 w7", "w30 w31"]
START_LIMIT_S = 90


def run(*words, code=0, says=""):
    done = subprocess.run([YUNQUE, *map(str, words)], capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != code or says not in done.stdout + done.stderr or "Traceback" in done.stderr:
        sys.exit(f"yunque {' '.join(map(str, words))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def serve(folder):
    """Start the server, ask it for an answer, stop it by SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([YUNQUE, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)])
    try:
        limit = time.monotonic() + START_LIMIT_S
        while True:
            try:
                models = json.load(urllib.request.urlopen(f"{url}/v1/models", timeout=10))
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > limit:
                    sys.exit("yunque serve: did not start")
                time.sleep(0.2)
        body = {"model": models["data"][0]["id"], "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert answer["usage"]["completion_tokens"] > 0, answer
        server.terminate()
        assert server.wait(timeout=60) == 0, f"yunque serve: exit code {server.returncode} after SIGTERM"
    finally:
        server.kill()


def main():
    folder = Path(sys.argv[1])
    assert not importlib.util.find_spec("torch"), "torch is installed here"
    run("--help", says="serve")
    run("--version", says="yunque")
    run("show", folder, "--verify", says="verified")
    run("doctor", "--quick", "--output_dir", "/tmp")
    run("plan", "--model_name_or_path", "x", "--method", "full", code=2, says="pip install 'yunque[train]'")
    run("evaluate", folder, code=2, says="pip install 'yunque[train]'")
    from yunque.runtime import load

    answers = load(str(folder), threads=1).generate(PROMPTS)
    print(json.dumps([list(map(int, answer.tokens)) for answer in answers]))
    serve(folder)


if __name__ == "__main__":
    main()
