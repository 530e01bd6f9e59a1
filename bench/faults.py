"""Break tiny runs on two ranks in every way a cluster does, resume them, and compare with runs left alone.

    OMP_NUM_THREADS=1 python bench/faults.py --times 5                     # the table of docs/checkpoints.md
    OMP_NUM_THREADS=1 python bench/faults.py --times 1 --faults full_disk --recipes finetune

The ranks are processes of their own that join over gloo, forked from one that has imported everything, so that a start
costs a second instead of twenty. Signals come from outside at random moments. When a rank dies the others are killed
and all start again with --resume, as torchrun and Slurm do. Prints one line per fault and recipe, exits 1 if a run was
lost. full_disk mounts a small tmpfs: run it as root, or under ``unshare --user --map-root-user --mount``. No network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RANKS = 2
TIMEOUT_S = 300
POLL_S = 0.002
SLOW_WRITE_S = 0.15
DISK_BYTES = 4 * 2**20
TOLERANCE = 1e-3
TIMING = ("time/", "samples_per_s", "peak_memory_bytes", "train_wall_s", "train_cpu_s", "total_flos")
WORDS = ("Summarize", "the", "following", "conversation.", "Summary:")


@dataclass
class Start:
    """One start of all ranks: their process ids, and where what they say goes."""

    folder: Path
    pids: list[int]
    errors: Path
    codes: dict[int, int] = field(default_factory=dict)

    def poll(self) -> bool:
        """Collect ranks that have ended; True while all live. One that fails takes the others with it."""
        for pid in [pid for pid in self.pids if pid not in self.codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            self.kill(self.pids, grace_s=5)
        return not self.codes

    def kill(self, pids: list[int], grace_s: float = 0) -> None:
        """SIGKILL; ranks that are about to say why they end get ``grace_s`` first."""
        limit = time.monotonic() + grace_s
        while grace_s and time.monotonic() < limit and len(self.codes) < len(self.pids):
            for pid in [pid for pid in self.pids if pid not in self.codes]:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(POLL_S)
        for pid in [pid for pid in pids if pid not in self.codes]:
            os.kill(pid, signal.SIGKILL)
        for pid in [pid for pid in pids if pid not in self.codes]:
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end of all ranks, or ``until`` something: True if that came first."""
        limit = time.monotonic() + TIMEOUT_S
        while len(self.codes) < len(self.pids):
            self.poll()
            if not self.codes and until():
                return True
            if time.monotonic() > limit:
                self.kill(self.pids)
                raise SystemExit(f"{self.folder}: no end after {TIMEOUT_S} s; see {self.errors}")
            time.sleep(POLL_S)
        return False

    @property
    def steps(self) -> int:
        """Steps logged so far."""
        log = self.folder / "log.jsonl"
        return log.read_bytes().count(b"\n") if log.is_file() else 0

    @property
    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").glob("step-*"))


def launch(
    recipe: str,
    options: dict[str, Any],
    folder: Path,
    *,
    ranks: int = RANKS,
    profile: str = "ddp",
    slow_writes: bool = False,
) -> Start:
    """Fork the ranks; with ``slow_writes`` every write to the disk takes a while, as a large model's would."""
    if ranks != RANKS and "per_device_train_batch_size" in options:  # the same rows per step
        options = options | {"per_device_train_batch_size": options["per_device_train_batch_size"] * RANKS // ranks}
    environment = environment_of(profile) if ranks > 1 else {}
    number = len(list(folder.parent.glob(f"{folder.name}.err*")))
    errors = folder.parent / f"{folder.name}.err{number}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            if ranks > 1:
                os.environ |= environment | {
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
                    **{"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                }
            _be_rank(recipe, {"output_dir": folder, **options}, errors, slow_writes)
        pids.append(pid)
    return Start(folder, pids, errors)


def environment_of(profile: str) -> dict[str, str]:
    """What ``accelerate launch`` tells the ranks of a launch profile."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    words = ["--config_file", f"launch/{profile}.yaml", "--num_processes", str(RANKS), "script.py"]
    args, profile_read, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    args.deepspeed_fields_from_accelerate_config = ",".join(profile_read.deepspeed_config)
    found = prepare_deepspeed_cmd_env(args)[1] if args.use_deepspeed else prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def _be_rank(recipe: str, options: dict[str, Any], errors: Path, slow_writes: bool) -> None:
    with errors.open("a") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    if slow_writes:
        from yunque import artifacts

        fsync = artifacts.fsync

        def slow(path: Path) -> None:
            time.sleep(SLOW_WRITE_S)
            fsync(path)

        artifacts.fsync = slow
    words = [
        word
        for name, value in options.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]
    script = f"recipes/{recipe}.py"
    code = 1
    try:
        if "RANK" in os.environ:
            sys.argv = ["rehearsal", script, *words]
            runpy.run_module("yunque.distributed.rehearsal", run_name="__main__")
        else:
            os.environ["ACCELERATE_USE_CPU"] = "true"
            sys.argv = [script, *words]
            runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# --- the faults: each brings a run to its end before it is done, and says what it met ---


def kill_rank(run: Run) -> str:
    """SIGKILL of one rank at a random moment of training."""
    start = run.start()
    run.at_step(start, run.chance.randint(1, run.total_steps - 2))
    time.sleep(run.chance.uniform(0, 0.3))
    start.kill([run.chance.choice(start.pids)])
    start.wait()
    return f"at step {start.steps}"


def kill_all_mid_save(run: Run) -> str:
    """SIGKILL of all ranks while a checkpoint is being written."""
    start = run.start({"slow_writes": True})
    run.at_step(start, run.chance.choice([2, 4, 6]))
    staging = start.folder / "checkpoints" / ".partial"
    start.wait(staging.exists)
    time.sleep(run.chance.uniform(0, 4 * SLOW_WRITE_S))
    start.kill(start.pids)
    return "half written" if staging.exists() else "between saves"


def truncated_shard(run: Run) -> str:
    """A shard of the newest checkpoint cut at a random length."""
    newest = run.stopped_with_two_checkpoints()
    shard = run.chance.choice(sorted(newest.glob("*.safetensors")))
    os.truncate(shard, run.chance.randrange(shard.stat().st_size))
    run.expect = f"{newest} is damaged: {shard.name} has"
    return shard.name


def flipped_byte(run: Run) -> str:
    """One bit of one byte of one file of the newest checkpoint."""
    newest = run.stopped_with_two_checkpoints()
    file = run.chance.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    content[run.chance.randrange(len(content))] ^= 1 << run.chance.randrange(8)
    file.write_bytes(content)
    run.expect = f"{newest} is damaged: {file.name}"
    return file.name


def full_disk(run: Run) -> str:
    """A tmpfs of fixed size fills up before a checkpoint is saved."""
    run.folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", run.folder], check=True)
    run.after.callback(subprocess.run, ["umount", "-l", run.folder], check=True)
    start = run.start(overwrite_output_dir=True)
    start.wait(lambda: bool(start.checkpoints))
    usage = shutil.disk_usage(run.folder)
    (run.folder / "filler").write_bytes(b"0" * (usage.free - run.chance.randrange(2**14, 2**16)))
    start.wait()
    (run.folder / "filler").unlink()
    codes = set(start.codes.values())  # the first rank says it, and the others are ended with it
    if not {2} <= codes <= {2, -signal.SIGKILL} or "the disk is full" not in start.errors.read_text():
        return "NOT NOTICED"
    return "exit 2"


def lost_peer(run: Run) -> str:
    """One rank dies while the ranks look for each other."""
    start = run.start()
    time.sleep(run.chance.uniform(0, 0.8))
    start.kill([run.chance.choice(start.pids)])
    start.wait()
    return f"at step {start.steps}"


def two_one_two(run: Run) -> str:
    """SIGTERM on two ranks, then on one, and two go on."""
    return run.moved([{"ranks": 2}, {"ranks": 1}])


def zero_fsdp_zero(run: Run) -> str:
    """SIGTERM under ZeRO-3, then under FSDP2, and ZeRO-3 goes on."""
    run.at_the_end = {"profile": "zero3"}
    return run.moved([{"profile": "zero3"}, {"profile": "fsdp2"}])


FAULTS = {
    fault.__name__: fault
    for fault in (kill_rank, kill_all_mid_save, truncated_shard, flipped_byte, full_disk, lost_peer)
}
MOVES = {move.__name__: move for move in (two_one_two, zero_fsdp_zero)}
"""What is no fault, and may differ from an undisturbed run by rounding: other sums, in another order."""


# --- a run and its end ---


@dataclass
class Run:
    """One run that is to be broken."""

    recipe: str
    options: dict[str, Any]
    folder: Path
    chance: random.Random
    total_steps: int
    after: contextlib.ExitStack
    expect: str | None = None
    at_the_end: dict[str, Any] = field(default_factory=dict)

    def start(self, layout: dict[str, Any] | None = None, **options: Any) -> Start:
        return launch(self.recipe, self.options | options, self.folder, **(layout or {}))

    def moved(self, layouts: list[dict[str, Any]]) -> str:
        """Stop by SIGTERM after some steps on each layout in turn."""
        done = []
        for place, layout in enumerate(layouts):
            start = self.start(layout, resume=True)
            self.at_step(start, place * self.total_steps // 3 + self.chance.randint(2, self.total_steps // 3))
            for pid in start.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            start.wait()
            if set(start.codes.values()) != {75}:
                raise SystemExit(f"{layout}: left with {start.codes}\n{start.errors.read_text()}")
            done.append(str(start.steps))
        return f"moved after steps {', '.join(done)}"

    def at_step(self, start: Start, step: int) -> None:
        start.wait(lambda: start.steps >= step)

    def stopped_with_two_checkpoints(self) -> Path:
        start = self.start()
        start.wait(lambda: len(start.checkpoints) == 2)
        start.kill(start.pids)
        return start.checkpoints[-1]

    def finish(self) -> tuple[str, int]:
        """Start with --resume until the run is done: (what was said, starts)."""
        for starts in range(1, 4):
            # a run killed before its first step left nothing: the same command serves
            start = self.start(self.at_the_end, resume=True)
            start.wait()
            if not any(start.codes.values()):
                return start.errors.read_text(), starts
        return start.errors.read_text(), 0


def result_of(folder: Path) -> dict[str, Any]:
    """What a finished run computed: metrics and log without the clock, and a digest of its weights."""
    manifest = json.loads((folder / "yunque.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    lines = [_timeless(line) for line in log if "train_runtime" not in line]
    return {"metrics": _timeless(manifest["metrics"]), "log": lines, "weights": weights}


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith(TIMING)}


def difference(one: dict[str, Any], other: dict[str, Any], *, rounding: bool) -> str:
    if one == other:
        return "bit-equal"
    if rounding:
        pairs = zip(_numbers([one["log"], one["metrics"]]), _numbers([other["log"], other["metrics"]]), strict=True)
        return f"largest deviation {max(abs(ours - theirs) / max(1, abs(theirs)) for ours, theirs in pairs):.0e}"
    return "DIFFERENT " + ", ".join(name for name in one if one[name] != other[name])


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield float(value)


def write_assets(folder: Path) -> dict[str, dict[str, Any]]:
    """A tiny T5, a tiny classifier and 24 rows; returns the recipes' options."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForSequenceClassification,
        T5Config,
        T5ForConditionalGeneration,
    )

    tokens = ["<pad>", "</s>", "<unk>", *WORDS]
    tokens += [f"w{index}" for index in range(len(tokens), 64)]
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    special = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1}
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "nothate", 1: "hate"}
    torch.manual_seed(0)
    t5 = T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0, **special)
    roberta = RobertaConfig(max_position_embeddings=66, bos_token_id=1, id2label=names, **shape, **special)
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5")
    t5.dropout_rate = 0.0
    T5ForConditionalGeneration(t5).save_pretrained(folder / "t5_without_dropout")
    RobertaForSequenceClassification(roberta).save_pretrained(folder / "classifier")
    for name in ("t5", "t5_without_dropout", "classifier"):
        tokenizer.save_pretrained(folder / name)
    chance = random.Random(0)
    (folder / "data").mkdir()
    for split, rows in (("train", 24), ("test", 6)):
        with (folder / "data" / f"{split}.jsonl").open("w") as file:
            for row in range(rows):
                words = [f"w{chance.randrange(8, 64)}" for _ in range(chance.randrange(5, 15))]
                file.write(json.dumps({"id": row, "dialogue": " ".join(words), "summary": " ".join(words[:4])}) + "\n")
    both = {"dataset_name": folder / "data", "model_name_or_path": folder / "t5", "mixed_precision": "no"}
    both |= {"save_steps": 2, "save_total_limit": 2, "max_new_tokens": 8, "per_device_eval_batch_size": 8}
    return {
        "ppo_detox": both
        | {"reward_model_name_or_path": folder / "classifier", "batch_size": 8, "mini_batch_size": 4, "ppo_epochs": 2}
        | {"learning_rate": 1e-3, "max_new_tokens_low": 4, "max_steps": 8},
        "finetune": both
        | {"per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1, "max_steps": 12},
    }


def warm_up() -> None:
    """Import, before any fork, what the ranks would import one by one."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.roberta.modeling_roberta
    import transformers.models.t5.modeling_t5  # noqa: F401
    import trl  # noqa: F401
    from torch.distributed.checkpoint import hf_storage  # noqa: F401
    from transformers import Seq2SeqTrainer  # noqa: F401

    import yunque.distributed.held_out
    import yunque.distributed.resumable
    import yunque.distributed.trainers
    import yunque.evaluation.aligned
    import yunque.rl.loop  # noqa: F401

    torch.set_num_threads(1)
    os.chdir(ROOT)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}


def break_runs(recipe: str, options: dict[str, Any], names: list[str], times: int, root: Path) -> Iterator[bool]:
    """Print a line for every fault, met ``times`` times; yields whether all runs ended as the undisturbed one."""
    undisturbed = launch(recipe, options, root / f"{recipe}-{names[0]}-undisturbed")
    undisturbed.wait()
    if any(undisturbed.codes.values()):
        raise SystemExit(undisturbed.errors.read_text())
    expected = result_of(undisturbed.folder)
    for name in names:
        outcomes: list[tuple[str, str, bool]] = []
        for time_ in range(times):
            with contextlib.ExitStack() as after:
                chance = random.Random(f"{recipe} {name} {time_}")
                run = Run(recipe, options, root / f"{recipe}-{name}-{time_}", chance, options["max_steps"], after)
                met = (FAULTS | MOVES)[name](run)
                said, starts = run.finish()
                rounding = name in MOVES
                outcome = difference(result_of(run.folder), expected, rounding=rounding) if starts else f"LOST\n{said}"
                if run.expect is not None and run.expect not in said:
                    outcome += ", DAMAGE NOT NAMED"
                sound = outcome == "bit-equal" or (rounding and float(outcome.split()[-1]) < TOLERANCE)
                outcomes.append((met, outcome, sound and met != "NOT NOTICED"))
        met, ends = ("; ".join(sorted({outcome[part] for outcome in outcomes})) for part in (0, 1))
        passed = sum(outcome[2] for outcome in outcomes)
        print(f"| {recipe} | {name} | {passed}/{times} | {ends} | {met} |", flush=True)
        yield passed == times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--faults", nargs="+", choices=FAULTS | MOVES, default=list(FAULTS | MOVES))
    parser.add_argument("--recipes", nargs="+", choices=("ppo_detox", "finetune"), default=["ppo_detox", "finetune"])
    parser.add_argument("--folder", type=Path, help="keep runs and what they said here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.folder or Path(temporary)
        root.mkdir(parents=True, exist_ok=True)
        warm_up()
        options = write_assets(root)
        print("| recipe | fault | survived | end against undisturbed | met |\n|---|---|---|---|---|", flush=True)
        sound = [
            done
            for recipe in args.recipes
            # other ranks draw other dropout
            for names, changed in ((FAULTS, {}), (MOVES, {"model_name_or_path": root / "t5_without_dropout"}))
            if (chosen := [name for name in args.faults if name in names])
            for done in break_runs(recipe, options[recipe] | changed, chosen, args.times, root)
        ]
    sys.exit(not all(sound))


if __name__ == "__main__":
    main()
