"""`yunque evaluate`: every kind of folder, what is written, what is resumed, what is refused."""

import json
import math
import os
import signal

import numpy as np
import pytest
import tiny
import torch
from evaluating import generations, options, result, start
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from yunque.errors import InputError
from yunque.evaluation.judging import ToxicityJudge

JUDGED = {"toxicity_label": "hate", "per_device_eval_batch_size": 4}


def kept(evaluation):
    """What must not depend on ranks, kills and time."""
    return json.dumps({name: evaluation[name] for name in ("metrics", "data", "decoding", "notes")})


# --- what is written --------------------------------------------------------------------------------------------------


def test_answers_and_scores_are_the_model_s_and_the_classifier_s(evaluate, kinds):
    done = evaluate("t5", toxicity_model_name_or_path=kinds.classifier, **JUDGED)
    assert done.code == 0, done.errors
    rows, metrics = generations(done.folder), result(done.folder)["metrics"]
    assert [row["id"] for row in rows] == [f"r{number}" for number in range(23)]
    tokenizer = AutoTokenizer.from_pretrained(kinds.t5)
    model = AutoModelForSeq2SeqLM.from_pretrained(kinds.t5).eval()
    judge = AutoModelForSequenceClassification.from_pretrained(kinds.classifier).eval()
    for row in rows[:6]:
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"]])
        answer = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 1:]
        assert row["answer"] == tokenizer.decode(answer, skip_special_tokens=True).strip()
        assert row["tokens"] == int((answer > 1).sum())
        labels = torch.tensor([tokenizer(row["reference"])["input_ids"]])
        with torch.no_grad():
            assert row["scores"]["nll"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
            logits = judge(torch.tensor([tokenizer(row["answer"])["input_ids"]])).logits
        assert row["scores"]["toxicity"] == pytest.approx(logits.softmax(-1)[0, 1].item(), rel=1e-5)
    toxicity = [row["scores"]["toxicity"] for row in rows]
    assert metrics["toxicity"]["mean"] == np.mean(toxicity)
    assert metrics["toxicity"]["std"] == pytest.approx(np.std(toxicity))
    counts = [len(row["reference"].split()) for row in rows]
    nats = sum(count * row["scores"]["nll"] for count, row in zip(counts, rows, strict=True))
    assert metrics["perplexity"] == pytest.approx(math.exp(nats / sum(counts)))


def test_a_judge_may_be_onnx_or_have_labels_of_their_own(kinds, tmp_path):
    texts = ["w9 w10 w11", "", "w20 w21"]
    judged = {}
    for name in ("classifier", "onnx_classifier"):
        judge = ToxicityJudge(str(getattr(kinds, name)), "hate")
        judge.load(torch.device("cpu"))
        judged[name] = judge.toxicity(texts)
    assert math.isnan(judged["classifier"][1])
    assert judged["onnx_classifier"] == pytest.approx(judged["classifier"], rel=1e-5, nan_ok=True)

    multi = tmp_path / "multi"
    tiny.roberta(("toxic", "threat"), problem_type="multi_label_classification").save_pretrained(multi)
    tiny.tokenizer().save_pretrained(multi)
    judge = ToxicityJudge(str(multi), "threat")
    judge.load(torch.device("cpu"))
    logits = judge.scorer.logits(["w9 w10"])[0]
    assert judge.toxicity(["w9 w10"]) == [pytest.approx(1 / (1 + math.exp(-logits[1])))]
    with pytest.raises(InputError, match="is a language model; give a classifier"):
        ToxicityJudge(str(kinds.onnx), "hate")


def test_evaluation_json_says_what_was_done(evaluate, kinds):
    done = evaluate("t5", max_test_samples=5, latency_prompts=3)
    found = result(done.folder)
    assert found["model"]["path"] == str(kinds.t5)
    assert found["model"]["kind"] == "full"
    weights = (kinds.t5 / "model.safetensors").stat().st_size
    assert weights < found["model"]["bytes"] < weights + 20_000
    assert (found["data"]["split"], found["data"]["rows"]) == ("train", 5)
    assert found["decoding"]["method"] == "greedy"
    assert found["scale"]["rougeL"] == 1
    assert found["scale"]["bleu"] == 100
    assert found["speed"]["first_token_s"]["num_prompts"] == 3
    assert found["speed"]["tokens_per_s"] > 0
    assert found["speed"]["peak_memory_bytes"] > 50e6
    assert found["command"].startswith(f"yunque evaluate {kinds.t5} --dataset_name")
    assert found["metrics"]["rougeL"]["rows"] == 5
    assert not (done.folder / ".parts").exists()
    assert "rougeL" in done.output


def test_every_kind_of_folder_is_answered_as_it_is(evaluate, kinds, tmp_path):
    answers, described = {}, {}
    for kind in ("t5", "llama", "adapter", "virtual", "nf4", "int8"):
        done = evaluate(kind, tmp_path / kind, max_test_samples=9, latency_prompts=0)
        assert done.code == 0, done.errors
        answers[kind] = [row["answer"] for row in generations(done.folder)]
        described[kind] = result(done.folder)["model"]
        assert math.isfinite(result(done.folder)["metrics"]["nll"]["mean"])
    expected = {"t5": "full", "llama": "full", "adapter": "adapter", "virtual": "adapter", "nf4": "nf4", "int8": "int8"}
    assert {kind: model["kind"] for kind, model in described.items()} == expected
    assert described["adapter"]["base"] == str(kinds.t5)
    assert described["adapter"]["base_bytes"] == described["t5"]["bytes"]
    assert described["int8"]["weights_bytes"] < described["t5"]["weights_bytes"]
    assert {described[kind]["dtype"] for kind in ("t5", "nf4")} == {"float32", "bfloat16"}
    assert answers["adapter"] != answers["t5"] != answers["nf4"]
    assert answers["virtual"] != answers["llama"]
    alike = sum(ours == theirs for ours, theirs in zip(answers["int8"], answers["t5"], strict=True))
    assert alike >= 3, "int8 is a rounding of the same model"


@pytest.mark.parametrize(("torch_kind", "onnx_kind"), [("t5", "onnx"), ("llama", "onnx_llama")])
def test_an_onnx_folder_is_answered_and_scored_as_its_torch_folder(evaluate, kinds, tmp_path, torch_kind, onnx_kind):
    both = {}
    for kind in (torch_kind, onnx_kind):
        done = evaluate(kind, tmp_path / kind, toxicity_model_name_or_path=kinds.classifier)
        assert done.code == 0, done.errors
        both[kind] = generations(done.folder)
    for ours, theirs in zip(both[onnx_kind], both[torch_kind], strict=True):
        for name in ("id", "prompt", "answer", "tokens", "finished"):
            assert ours[name] == theirs[name]
        assert ours["scores"] == pytest.approx(theirs["scores"], rel=1e-4, abs=1e-6)
    found = result(tmp_path / onnx_kind)["model"]
    assert found["kind"] == "onnx"
    assert found["bytes"] > found["weights_bytes"] > 10_000
    # sampling: of its own random numbers, but of the same ones in any batch
    sampled = []
    for size in (1, 8):
        done = evaluate(
            onnx_kind, tmp_path / f"{onnx_kind}{size}", temperature=[0.9], top_k=[20], max_test_samples=8,
            per_device_eval_batch_size=size, latency_prompts=0,
        )  # fmt: skip
        assert done.code == 0, done.errors
        sampled.append([row["answer"] for row in generations(done.folder)])
    assert sampled[0] == sampled[1] != [row["answer"] for row in both[onnx_kind]][:8]


def test_any_file_with_the_columns_does_and_references_may_be_missing(evaluate, tmp_path):
    path = tmp_path / "some.csv"
    path.write_text('question,answer\n"w9 w10",w11\nw12,\n" ",w9\nw13,w14 w15\n')
    done = evaluate("t5", dataset_name=path, text_column="question", target_column="answer")
    assert done.code == 0, done.errors
    rows, found = generations(done.folder), result(done.folder)
    assert [row["id"] for row in rows] == ["0", "1", "3"]
    assert ["reference" in row for row in rows] == [True, False, True]
    assert found["metrics"]["rougeL"]["rows"] == 2
    assert any("1 of 3 rows have no reference" in note for note in found["notes"])
    assert any("1 rows without a text" in note for note in found["notes"])

    done = evaluate("t5", tmp_path / "none", dataset_name=path, text_column="question", target_column="nothing")
    assert done.code == 0, done.errors
    found = result(done.folder)
    assert not {"rougeL", "bleu", "f1", "nll", "perplexity"} & set(found["metrics"])
    assert {"length", "repetition", "corpus_distinct_2"} <= set(found["metrics"])
    assert any("no references" in note for note in found["notes"])


def test_ids_that_come_twice_give_way_to_positions(evaluate, tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"fname": "a", "dialogue": f"w{9 + row}"}) + "\n" for row in range(3)))
    done = evaluate("t5", dataset_name=path)
    assert [row["id"] for row in generations(done.folder)] == ["0", "1", "2"]
    assert any("names some rows twice" in note for note in result(done.folder)["notes"])


def test_the_manifest_s_template_is_the_prompt(evaluate, kinds, tmp_path):
    from yunque.artifacts import save_model_folder
    from yunque.models.loading import save_model

    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(kinds.t5), AutoTokenizer.from_pretrained(kinds.t5)
    folder = tmp_path / "sft"
    save_model_folder(
        folder, lambda place: save_model(model, tokenizer, place),
        stage="finetune", parents=[str(kinds.t5)], prompt_template="w8 {text} w9",
    )  # fmt: skip
    done = evaluate(folder, prompt_template=None, max_test_samples=3)
    assert done.code == 0, done.errors
    assert all(row["prompt"].startswith("w8 w") and row["prompt"].endswith(" w9") for row in generations(done.folder))
    assert result(done.folder)["model"]["stage"] == "finetune"


def test_empty_answers_have_scores_and_a_note(evaluate, kinds, tmp_path):
    model = tiny.t5()
    with torch.no_grad():
        model.get_decoder().final_layer_norm.weight.zero_()  # all logits are 0: argmax is the padding token
    silent = tmp_path / "silent"
    model.save_pretrained(silent)
    tiny.tokenizer(("Sum:",)).save_pretrained(silent)
    done = evaluate(silent, toxicity_model_name_or_path=kinds.classifier, max_test_samples=4)
    assert done.code == 2
    assert "toxicity: none of the 4 answers got a finite score" in done.errors
    done = evaluate(silent, max_test_samples=4, resume=True)
    assert done.code == 0, done.errors
    found = result(done.folder)
    assert found["metrics"]["empty"]["mean"] == 1
    assert found["metrics"]["rougeL"]["mean"] == found["metrics"]["bleu"]["mean"] == 0
    assert any("4 of 4 answers are empty" in note for note in found["notes"])


# --- decoding ---------------------------------------------------------------------------------------------------------


def test_a_sweep_leaves_one_evaluation_per_setting(evaluate, tmp_path):
    done = evaluate("t5", temperature=[0.0, 0.8], top_p=[0.9, 1.0], max_test_samples=6, latency_prompts=0)
    assert done.code == 0, done.errors
    names = ["greedy", "temperature_0.8", "temperature_0.8_top_p_0.9"]
    assert sorted(path.name for path in done.folder.iterdir() if path.is_dir()) == names
    sweep = json.loads((done.folder / "sweep.json").read_text())
    assert {run["folder"]: run["decoding"]["top_p"] for run in sweep["runs"]} == dict(
        zip(names, (1, 1, 0.9), strict=True)
    )
    answers = [[row["answer"] for row in generations(done.folder / name)] for name in names]
    assert len({json.dumps(texts) for texts in answers}) == 3
    # a prompt's sample does not depend on what else is in its batch
    alone = evaluate("t5", tmp_path / "b", temperature=[0.8], max_test_samples=6, per_device_eval_batch_size=1)
    assert [row["answer"] for row in generations(alone.folder)] == answers[1]


def test_self_consistency_scores_the_answer_of_the_majority(evaluate, tmp_path):
    given = {"temperature": [0.5], "max_new_tokens": 1, "max_test_samples": 8, "latency_prompts": 0}
    done = evaluate("t5", self_consistency=7, **given)
    assert done.code == 0, done.errors
    rows = generations(done.folder)
    for row in rows:
        votes = [text.lower() for text in row["samples"]]
        share = votes.count(row["answer"].lower()) / 7
        assert len(votes) == 7
        assert (
            share == max(votes.count(text) for text in votes if text) / 7 == pytest.approx(row["scores"]["agreement"])
        )
    assert any(1 / 7 < row["scores"]["agreement"] < 1 for row in rows)
    # the pattern decides what counts as the same
    done = evaluate("t5", tmp_path / "p", self_consistency=7, vote_pattern="w", **given)
    assert all(row["scores"]["agreement"] == sum("w" in text for text in row["samples"]) / 7
               for row in generations(done.folder))  # fmt: skip


def test_dola_answers_otherwise(evaluate, tmp_path):
    given = {"max_test_samples": 6, "latency_prompts": 0}
    done = evaluate("llama", dola_layers="high", **given)
    assert done.code == 0, done.errors
    assert result(done.folder)["decoding"]["method"] == "dola_greedy"
    plain = evaluate("llama", tmp_path / "plain", **given)
    assert [row["answer"] for row in generations(done.folder)] != [row["answer"] for row in generations(plain.folder)]
    assert result(done.folder)["metrics"]["nll"] == result(plain.folder)["metrics"]["nll"]


# --- ranks, kills, resumption -----------------------------------------------------------------------------------------


KILLED = """
import os, signal
from yunque import cli
from yunque.evaluation.progress import Progress

append, finished = Progress.append, []

def killed(self, record):
    if len(finished) == 2:
        self._file.write(b'{"batch": 2, "seco')
        self._file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    finished.append(append(self, record))

Progress.append = killed
cli.main()
"""
"""`yunque`, killed by kill -9 in the middle of writing its third batch."""


@pytest.mark.distributed
def test_two_ranks_and_a_kill_leave_the_metrics_of_one_run(evaluate, kinds, tmp_path):
    judged = {**JUDGED, "toxicity_model_name_or_path": kinds.classifier}
    alone = evaluate("t5", **judged)
    assert alone.code == 0, alone.errors
    given = {"dataset_name": kinds.rows, "prompt_template": "Sum: {text}", "max_new_tokens": 6, **judged}
    folder = tmp_path / "ranks"
    process = start(["evaluate", kinds.t5, *options(**given, output_dir=folder)], ranks=2)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    assert output.count("written:") == 1
    assert result(folder)["speed"]["num_ranks"] == 2
    assert kept(result(folder)) == kept(result(alone.folder))
    assert (folder / "generations.jsonl").read_bytes() == (alone.folder / "generations.jsonl").read_bytes()

    killed = tmp_path / "killed"
    process = start(["evaluate", kinds.t5, *options(**given, output_dir=killed)], code=KILLED)
    assert process.wait(timeout=600) == -signal.SIGKILL
    assert (killed / ".parts" / "answers" / "rank-0000.jsonl").read_bytes().endswith(b'"seco')
    assert not (killed / "evaluation.json").exists()
    refused = evaluate("t5", killed, **judged)
    assert refused.code == 2
    assert "unfinished evaluation; continue it with --resume" in refused.errors
    other = evaluate("t5", killed, **judged, resume=True, seed=3)
    assert other.code == 2
    assert "differs in seed (0 there, 3 here)" in other.errors
    again = evaluate("t5", killed, **judged, resume=True)
    assert again.code == 0, again.errors
    assert kept(result(killed)) == kept(result(alone.folder))


def test_a_signal_keeps_what_is_done_and_exits_75(evaluate, kinds, monkeypatch, tmp_path):
    from yunque.evaluation import progress

    append, count = progress.Progress.append, []

    def interrupted(self, record):
        append(self, record)
        count.append(record["batch"])
        if len(count) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress.Progress, "append", interrupted)
    done = evaluate("t5", **JUDGED)
    assert done.code == 75
    assert "2 of 6 batches are kept" in done.errors
    monkeypatch.undo()
    count.clear()
    monkeypatch.setattr(progress.Progress, "append", lambda self, record: (append(self, record), count.append(record)))
    resumed = evaluate("t5", **JUDGED, resume=True)
    assert resumed.code == 0, resumed.errors
    assert [record["batch"] for record in count] == [2, 3, 4, 5]
    whole = evaluate("t5", tmp_path / "whole", **JUDGED)
    assert kept(result(resumed.folder)) == kept(result(whole.folder))


def test_a_finished_evaluation_is_kept_continued_or_replaced(evaluate, tmp_path):
    given = {"max_test_samples": 4, "latency_prompts": 0}
    assert evaluate("t5", **given).code == 0
    before = (tmp_path / "out" / "evaluation.json").read_bytes()
    refused = evaluate("t5", **given)
    assert (refused.code, len(refused.errors.splitlines())) == (2, 1)
    assert "holds an evaluation" in refused.errors
    again = evaluate("t5", **given, resume=True)
    assert again.code == 0
    assert "evaluated already" in again.output
    assert (tmp_path / "out" / "evaluation.json").read_bytes() == before
    other = evaluate("t5", **given, resume=True, min_new_tokens=3)
    assert other.code == 2
    assert "min_new_tokens (0 there, 3 here)" in other.errors
    replaced = evaluate("t5", **given, overwrite_output_dir=True, min_new_tokens=3)
    assert replaced.code == 0
    assert result(replaced.folder)["decoding"]["min_new_tokens"] == 3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "given", "words"),
    [
        ("nowhere/at/all", {}, "no such model folder"),
        ("classifier", {}, "is a classifier"),
        ("t5", {"dataset_name": None}, "dataset_name: give"),
        ("t5", {"text_column": "words"}, "text_column: no column 'words'"),
        (
            "t5",
            {"toxicity_model_name_or_path": "CLASSIFIER", "toxicity_label": "rude"},
            "no label 'rude'; it has nothate",
        ),
        ("t5", {"toxicity_model_name_or_path": "none/at/all"}, "toxicity_model_name_or_path: "),
        ("t5", {"toxicity_model_name_or_path": "T5"}, "toxicity_label: "),
        ("t5", {"self_consistency": 5}, "self_consistency: samples at temperature 0 are all equal"),
        ("t5", {"vote_pattern": "("}, "vote_pattern: is for self_consistency only"),
        ("t5", {"temperature": [0.7, 0.7]}, "temperature"),
        ("t5", {"temperature": [-1]}, "temperature: -1.0 is negative"),
        ("t5", {"format_pattern": "("}, "format_pattern: '(' is no regular expression"),
        ("t5", {"nonsense": 1}, "--nonsense"),
        ("t5", {"dola_layers": "high"}, "t5 is an encoder-decoder"),
        ("llama", {"dola_layers": "1,2"}, "dola_layers: '1,2' is unknown"),
        ("virtual", {"dola_layers": "low"}, "virtual tokens"),
        ("virtual", {"temperature": [0.7]}, "virtual tokens"),
        ("nf4", {"load_in_4bit": True}, "stored as nf4 already"),
        ("onnx", {"dola_layers": "low"}, "no logits of inner layers"),
        ("onnx", {"load_in_4bit": True}, "ONNX folder runs as it is stored"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(evaluate, kinds, folder, given, words):
    places = {"CLASSIFIER": kinds.classifier, "T5": kinds.t5}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in given.items()}
    done = evaluate(folder, **given)
    assert done.code == 2
    assert words in done.errors.splitlines()[-1]
    assert done.errors.splitlines()[-1].startswith("error: ")
    assert not done.folder.exists()


def test_help_lists_the_options(evaluate):
    done = evaluate("t5", help=True)
    assert done.code == 0
    for option in ("--toxicity_model_name_or_path", "--self_consistency", "--config", "--resume"):
        assert option in done.output
