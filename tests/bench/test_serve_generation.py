"""Peers whose environments are missing or broken are left out, and the others are timed."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PEERS = """
PEERS = {
    "t5/whole": ("whole", None, None, None, None, None),
    "t5/missing": ("missing", None, "converted", None, None, None),
    "t5/broken": ("broken", None, None, None, None, None),
    "t5/fails": ("fails", None, None, None, None, None),
}
"""
READY = '#!/bin/sh\necho \'{"load_s": 1.0, "rss_loaded_mb": 1}\'\n'
REPLY = '{"seconds": 1.0, "cpu": 1.0, "others": 0.0, "peak_rss_mb": 1, "tokens": []}'
ANSWERS = f"while read line; do echo '{REPLY}'; done"


@pytest.fixture
def args(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "serve_peers", raising=False)
    (tmp_path / "serve_peers.py").write_text(PEERS)
    for name, text in {"whole": READY + ANSWERS, "broken": "#!/bin/sh\nexit 3\n", "fails": READY}.items():
        python = tmp_path / "home" / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(text + "\n")
        python.chmod(0o755)
    return argparse.Namespace(
        peers=tmp_path, peers_home=tmp_path / "home", home=tmp_path / "ours", only=".*", all=False, pruned=False,
        threads=1, batches=[1], repeats=1,
    )  # fmt: skip


def test_a_missing_environment_leaves_out_its_peers_only(args, capsys, monkeypatch):
    bench = runpy.run_path(str(ROOT / "bench" / "serve_generation.py"))
    made = []

    def make(call, *rest):
        made.append(call.__name__)
        rest[-1].mkdir(parents=True)

    monkeypatch.setitem(bench["engines_of"].__globals__, "_in_process", make)
    engines = bench["engines_of"]("t5", args)
    assert made == ["make_model", *["export_model"] * 3]  # no optimum environment makes the peers' own
    peers = [engine for engine in engines if "/" in engine.name]
    assert [engine.name for engine in peers] == ["t5/whole", "t5/broken", "t5/fails"]
    rows = bench["measure"](peers, args)
    assert [row["engine"] for row in rows] == ["whole"]
    lines = capsys.readouterr().err.splitlines()
    left = [line.split(":")[1].strip() for line in lines if line.startswith("left out")]
    assert left == ["the peers' models", "t5/missing", "t5/broken", "t5/fails"]
    assert "missing/bin/python" in lines[1]
