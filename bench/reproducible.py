"""Walk a pipeline twice with one seed: every step must come to the same, and a third start must have nothing to do.

    OMP_NUM_THREADS=1 python bench/reproducible.py --config compress/configs/pipeline_embedded.yaml \
        --output_dir outputs/reproducible

Compared are all values of JSON and JSON-lines files and the bytes of all other files, weights above all, but for times,
speed and memory (KEYS_LEFT_OUT, FILES_LEFT_OUT). What is done is kept: the same command goes on. Exits 1 unless both
runs are equal and the third start ends well, says that all is done, and takes less than 10 s.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from yunque.artifacts import sha256_file

NOTHING_TO_DO = "nothing to do: every step is done"
LIMIT_S = 10.0
KEYS_LEFT_OUT = {
    *("created", "seconds", "ready_s", "answered_s", "train_wall_s", "train_cpu_s", "train_runtime"),  # times
    *("train_samples_per_second", "train_steps_per_second", "samples_per_s"),  # throughput
    "peak_memory_bytes",
    *("speed", "costs"),  # all three, of an evaluation
    *("manifest_sha256", "identity"),  # hashes of files with times
    "git_commit",  # the checkout may change while the runs last
}
"""Of JSON objects, with all below them; and the keys of a log that begin with time/."""
FILES_LEFT_OUT = {".steps", "checkpoints", "report.html"}
"""Records of starts, what an unfinished step goes on from, and pages that show the same numbers beside times."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="compress/configs/pipeline_embedded.yaml", metavar="FILE")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproducible"))
    options = parser.parse_args()
    runs = [options.output_dir / name for name in ("first", "second")]
    for run in runs:
        walk(options.config, run)
    begin = time.monotonic()
    idle = NOTHING_TO_DO in walk(options.config, runs[1])
    seconds = time.monotonic() - begin
    first, second = map(facts, runs)
    differing = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    for name in differing:
        print(f"differs: {name}: {first.get(name)!r}, {second.get(name)!r}")
    print(f"{len(first):,} values and files, {len(differing)} differ")
    print(f"the third start took {seconds:.1f} s and {'had nothing to do' if idle else 'did steps again'}")
    return 0 if first and not differing and idle and seconds < LIMIT_S else 1


def walk(config: str, run: Path) -> list[str]:
    """Start the pipeline in ``run``; return the lines it printed. This process ends if the pipeline failed."""
    command = [sys.executable, "compress/pipeline.py", "--config", config, "--output_dir", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip("\n"))
    if process.returncode:
        sys.exit(f"{run}: the pipeline ended with exit code {process.returncode}")
    return lines


def facts(run: Path) -> dict[str, Any]:
    """What a run came to, by name: each value of its JSON files, its folder called RUN, and the hash of other files."""
    found: dict[str, Any] = {}
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if not path.is_file() or FILES_LEFT_OUT & set(name.parts):
            continue
        if path.suffix not in (".json", ".jsonl"):
            found[str(name)] = sha256_file(path)
            continue
        text = path.read_text(encoding="utf-8").replace(str(run), "RUN")
        content = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
        found |= {f"{name}{place}": value for place, value in leaves(content)}
    return found


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested JSON with their places in it."""
    if isinstance(value, dict):
        for key in value.keys() - KEYS_LEFT_OUT:
            if not key.startswith("time/"):
                yield from leaves(value[key], f"{place}.{key}")
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from leaves(entry, f"{place}[{number}]")
    else:
        yield place, value


if __name__ == "__main__":
    sys.exit(main())
