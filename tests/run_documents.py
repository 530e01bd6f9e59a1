"""Run the commands of README and docs, as they stand, in a scratch copy of the tree; `make docs-run`.

    python tests/run_documents.py                                 # every page: about an hour of one core
    python tests/run_documents.py docs/quantization.md            # one page
    python tests/run_documents.py --folder /tmp/scratch docs/tutorial.md --only rehearse    # after an earlier run there

The tutorial goes first, and every other page begins with the outputs that the tutorial left. What ran is written into
`documents_run.json` beside this file, and a fast test fails where a page has a command that is neither in there nor in
`LEFT_OUT`: a command that was changed has to be run again. One that waits for its first run stands there with null,
which the test reports. Real data are taken from `../shared` of the checkout.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import documents
from documents import PAGES, ROOT

RECORD = Path(__file__).with_name("documents_run.json")
TUTORIAL = "docs/tutorial.md"
SERVER = "http://127.0.0.1:8000"
SHELL = (".", "bash", "cp", "curl", "docker", "export", "kubectl", "pip", "sudo")
"""What begins a command that is none of our programs."""

LEFT_OUT = {
    "sets up an environment, or is the tests themselves: .ci/run and .ci/release": (
        *(r"^make ", r"^pip install", r"^\. \.venv/bin/activate", r"^pytest ", r"^python tests/slurm_cluster\.py"),
    ),
    "models and data of the hub": (r"^(?!.*--dry-run).*(flan[-_]t5|qwen2\.5|hate-speech-dynabench)",),
    "several GPUs": (r"--num_processes [48]",),
    "a cluster, or what installs a service; tests/slurm and tests/serve": (
        *(r"^slurm/(submit|pipeline)\.sh (?!--dry-run)", r"^srun ", r"^docker ", r"^kubectl ", r"^sudo "),
        r"^cp serve/serve\.env",
    ),
    "the reader fills in the rest": (r"\.\.\.",),
    "a benchmark, whose page has the numbers and their date": (
        r"python bench/(?!hacking_watch|sensitivity\.py --write)",
        r"^bash \.\./shared/peers",
    ),
    "ten minutes beside a server of the reader's": (r"--server_pid PID",),
    "half an hour of a core, or goes on from it": (*(r"pipeline_dialogsum", r"pipeline_embedded.yaml --step int8"),),
}
"""Reasons, and patterns of the commands that are not run here for them."""

_FEW = "--max_steps 2 --max_test_samples 8"
_FEW_ROWS = f"{_FEW} --max_train_samples 64"
SHORTER = {
    r"yunque ppo-detox": _FEW,
    r"recipes/(dpo|finetune|orpo|reward_model)\.py": _FEW_ROWS,
    r"recipes/(grpo_detox|ppo_sentiment)\.py|recipes/ppo_detox\.py .*-": _FEW,  # the tutorial's own has no option
    r"compress/distill\.py": _FEW_ROWS,
    r"compress/prune\.py": "--calibration_samples 8 --max_test_samples 8",
    r"--scheme mixed": "--max_search_samples 16 --max_verdict_samples 16 --sensitivity_prompts 8",
    r"compress/pipeline\.py(?!.*--status)": "--step finetune",
    r"yunque matrix": "--dry_run",  # many evaluations, each of which is checked
    r"serve/loadtest\.py .*--rates": "--rates 2 --duration 3 --warmup 1",
}
"""Patterns of long commands, and the options that are added to them."""

EXITS = {
    r"yunque compare .* outputs/eval_int4": 1,  # its page says so: 120 prompts do not prove so narrow a gate
    r"--scheme mixed": 1,  # so few prompts prove no gate
    r"serve/examples/(react|pal)\.py": 1,  # the page says so: small models do not keep to the form
}
"""Patterns of commands that may end with another code than 0."""

FIXTURES = {
    "FOLDER": "ln -s outputs/ppo_detox FOLDER",
    "HATE_ROBERTA": "ln -s outputs/reward_hate_roberta_scratch HATE_ROBERTA",
    "./llama-70b": "python -c 'from transformers import LlamaConfig as C; C(hidden_size=8192, intermediate_size=28672,"
    ' num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8).save_pretrained("llama-70b")\'',
    "outputs/onnx ": "python compress/to_onnx.py --model_name_or_path outputs/ppo_detox --output_dir outputs/onnx",
    "outputs/onnx_int8": "cp -r outputs/int8 outputs/onnx_int8",
    "outputs/hate_onnx": 'python compress/to_onnx.py --output_dir outputs/hate_onnx --model_name_or_path "$(python -c'
    ' "from yunque.models.embedded import ensure_embedded; print(ensure_embedded().reward_model)")"',
    "outputs/seed0": "cp -r outputs/ppo_detox outputs/seed0",
    "keys.txt": "python -c 'import secrets; print(secrets.token_urlsafe(32))' > keys.txt",
    "my_rewards": "sed -n '/^# my_rewards.py/,/^```$/{/^```/d;p}' docs/ppo.md > my_rewards.py",
    "my_rows.jsonl": "cp \"$(python -c 'from yunque.models.embedded import ensure_embedded;"
    " print(ensure_embedded().dataset)')/train.jsonl\" my_rows.jsonl",
    "variants.yaml": "sed -n '/^axes:$/,/^```$/{/^```/d;p}' docs/compare.md > variants.yaml",
    "experiments.yaml": "sed -n '/^axes: #/,/^```$/{/^```/d;p}' docs/compare.md > experiments.yaml",
}
"""Texts of commands, and how what they name is made where it is not there yet."""


# --- what there is to run ---------------------------------------------------------------------------------------------


def commands(page):
    """A page's lines of shell, without comments; `export` lines stand before all that follow in their block."""
    found = []
    for block in page.blocks:
        if block.language not in ("", "bash", "sh", "console"):
            continue
        exports = ""
        for line in documents.lines_of(block.text):
            if line.startswith("export "):
                exports += f"{line}; "
            elif is_command(line):
                found.append(exports + re.sub(r"\s+(#.*|&)$", "", line))
    return list(dict.fromkeys(found))


def is_command(line):
    words = documents.split(line)
    return line.split()[0] in SHELL or bool(words and words[0] and documents.starts_command(words[0][0]))


def reason(command):
    """Why a command is left out; None if it is run."""
    return next((why for why, patterns in LEFT_OUT.items() if any(re.search(each, command) for each in patterns)), None)


def shortened(command):
    """A command with the options that make it short."""
    return " ".join([command, *(options for pattern, options in SHORTER.items() if re.search(pattern, command))])


def allowed(command):
    return {0, *(code for pattern, code in EXITS.items() if re.search(pattern, command))}


# --- running it -------------------------------------------------------------------------------------------------------


class Scratch:
    """A copy of the tree to run pages in."""

    def __init__(self, folder):
        self.tree = folder / "yunque"
        self.kept = folder / "outputs_of_the_tutorial"
        self.server = None
        listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.splitlines():
            (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.tree / name)
        for name, target in ((".venv", sys.prefix), ("../shared", ROOT.parent / "shared")):
            if not (self.tree / name).is_symlink():
                (self.tree / name).symlink_to(target)
        path = os.pathsep.join([str(self.tree / ".venv/bin"), os.environ["PATH"]])
        self.environment = os.environ | {"PATH": path, "PYTHONPATH": str(self.tree / "src"), "HF_HUB_OFFLINE": "1"}

    def run(self, command):
        """Run a command to its end, a server until the next one or the page's end; its exit code, its last words."""
        if "yunque serve" in command:
            self.serve(command)
            return 0, ""
        with tempfile.TemporaryFile("w+") as said:
            code = subprocess.call(
                ["bash", "-c", command], cwd=self.tree, env=self.environment, stdout=said, stderr=subprocess.STDOUT
            )
            said.seek(0)
            return code, said.read()[-2000:]

    def serve(self, command):
        """Start a server and wait until it is ready."""
        self.stop()
        words = ["bash", "-c", f"exec {command}"]
        self.server = subprocess.Popen(words, cwd=self.tree, env=self.environment, stderr=subprocess.DEVNULL)
        while self.server.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{SERVER}/ready"):
                return
            time.sleep(0.2)
        raise RuntimeError(f"{command}: ended with {self.server.returncode}")

    def stop(self):
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait()
            self.server = None

    def prepare(self, command):
        """Make what a command takes for granted."""
        for text, how in FIXTURES.items():
            if text in command and not (self.tree / text.strip()).exists():
                subprocess.run(["bash", "-c", how], cwd=self.tree, env=self.environment, check=True)
        if SERVER in command and self.server is None:
            self.prepare("outputs/onnx_int8")
            self.serve("yunque serve outputs/onnx_int8")

    def begin(self, *, empty):
        """Set the outputs back to those of the tutorial, or to none."""
        outputs = self.tree / "outputs"
        shutil.rmtree(outputs, ignore_errors=True)
        if not empty:
            shutil.copytree(self.kept, outputs)

    def end(self, page):
        self.stop()
        if page == TUTORIAL:
            shutil.rmtree(self.kept, ignore_errors=True)
            shutil.copytree(self.tree / "outputs", self.kept)


def run_page(scratch, page, record, only):
    """Run those commands of a page in which `only` is found; the number that failed. The record keeps what did not."""
    wanted = [command for command in commands(page) if reason(command) is None]
    ran = record[page.name] = {
        command: record[page.name][command] for command in wanted if command in record[page.name]
    }
    todo = [command for command in wanted if re.search(only, command)]
    failed = 0
    if not todo:
        return failed
    scratch.begin(empty=page.name == TUTORIAL and not only)
    for command in todo:
        began = time.monotonic()
        try:
            scratch.prepare(command)
            code, said = scratch.run(shortened(command))
        except (RuntimeError, subprocess.CalledProcessError) as error:
            code, said = "none", str(error)
        seconds = round(time.monotonic() - began, 1)
        if code in allowed(command):
            ran[command] = {"date": str(datetime.date.today()), "seconds": seconds}
            print(f"ok {seconds} s: {page.name}: {shortened(command)}", flush=True)
        else:
            ran.pop(command, None)
            failed += 1
            print(f"FAILED, exit code {code}: {page.name}: {shortened(command)}\n{said}", flush=True)
        write(record)
    scratch.end(page.name)
    return failed


def read_record(pages):
    """What ran of the pages there are, in their order."""
    content = json.loads(RECORD.read_text(encoding="utf-8"))
    return {page.name: content.get(page.name, {}) for page in in_order(pages)}


def write(record):
    content = {page: ran for page, ran in record.items() if ran}
    RECORD.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def in_order(pages):
    return sorted(pages, key=lambda page: (page.name != TUTORIAL, "/" in page.name, page.name))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", help="all when none is named")
    parser.add_argument("--only", default="", metavar="REGEX", help="commands in which it is found")
    parser.add_argument("--folder", type=Path, help="keep the scratch copy here, and find the tutorial's outputs in it")
    args = parser.parse_args()
    pages = in_order(documents.read(path) for path in PAGES)
    record = read_record(pages)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="documents-"))
    scratch = Scratch(folder)
    wanted = [page for page in pages if not args.pages or page.name in args.pages]
    if args.pages and TUTORIAL not in args.pages and not scratch.kept.exists():
        wanted = [page for page in pages if page.name == TUTORIAL] + wanted
    failed = sum(run_page(scratch, page, record, args.only) for page in wanted)
    write(record)
    if args.folder is None:
        shutil.rmtree(folder)
    sys.exit(f"{failed} commands failed" if failed else 0)


if __name__ == "__main__":
    main()
