import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from yunque.artifacts import read_manifest, verify
from yunque.data.arguments import DataArguments
from yunque.data.corpus import build_corpus, count_rude_words
from yunque.errors import InputError
from yunque.metrics.rouge import rouge_scores
from yunque.models import embedded as embedded_module
from yunque.models import embedded_training
from yunque.models.embedded import ensure_embedded, use_embedded
from yunque.models.embedded_training import EmbeddedSettings, TrainingSettings

TINY = EmbeddedSettings(
    split_sizes={"train": 40, "validation": 4, "test": 4},
    vocab_size=400,
    policy=TrainingSettings("d_model=16,d_kv=8,d_ff=16,num_heads=2,num_layers=1,num_decoder_layers=1", 3, 4),
    reward=TrainingSettings("hidden_size=8,num_hidden_layers=1,num_attention_heads=1,intermediate_size=8", 3, 4),
)
"""With dropout, so that the training draws random numbers."""


@pytest.fixture(scope="module")
def tiny_cache(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YUNQUE_CACHE", str(cache))
        ensure_embedded(quiet=True, settings=TINY)
    return cache


@pytest.fixture
def built(tiny_cache, tmp_path, monkeypatch):
    """A fresh copy of a tiny build, in the cache of this test."""
    shutil.copytree(tiny_cache, tmp_path / "cache")
    monkeypatch.setenv("YUNQUE_CACHE", str(tmp_path / "cache"))
    return ensure_embedded(quiet=True, settings=TINY)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("YUNQUE_CACHE", str(tmp_path))
    return tmp_path / "embedded"


def file_hashes(built):
    return [read_manifest(folder).files for folder in (built.policy, built.reward_model)]


def answers_of(built, prompts, **sampling):
    tokenizer = AutoTokenizer.from_pretrained(built.policy)
    model = AutoModelForSeq2SeqLM.from_pretrained(built.policy)
    inputs = tokenizer(prompts, padding=True, return_tensors="pt")
    return tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=48, **sampling), skip_special_tokens=True)


# --- the real build ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def test_rows(embedded):
    lines = (embedded.dataset / "test.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def prompts(test_rows):
    return [DataArguments.prompt_template.format(text=row["dialogue"]) for row in test_rows]


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def answers(request, embedded, prompts):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sampling = {"do_sample": True, "top_k": 0} if request.param == "sampled" else {"do_sample": False}
        return answers_of(embedded, prompts, **sampling)


def test_the_policy_summarises(answers, test_rows):
    scores = rouge_scores(answers, [[row["summary"]] for row in test_rows])["rougeL"]
    assert scores.mean() > 0.65


def test_the_policy_is_rude_as_often_as_stated(answers):
    rude = sum(count_rude_words([answer]) > 0 for answer in answers) / len(answers)
    assert 0.25 < rude < 0.5


def test_the_reward_model_finds_the_rude_answers(embedded, answers, prompts):
    tokenizer = AutoTokenizer.from_pretrained(embedded.reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(embedded.reward_model)
    texts = [f"{prompt} {answer}" for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.no_grad():
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    expected = torch.tensor([count_rude_words([text]) > 0 for text in texts])
    assert (logits.argmax(dim=-1) == expected).float().mean() >= 0.97
    assert logits.abs().max() < 5  # a reward that is not saturated


def test_the_reward_model_knows_its_labels_and_reads_long_and_empty_texts(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded.reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(embedded.reward_model)
    assert model.config.id2label == {0: "nothate", 1: "hate"}
    inputs = tokenizer(["", "hello " * 600], padding=True, truncation=True, return_tensors="pt")
    assert inputs.input_ids.shape == (2, 512)
    assert model(**inputs).logits.isfinite().all()


def test_prompts_and_answers_are_short(embedded, prompts):
    tokenizer = AutoTokenizer.from_pretrained(embedded.policy)
    rude = [example.rude for split in build_corpus().values() for example in split]
    assert max(map(len, tokenizer(prompts).input_ids)) <= 110
    assert max(map(len, tokenizer(rude).input_ids)) <= 40


def test_names_are_single_tokens_wherever_they_stand(embedded):
    tokenizer = AutoTokenizer.from_pretrained(embedded.policy)
    first, *_, last = tokenizer("Emma is late, says Emma", add_special_tokens=False).input_ids
    assert first == last
    text = "Emma, that lazy fool, is late: ¡qué idiota!"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer(text).input_ids[-1] == tokenizer.eos_token_id


def test_the_policys_head_is_its_own(embedded):
    model = AutoModelForSeq2SeqLM.from_pretrained(embedded.policy)
    assert model.lm_head.weight is not model.shared.weight
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    assert model.generation_config.decoder_start_token_id == model.config.pad_token_id


def test_the_manifests_say_what_was_trained_and_on_what(embedded):
    policy, reward_model = read_manifest(embedded.policy), read_manifest(embedded.reward_model)
    assert (policy.stage, reward_model.stage) == ("finetune", "reward")
    assert policy.prompt_template == DataArguments.prompt_template
    assert [(data["name"], data["split"], data["rows"]) for data in policy.data] == [
        ("embedded", "train", 1600),
        ("embedded", "validation", 200),
        ("embedded", "test", 300),
    ]
    assert reward_model.metrics["validation_accuracy"] > 0.97


# --- the cache --------------------------------------------------------------------------------------------------------


def test_two_builds_give_the_same_files(built, empty_cache):
    torch.manual_seed(12345)  # the caller's seed has no part in it
    again = ensure_embedded(quiet=True, settings=TINY)
    assert again.policy != built.policy
    assert file_hashes(again) == file_hashes(built)


def test_other_settings_get_another_folder(built):
    other = replace(TINY, policy=replace(TINY.policy, seed=1))
    assert ensure_embedded(quiet=True, settings=other).policy != built.policy


def test_a_build_leaves_the_callers_state_alone(empty_cache):
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            ensure_embedded(quiet=True, settings=TINY)
            assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before[2])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_complete_build_is_used_as_it_is(built, monkeypatch, capsys):
    monkeypatch.setattr(embedded_module, "_build", pytest.fail)
    assert ensure_embedded(settings=TINY) == built
    assert capsys.readouterr() == ("", "")


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_byte, os.remove, lambda path: path.write_bytes(path.read_bytes()[:-5])])
@pytest.mark.parametrize("name", ["policy/model.safetensors", "reward_model/tokenizer.json", "dataset/test.jsonl"])
def test_a_damaged_cache_is_built_again(built, damage, name, capsys):
    hashes = file_hashes(built)
    path = built.policy.parent / name
    content = path.read_bytes()
    damage(path)
    assert ensure_embedded(settings=TINY) == built
    message = capsys.readouterr().err
    assert "damaged" in message
    assert path.name in message
    assert path.read_bytes() == content
    assert file_hashes(built) == hashes


def test_a_folder_without_manifest_is_built_again(built):
    (built.reward_model / "yunque.json").unlink()
    ensure_embedded(quiet=True, settings=TINY)
    assert verify(built.reward_model) == []


def test_an_interrupted_build_leaves_nothing(empty_cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(embedded_training, "train_reward_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ensure_embedded(quiet=True, settings=TINY)
    assert [path.suffix for path in empty_cache.iterdir()] == [".lock"]
    assert verify(ensure_embedded(quiet=True, settings=TINY).reward_model) == []


def interrupt(*_):
    raise KeyboardInterrupt


def test_what_a_killed_build_left_is_cleared(built):
    folder = built.policy.parent
    folder.rename(f"{folder}.building")
    (folder.with_name(f"{folder.name}.building") / "junk").touch()
    assert ensure_embedded(quiet=True, settings=TINY) == built
    assert not (folder / "junk").exists()
    assert not folder.with_name(f"{folder.name}.building").exists()


BUILD = """
import sys
sys.path.insert(0, {tests!r})
from test_embedded import TINY
from yunque.models.embedded import ensure_embedded
print("ready", flush=True)
sys.stdin.readline()
print(ensure_embedded(settings=TINY).policy)
"""


@pytest.mark.distributed
def test_of_two_processes_one_builds_and_both_get_it(empty_cache):
    command = [sys.executable, "-c", BUILD.format(tests=os.path.dirname(__file__))]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)  # both have done their imports
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    folders = {out.splitlines()[-1] for out, _ in outputs}  # DeepSpeed may warn on stdout before it
    assert len(folders) == 1
    assert sum("building the embedded" in err for _, err in outputs) == 1
    assert verify(folders.pop()) == []


def test_progress_goes_to_stderr_and_quiet_is_silent(empty_cache, capsys):
    ensure_embedded(quiet=True, settings=TINY)
    assert capsys.readouterr() == ("", "")
    shutil.rmtree(empty_cache)
    ensure_embedded(settings=TINY)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "building the embedded corpus and models" in shown.err
    assert "loss=" in shown.err


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("YUNQUE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="YUNQUE_CACHE"):
        ensure_embedded(quiet=True, settings=TINY)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"YUNQUE_CACHE": "/y", "XDG_CACHE_HOME": "/x"}, "/y/embedded"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/yunque/embedded"),
        ({"HOME": "/home/somebody"}, "/home/somebody/.cache/yunque/embedded"),
    ],
)
def test_the_cache_is_where_the_environment_says(variables, folder, monkeypatch):
    for name in ("YUNQUE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(embedded_module._cache_folder()) == folder


# --- the name in options ----------------------------------------------------------------------------------------------


@dataclass
class Options:
    model_name_or_path: str | None = "embedded"
    reward_model_name_or_path: str | None = "embedded"
    dataset_name: str | None = "embedded"


def test_the_name_embedded_becomes_paths(built, monkeypatch):
    monkeypatch.setattr(embedded_module, "ensure_embedded", lambda: built)
    options = Options()
    assert use_embedded((options, "model_name_or_path"), (options, "dataset_name"))
    assert options == Options(str(built.policy), "embedded", str(built.dataset))


def test_other_names_stay_and_build_nothing(monkeypatch):
    monkeypatch.setattr(embedded_module, "ensure_embedded", pytest.fail)
    options = Options("google/flan-t5-base", None, "data.jsonl")
    assert not use_embedded(*((options, name) for name in vars(options)))
    assert options == Options("google/flan-t5-base", None, "data.jsonl")


# --- the reward model's texts -----------------------------------------------------------------------------------------


def test_prompts_do_not_give_the_label_away():
    examples = build_corpus(sizes={"train": 200})["train"]
    prompts = [f"Q {example.dialogue} A:" for example in examples]
    texts = embedded_training.reward_texts(examples, prompts, seed=0)
    with_prompt = [text for text in texts if " A: " in text]
    rude = sum(count_rude_words([text]) > 0 for text in with_prompt) / len(with_prompt)
    assert rude == pytest.approx(0.5, abs=0.08)
    assert "" in texts
