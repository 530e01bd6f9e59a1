"""Serve ONNX model folders over HTTP: OpenAI-compatible and plain routes, without torch.

    python serve/server.py --model_name_or_path outputs/onnx --host 127.0.0.1 --port 8000
    python serve/server.py fp32=outputs/onnx int8=outputs/onnx_int8 --api_key_file keys.txt

The same as ``yunque serve``; --help lists all options, docs/serve.md explains them.
"""

from __future__ import annotations

import sys

from yunque.errors import run


def main() -> None:
    """Serve until a signal."""
    from yunque.serving.process import main as serve

    serve(sys.argv[1:], "serve/server.py")


if __name__ == "__main__":
    run(main)
