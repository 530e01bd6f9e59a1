"""Start the server on an ONNX folder and check that it answers as the model itself does: the last step of the road.

    python serve/smoke.py --model_name_or_path outputs/onnx_int8 --output_dir outputs/smoke
    python serve/smoke.py --model_name_or_path FOLDER --prompts rows.jsonl --output_dir outputs/smoke

All prompts are sent at once, greedy; exit 1 unless every answer is the one the runtime gives to that prompt alone.
Writes smoke.json: the answers, the seconds until the server was ready and until the last answer.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from yunque.errors import CheckFailed, InputError, run

MODEL = "smoke"
SERVER = Path(__file__).parent / "server.py"
PROMPTS = [f"Summarize the following conversation. {name}: I will be late. {other}: We wait. Summary:"
           for name, other in (("Ana", "Tom"), ("Grace", "Victor"), ("Irene", "Frank"), ("Ben", "Eva"))]  # fmt: skip


def main() -> None:
    """Start, ask, compare, stop."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, metavar="FOLDER", help="ONNX folder to serve")
    parser.add_argument("--output_dir", required=True, type=Path, metavar="DIR", help="for smoke.json")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="JSONL with the field 'prompt'")
    parser.add_argument("--max_tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="for the server to be ready")
    for name in ("resume", "overwrite_output_dir"):  # it is quick and replaces its one file: both change nothing
        parser.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    prompts = PROMPTS if args.prompts is None else _read(args.prompts)
    expected = _alone(args.model_name_or_path, prompts, args.max_tokens)
    port = _free_port()
    begin = time.monotonic()
    command = [sys.executable, str(SERVER), f"{MODEL}={args.model_name_or_path}", "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        ready_s = _wait_until_ready(server, port, begin, args.timeout)
        with ThreadPoolExecutor(len(prompts)) as pool:
            answers = list(pool.map(lambda prompt: _ask(port, prompt, args.max_tokens), prompts))
        answered_s = time.monotonic() - begin - ready_s
    finally:
        server.terminate()
        code = server.wait(60)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"ready_s": ready_s, "answered_s": answered_s, "exit_code": code, "answers": answers}
    (args.output_dir / "smoke.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    different = [number for number, pair in enumerate(zip(answers, expected, strict=True)) if pair[0] != pair[1]]
    if different or code:
        raise CheckFailed(f"{len(different)} of {len(prompts)} answers differ from the model's own; server exit {code}")
    print(
        f"ready in {ready_s:.1f} s, {len(prompts)} answers as the model's own in {answered_s:.2f} s; drained and ended"
    )


def _read(path: Path) -> list[str]:
    try:
        prompts = [str(json.loads(line)["prompt"]) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--prompts {path}: is not JSONL with the field 'prompt': {error!r}") from error
    if not prompts:
        raise InputError(f"--prompts {path}: is empty")
    return prompts


def _alone(folder: str, prompts: list[str], max_tokens: int) -> list[str]:
    """Answers of the runtime in this process, one prompt at a time."""
    from yunque.runtime.models import Classifier, load

    model = load(folder)
    if isinstance(model, Classifier):
        raise InputError(f"--model_name_or_path {folder}: is a classifier; give a folder that writes text")
    return [model.generate([prompt], max_new_tokens=max_tokens)[0].text for prompt in prompts]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, begin: float, timeout: float) -> float:
    while time.monotonic() - begin < timeout:
        if server.poll() is not None:
            raise CheckFailed(f"the server ended with exit code {server.returncode}, as it says above")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return time.monotonic() - begin
        except OSError:  # not listening yet, or 503 while it warms up
            time.sleep(0.05)
    raise CheckFailed(f"the server was not ready within {timeout:.0f} s")


def _ask(port: int, prompt: str, max_tokens: int) -> str:
    body = json.dumps({"model": MODEL, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return str(json.load(response)["choices"][0]["text"])
    except urllib.error.HTTPError as error:
        raise CheckFailed(f"the server answered {error.code}: {error.read().decode()[:300]}") from error


if __name__ == "__main__":
    run(main)
