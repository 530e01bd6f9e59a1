"""Folders for optimum-onnx: the proof at export, one copy of the weights, and that library itself where it is."""

import json
import os
import subprocess
from pathlib import Path

import onnx
import pytest
import torch
from exported import MANY_WORDS, tokenizer

from yunque.errors import CheckFailed
from yunque.export import optimum
from yunque.export.arguments import ExportArguments
from yunque.export.folder import export

PEER = Path(os.environ.get("PEERS_HOME", "/nowhere")) / "optimum" / "bin" / "python"
"""The environment of its own that optimum-onnx needs: it takes no transformers 5."""

SEQ2SEQ = ("t5_gated", "t5_untied", "t5_deep_encoder", "bart_untied")
CAUSAL = ("gpt2", "llama", "llama_grouped", "llama_scaled", "mistral", "qwen2", "qwen3")
CLASSIFIERS = ("bert", "roberta", "distilbert")


@pytest.fixture(scope="module")
def laid_out(exported, prompts, tmp_path_factory):
    """A function from a model's name to its folder for optimum-onnx and the manifest."""
    root = tmp_path_factory.mktemp("optimum")
    data = root / "prompts.jsonl"
    data.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))

    def make(name):
        arguments = ExportArguments(
            model_name_or_path=str(exported(name).source), output_dir=str(root / name), optimum_layout=True,
            parity_dataset=str(data), parity_text_column="text", parity_prompts=6, parity_tokens=MANY_WORDS,
            overwrite_output_dir=True,
        )  # fmt: skip
        return root / name, export(arguments)

    return make


@pytest.mark.parametrize("name", ["t5_untied", "bart_untied", "gpt2", "llama_grouped", "qwen3", "bert"])
def test_the_same_model_in_the_other_layout(exported, laid_out, name):
    folder, manifest = laid_out(name)
    parity = manifest.metrics["parity"]
    assert parity["max_logit_difference"] < 1e-4
    assert parity["tokens_equal"] + parity["ties"] == parity["tokens_compared"] >= 6
    graphs = {path.name for path in folder.glob("*.onnx")}
    if name in SEQ2SEQ:
        assert graphs == {"encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"}
    else:
        assert graphs == {"model.onnx"}
    ours, theirs = ((made / "weights.bin").stat().st_size for made in (exported(name).folder, folder))
    assert abs(theirs - ours) < 4096  # the same arrays, though the graphs be three; a pair's token types are kept apart


def test_names_are_those_that_optimum_goes_by(laid_out):
    later = onnx.load(laid_out("t5_gated")[0] / "decoder_with_past_model.onnx", load_external_data=False).graph
    assert [value.name for value in later.input] == [
        "input_ids", "encoder_attention_mask",
        *(f"past_key_values.{layer}.{part}" for layer in range(2)
          for part in ("decoder.key", "decoder.value", "encoder.key", "encoder.value")),
    ]  # fmt: skip
    assert {value.name for value in later.output} == {
        "logits", *(f"present.{layer}.decoder.{part}" for layer in range(2) for part in ("key", "value"))
    }  # fmt: skip


def test_a_wrong_mask_fails_the_export(laid_out, monkeypatch):
    whole = optimum.OptimumDecoder._later_keys
    monkeypatch.setattr(
        optimum.OptimumDecoder, "_later_keys", lambda self, length, total, window=-1: whole(self, length, total)
    )
    with pytest.raises(CheckFailed, match="parity"):
        laid_out("mistral")


_GENERATE = """
import json, sys
import torch
from optimum import onnxruntime
from transformers import AutoTokenizer

CLASSES = {"seq2seq": "Seq2SeqLM", "causal": "CausalLM", "classifier": "SequenceClassification"}

def answer(kind, folder, prompts, new):
    model = getattr(onnxruntime, f"ORTModelFor{CLASSES[kind]}").from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    width = max(map(len, prompts))
    gaps = [[0] * (width - len(row)) for row in prompts]
    left = kind == "causal"
    ids = torch.tensor([gap + row if left else row + gap for gap, row in zip(gaps, prompts)])
    mask = [gap + [1] * len(row) if left else [1] * len(row) + gap for gap, row in zip(gaps, prompts)]
    batch = {"input_ids": ids, "attention_mask": torch.tensor(mask)}
    if kind == "classifier":
        return model(**batch).logits.tolist()
    found = []
    for count, beams in ((new, 1), (8, 3)):
        limits = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": beams}
        found.append([row[-count:] for row in model.generate(**batch, **limits).tolist()])
    return found

found = {}
for name, *work in json.load(sys.stdin):
    try:
        found[name] = answer(*work)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="PEERS_HOME has no environment with optimum-onnx")
def test_optimum_loads_them_and_writes_the_same_tokens(exported, laid_out, prompts):
    new, work, wanted = 24, [], {}
    for kind, names in (("seq2seq", SEQ2SEQ), ("causal", CAUSAL), ("classifier", CLASSIFIERS)):
        for name in names:
            ids = tokenizer(name)(prompts[:4])["input_ids"]
            work.append((name, kind, str(laid_out(name)[0]), ids, new))
            wanted[name] = _torch(exported(name).model, kind, ids, new)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [PEER, "-c", _GENERATE], input=json.dumps(work), capture_output=True, text=True, env=env, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in CLASSIFIERS:
        torch.testing.assert_close(torch.tensor(found.pop(name)), torch.tensor(wanted.pop(name)), atol=1e-4, rtol=0)
    assert found == wanted


def _torch(model, kind, ids, new):
    """What transformers generates greedily and with three beams, a prompt at a time; of a classifier, the logits."""
    with torch.inference_mode():
        if kind == "classifier":
            return [model(torch.tensor([row])).logits[0].tolist() for row in ids]
        found = []
        for count, beams in ((new, 1), (8, 3)):
            rows = []
            for row in ids:
                made = model.generate(
                    torch.tensor([row]), max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=beams
                )
                rows.append(made[0, -count:].tolist())
            found.append(rows)
    return found
