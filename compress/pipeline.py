"""Walk the whole road: every step of a pipeline file that is not done, or whose inputs changed since.

    python compress/pipeline.py --config compress/configs/pipeline_embedded.yaml
    python compress/pipeline.py --config FILE --set seed=1 --output_dir outputs/seed-1
    python compress/pipeline.py --config FILE --status           # what is done, what would run
    python compress/pipeline.py --config FILE --step quantize    # one step, when those it needs are done
    slurm/pipeline.sh --config FILE                              # the same steps as a chain of Slurm jobs

Ctrl-C and SIGTERM let the running step save; the same command goes on. A step is done when its record names the same
options, files and input folders, and its folder is as it was left.
"""

from __future__ import annotations

import argparse

from yunque.errors import InputError, run
from yunque.pipeline.description import read_pipeline
from yunque.pipeline.runner import Runner
from yunque.pipeline.table import slurm_lines, status_table


def main() -> None:
    """Read the file, do what is asked of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, exit_on_error=False
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="The pipeline file (YAML).")
    parser.add_argument("--output_dir", metavar="DIR", help="Folder of the run, instead of the file's.")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="A variable of the file.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--step", metavar="NAME", help="Do only this step.")
    what.add_argument("--status", action="store_true", help="Show how far every step is, and do nothing.")
    what.add_argument("--slurm_steps", action="store_true", help="Steps to do, for slurm/pipeline.sh.")
    args = parser.parse_args()
    pipeline = read_pipeline(args.config, args.output_dir, dict(_assignment(text) for text in args.set))
    runner = Runner(pipeline, lambda line: print(line, flush=True))
    if args.slurm_steps:
        print("\n".join(slurm_lines(pipeline, runner.statuses())))
        return
    if args.step:
        runner.run_step(args.step)
        return
    if not args.status and runner.run() == 0:
        print("nothing to do: every step is done")
    print(status_table(pipeline, runner.statuses()))


def _assignment(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise InputError(f"--set {text}: give NAME=VALUE")
    return name, value


if __name__ == "__main__":
    run(main)
