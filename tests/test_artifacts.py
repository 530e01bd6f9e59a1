"""Model folders: all or nothing, hashed, and knowing their parents."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from yunque import artifacts, errors, provenance
from yunque.errors import InputError
from yunque.evaluation.writing import write_whole

FILES = {"model.safetensors": b"weights", "tokenizer.json": b"{}", "plots/kl.png": b"picture"}


def writer(files: dict[str, bytes]):
    def write(staging: Path) -> None:
        for name, content in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)

    return write


def save(folder: Path, files: dict[str, bytes] = FILES, parents=(), **about) -> artifacts.Manifest:
    return artifacts.save_model_folder(folder, writer(files), stage="finetune", parents=list(parents), **about)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- saving -----------------------------------------------------------------------------------------------------------


def test_saved_folder_holds_the_files_and_a_manifest_of_them(tmp_path):
    manifest = save(
        tmp_path / "a" / "b",
        data=[{"name": "dialogs", "split": "train", "rows": 3, "sha256": "00"}],
        prompt_template="{text}",
        seed=7,
        config={"path": tmp_path, "betas": (0.9, float("nan"))},
        metrics={"loss": 0.5},
        base_model="google/flan-t5-base",
    )
    found = content(tmp_path / "a" / "b")
    written = json.loads(found.pop(artifacts.MANIFEST))
    assert found == FILES
    assert written == asdict(manifest) == asdict(artifacts.read_manifest(tmp_path / "a" / "b"))
    assert written["files"] == {
        name: {"bytes": len(data), "sha256": artifacts.sha256_bytes(data)} for name, data in FILES.items()
    }
    assert written["tokenizer_sha256"] == artifacts.sha256_bytes(b"{}")
    assert written["config"] == {"path": str(tmp_path), "betas": [0.9, None]}
    assert written["versions"]["python"] == "{}.{}.{}".format(*sys.version_info)
    assert written["hardware"]["memory_bytes"] > 0
    assert artifacts.verify(tmp_path / "a" / "b") == []


def test_sha256_of_known_content(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert artifacts.sha256_file(tmp_path / "abc") == artifacts.sha256_bytes(b"abc") == known


def test_saving_again_replaces_the_listed_files_and_keeps_the_others(tmp_path):
    save(tmp_path, {"model-1.safetensors": b"1", "plots/old.png": b"old", "old/only.txt": b""})
    (tmp_path / "log.jsonl").write_text("{}\n")
    save(tmp_path, {"model.safetensors": b"new", "plots/new.png": b"new"})
    found = content(tmp_path)
    assert found.keys() == {"model.safetensors", "plots/new.png", "log.jsonl", artifacts.MANIFEST}
    assert not (tmp_path / "old").exists()
    assert "log.jsonl" not in artifacts.read_manifest(tmp_path).files


def test_a_copied_manifest_is_not_listed(tmp_path):
    save(tmp_path, {**FILES, artifacts.MANIFEST: b"{}"})
    assert artifacts.read_manifest(tmp_path).files.keys() == FILES.keys()
    assert artifacts.verify(tmp_path) == []


@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_a_failing_write_changes_nothing(tmp_path, exception):
    def write(staging: Path) -> None:
        writer({"model.safetensors": b"half"})(staging)
        raise exception

    save(tmp_path / "old")
    before = content(tmp_path / "old")
    for name in ("old", "new"):
        with pytest.raises(exception):
            artifacts.save_model_folder(tmp_path / name, write, stage="ppo", parents=[])
    assert content(tmp_path / "old") == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_manifest_comes_last_and_the_former_one_goes_first(tmp_path, monkeypatch):
    save(tmp_path)
    events = []
    replace, fsync = os.replace, artifacts.fsync

    def note_replace(source, target):
        events.append(Path(target).name)
        replace(source, target)
        assert (tmp_path / artifacts.MANIFEST).exists() == (Path(target).name == artifacts.MANIFEST)

    def note_fsync(path):
        events.append(f"fsync {Path(path).name}")
        fsync(path)

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(artifacts, "fsync", note_fsync)
    save(tmp_path)
    top = f"fsync {tmp_path.name}"
    renames = [event for event in events if not event.startswith("fsync")]
    assert renames[-1] == artifacts.MANIFEST
    assert set(events[: events.index(top)]) == {f"fsync {Path(name).name}" for name in (*FILES, artifacts.MANIFEST)}
    assert {top, "fsync plots"} <= set(events[events.index(renames[-2]) : events.index(artifacts.MANIFEST)])
    assert events[-1] == top


SLOW_SAVE = """
import sys, time
from pathlib import Path
from yunque import artifacts

def write(staging):
    (staging / "model.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)

if sys.argv[2] == "rename":
    def stop(path):
        print("renaming", flush=True)
        time.sleep(60)
    artifacts._remove_files = lambda folder, names: stop(folder)
    write = lambda staging: (staging / "model.safetensors").write_bytes(b"new")
artifacts.save_model_folder(sys.argv[1], write, stage="ppo", parents=[])
"""


def kill_during(moment: str, folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOW_SAVE, str(folder), moment], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_kill_while_writing_leaves_the_former_model_or_none(tmp_path):
    save(tmp_path / "old")
    for name in ("old", "new"):
        kill_during("write", tmp_path / name)
    assert artifacts.verify(tmp_path / "old") == []
    assert not (tmp_path / "new" / artifacts.MANIFEST).exists()
    with pytest.raises(InputError, match="not a finished model folder"):
        artifacts.read_manifest(tmp_path / "new")
    for name in ("old", "new"):
        save(tmp_path / name)
        assert content(tmp_path / name).keys() == {*FILES, artifacts.MANIFEST}


def test_kill_while_renaming_leaves_no_manifest(tmp_path):
    save(tmp_path)
    kill_during("rename", tmp_path)
    assert not (tmp_path / artifacts.MANIFEST).exists()
    save(tmp_path)
    assert artifacts.verify(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting a tmpfs is not permitted: {error}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["old", "new"])
def test_full_disk_changes_nothing_and_exits_2(small_disk, capsys, name):
    save(small_disk / "old")
    before = content(small_disk)

    def fill() -> None:
        save(small_disk / name, {"config.json": b"{}", "model.safetensors": bytes(2**21)})

    with pytest.raises(SystemExit) as exit_:
        errors.run(fill)
    assert exit_.value.code == errors.EXIT_BAD_INPUT
    assert "No space left on device" in capsys.readouterr().err
    assert content(small_disk) == before
    assert not list(small_disk.rglob(".staging"))
    assert (small_disk / "new").exists() is False
    assert artifacts.verify(small_disk / "old") == []


# --- output folders ---------------------------------------------------------------------------------------------------


def prepare(folder: Path, *, overwrite: bool = False, resume: bool = False, inputs=()) -> Path:
    return artifacts.prepare_output_dir(folder, overwrite=overwrite, resume=resume, inputs=inputs)


def unfinished_run(folder: Path) -> Path:
    (folder / "checkpoints" / "step-5").mkdir(parents=True)
    (folder / "checkpoints" / "step-5" / "state.json").write_text("{}")
    (folder / "log.jsonl").write_text("{}\n")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_fresh_or_unrelated_folder_is_taken(tmp_path):
    assert prepare(tmp_path / "a" / "b").is_dir()
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        prepare(tmp_path, resume=resume)
    assert (tmp_path / "notes.txt").exists()


def test_a_finished_run_is_replaced_only_on_request(tmp_path):
    save(unfinished_run(tmp_path))
    before = content(tmp_path)
    for resume in (False, True):
        with pytest.raises(InputError, match=r"finished run.*--overwrite_output_dir"):
            prepare(tmp_path, resume=resume)
    assert content(tmp_path) == before
    prepare(tmp_path, overwrite=True)
    assert content(tmp_path) == {"notes.txt": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unfinished_run_is_continued_or_replaced_only_on_request(tmp_path):
    before = content(unfinished_run(tmp_path))
    (tmp_path / ".staging").mkdir()
    with pytest.raises(InputError, match=r"unfinished run.*--resume.*--overwrite_output_dir"):
        prepare(tmp_path)
    prepare(tmp_path, resume=True)
    prepare(tmp_path, resume=True, overwrite=True)
    assert content(tmp_path) == before
    assert not (tmp_path / ".staging").exists()
    prepare(tmp_path, overwrite=True)
    assert content(tmp_path) == {"notes.txt": b"mine"}


def test_a_damaged_manifest_can_be_overwritten(tmp_path):
    (tmp_path / artifacts.MANIFEST).write_text("{")
    with pytest.raises(InputError, match="finished run"):
        prepare(tmp_path)
    prepare(tmp_path, overwrite=True)
    assert content(tmp_path) == {}


def test_a_file_or_a_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"--output_dir.*is a file"):
            prepare(folder)
        with pytest.raises(InputError, match="is a file"):
            save(folder)


def test_an_unwritable_folder_is_refused(tmp_path):
    proc = Path("/proc/self")
    if not proc.exists():
        tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"--output_dir.*not writable"):
        prepare(proc / "out" if proc.exists() else tmp_path / "out")


def test_an_input_is_never_the_output(tmp_path):
    save(tmp_path)
    with pytest.raises(InputError, match="also an input"):
        prepare(tmp_path, overwrite=True, inputs=["google/flan-t5-base", str(tmp_path / "." / "plots" / "..")])
    assert artifacts.verify(tmp_path) == []


# --- reading ----------------------------------------------------------------------------------------------------------


def test_folders_without_a_readable_manifest(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        artifacts.read_manifest(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no yunque\.json"):
        artifacts.read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda manifest: "{", "not valid JSON"),
        (lambda manifest: "[]", "unknown schema None"),
        (lambda manifest: json.dumps(manifest | {"schema": 2}), "unknown schema 2.*reads schema 1"),
        (lambda manifest: json.dumps({k: v for k, v in manifest.items() if k != "stage"}), "field stage"),
        (lambda manifest: json.dumps(manifest | {"files": []}), "field files"),
        (lambda manifest: json.dumps(manifest | {"files": {"a": {"bytes": 1}}}), "field files .* 'a'"),
        (lambda manifest: json.dumps(manifest | {"parents": ["x"]}), "field parents"),
        (lambda manifest: json.dumps(manifest | {"files": {"../a": {"bytes": 1, "sha256": "0"}}}), r"'\.\./a'"),
        (lambda manifest: json.dumps(manifest | {"files": {"/etc/a": {"bytes": 1, "sha256": "0"}}}), "'/etc/a'"),
    ],
)
def test_a_malformed_manifest_is_refused(tmp_path, change, words):
    text = change(asdict(save(tmp_path)))
    (tmp_path / artifacts.MANIFEST).write_text(text)
    with pytest.raises(InputError, match=words):
        artifacts.read_manifest(tmp_path)


def test_verify_names_every_file_that_differs(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    (tmp_path / "plots" / "kl.png").write_bytes(b"pictures")
    (tmp_path / "tokenizer.json").unlink()
    assert artifacts.verify(tmp_path) == [
        "model.safetensors has other content (sha256 differs)",
        "plots/kl.png has 8 bytes instead of 7",
        "tokenizer.json is missing",
    ]


# --- parents ----------------------------------------------------------------------------------------------------------


def test_lineage_follows_manifests_to_the_beginning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("sft"), parents=["google/flan-t5-base"])
    save(Path("reward"))
    manifest = save(Path("ppo"), parents=["sft", "reward"])
    expected = artifacts.sha256_file("sft/yunque.json")
    assert manifest.parents[0] == {"path": str(tmp_path / "sft"), "manifest_sha256": expected}
    assert manifest.base_model == "google/flan-t5-base"
    monkeypatch.chdir("/")
    chain = artifacts.lineage(tmp_path / "ppo")
    paths = [str(tmp_path / name) for name in ("ppo", "sft", "reward")]
    assert [path for path, _, _ in chain] == [*paths, "google/flan-t5-base"]
    assert all(problem is None for _, _, problem in chain)


def test_base_model_is_inherited_from_the_first_parent(tmp_path):
    (tmp_path / "plain").mkdir()
    assert save(tmp_path / "a").base_model is None
    assert save(tmp_path / "b", parents=["hub/id"]).base_model == "hub/id"
    assert save(tmp_path / "c", parents=[str(tmp_path / "plain")]).base_model == str(tmp_path / "plain")
    assert save(tmp_path / "d", parents=[str(tmp_path / "a"), "hub/id"]).base_model is None
    assert save(tmp_path / "e", parents=[str(tmp_path / "b")], base_model="other").base_model == "other"


def test_lineage_tells_a_changed_or_lost_parent(tmp_path):
    for name in ("changed", "lost", "broken"):
        save(tmp_path / name)
    save(tmp_path / "child", parents=[str(tmp_path / name) for name in ("changed", "lost", "broken")])
    save(tmp_path / "changed", seed=1)
    (tmp_path / "lost").rename(tmp_path / "elsewhere")
    (tmp_path / "broken" / artifacts.MANIFEST).write_text("{")
    problems = [problem for _, _, problem in artifacts.lineage(tmp_path / "child")]
    assert problems[:3] == [None, "has changed since this model was made from it", "not found on this machine"]
    assert "not valid JSON" in problems[3]


def test_a_model_made_from_itself_ends_the_lineage(tmp_path):
    save(tmp_path)
    save(tmp_path, parents=[str(tmp_path)])
    assert len(artifacts.lineage(tmp_path)) == 1


def test_git_commit_is_that_of_the_tracked_library_only(tmp_path, monkeypatch):
    def git(*args: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    library = tmp_path / "provenance.py"
    library.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(library))
    assert provenance.collect_git_commit() is None
    git("init")
    git("commit", "--allow-empty", "-m", "somebody's project, with us untracked in its environment")
    assert provenance.collect_git_commit() is None
    git("add", "provenance.py")
    git("commit", "-m", "tracked")
    assert provenance.collect_git_commit() == git("rev-parse", "HEAD")
    library.write_text("changed")
    time.sleep(0.01)
    assert provenance.collect_git_commit() == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(tmp_path, umask, mode):
    def write(staging):
        save_file({"weight": torch.zeros(2)}, staging / "model.safetensors")  # safetensors itself writes 0600
        (staging / "deep").mkdir()
        (staging / "deep" / "config.json").write_text("{}")

    former = os.umask(umask)
    try:
        artifacts.save_model_folder(tmp_path / "model", write, stage="test", parents=[])
        write_whole(tmp_path / "model" / "report.html", "text")
    finally:
        os.umask(former)
    files = [path for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) == 4
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(mode)}
