"""Quantized folders of every family: that they are what was asked for, what the report says, what is refused."""

import json
import runpy
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    ElectraConfig,
    ElectraForSequenceClassification,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from yunque import artifacts, runtime
from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.compression.schemes import LAYER_KINDS, ONNX_SCHEMES, LayerScheme, PrecisionPlan
from yunque.errors import CheckFailed, InputError
from yunque.export import quantizing
from yunque.export.arguments import ExportArguments
from yunque.export.dequantized import quantize_dequantize
from yunque.export.fidelity import torch_logits
from yunque.export.folder import export, write_folder
from yunque.export.quantized import quantizable_layers
from yunque.export.quantizing import quantize, summary
from yunque.export.source import Source, float_model
from yunque.models.arguments import ModelArguments
from yunque.models.inference import load_for_inference
from yunque.models.loading import load_classifier

KINDS = {"t5": "seq2seq", "bart_untied": "seq2seq", "gpt2": "causal", "llama": "causal", "roberta": "classifier"}
ROOT = Path(__file__).parents[2]
PROMPT, ANSWER = [5, 6, 7, 8], [9, 10, 11]


def arguments(made, folder, scheme, **options):
    data = str(made.source.parent / "prompts.jsonl")
    values = {
        "model_name_or_path": str(made.source), "scheme": scheme, "output_dir": str(folder), "parity_dataset": data,
        "parity_text_column": "text", "parity_prompts": 3, "parity_tokens": 6, "calibration_text_column": "text",
        "calibration_new_tokens": 4, "calibration_samples": 6,
    }  # fmt: skip
    if scheme == "onnx_int8_static":
        values["calibration_dataset"] = data
    return QuantizationArguments(**(values | options))


def logits_of(folder, kind, verify="sha256"):
    model = runtime.load(folder, threads=1, verify=verify)
    if kind == "classifier":
        return model.logits([PROMPT])
    if kind == "causal":
        return model.logits([[*PROMPT, *ANSWER]])[0]
    return model.logits([PROMPT], [ANSWER[:-1]])[0]


def float_logits(model, kind):
    if kind == "causal":
        return torch_logits(model, kind)([*PROMPT[:1]], [*PROMPT[1:], *ANSWER, 0])
    return torch_logits(model, kind)(PROMPT, ANSWER)


@pytest.mark.parametrize("scheme", ["onnx_int8_weights", "onnx_int4", "onnx_nf4"])
@pytest.mark.parametrize("name", KINDS)
def test_weights_put_into_torch_give_the_graph_s_logits(name, scheme, exported, tmp_path):
    """Layers' names, parameters and numbers are those of the graph: what the sensitivity search relies on."""
    model, kind = exported(name).model, KINDS[name]
    layer_scheme = LayerScheme(scheme.removeprefix("onnx_"), 16, int8_inputs=False)
    former = {key: value.clone() for key, value in model.state_dict().items()}
    source = Source(name, kind, model, tiny.tokenizer(), None)
    layers = quantizable_layers(source)
    written = write_folder(source, tmp_path, PrecisionPlan(layer_scheme))
    found = logits_of(tmp_path, kind, verify="none")
    before = float_logits(model, kind)
    try:
        substitute(model, [item.layer for item in written if item.scheme.is_quantized], layer_scheme)
        wanted = float_logits(model, kind)
    finally:
        model.load_state_dict(former)
    assert len(layers) == len(written)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.abs(found - before).max() > 1e-3


def substitute(model, layers, scheme):
    state = model.state_dict()
    for layer in layers:
        for name in layer.parameters:
            module = model.get_submodule(name.removesuffix(".weight"))
            weight = state[name] if isinstance(module, Conv1D) else state[name].T
            seen = torch.from_numpy(quantize_dequantize(weight.numpy(), scheme).copy())
            state[name].copy_(seen if isinstance(module, Conv1D) else seen.T)


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama", "roberta"])
def test_every_scheme_makes_a_folder_that_answers(name, exported, tmp_path):
    made, kind = exported(name), KINDS[name]
    reference = float_logits(made.model, kind)
    for scheme in (*ONNX_SCHEMES, "bnb_nf4", "bnb_int8"):
        takes_blocks = scheme in ("onnx_int4", "onnx_nf4", "onnx_int8_weights")
        manifest = quantize(arguments(made, tmp_path / scheme, scheme, **({"block_size": 16} if takes_blocks else {})))
        assert artifacts.verify(tmp_path / scheme) == []
        assert manifest.stage == "quantize"
        assert manifest.parents[0]["path"] == str(made.source)
        if scheme.startswith("onnx"):
            found = logits_of(tmp_path / scheme, kind)
            layers = 1 if kind == "classifier" else 0  # the labels' scores
            assert len(manifest.metrics["layers"]["left"]) == layers
            most = {"onnx_int8_dynamic": 0.42, "onnx_int8_static": 0.42, "onnx_int8_weights": 0.52}
            sizes = manifest.metrics["bytes"]
            shares = (sizes["before"]["total"] - sizes["before"]["other"]) * most.get(scheme, 0.4)
            assert sizes["after"]["total"] - sizes["after"]["other"] < shares
        else:
            loaded = load_torch(tmp_path / scheme, kind)
            found = float_logits(loaded, kind)
            assert any("Linear4bit" in str(type(m)) or "Linear8bit" in str(type(m)) for m in loaded.modules())
        # bitsandbytes on a CPU packs weights of a few hundred numbers badly: only these tiny models have such.
        bound, worst = (0.15, 0.1) if "int8" in scheme else (1.2, 0.9) if scheme == "bnb_nf4" else (0.7, 0.3)
        assert 1e-4 < np.linalg.norm(found - reference) / np.linalg.norm(reference) < bound, scheme
        report = manifest.metrics
        assert 0 < report["errors"]["mean"] <= report["errors"]["worst"] < worst
        assert report["errors"]["worst_layer"] in report["errors"]["layers"]
        assert 0 < report["fidelity"]["kl_mean"] <= report["fidelity"]["kl_max"] < 10
        assert report["fidelity"]["greedy_agreement"] > (0.7 if "int8" in scheme else 0.0)
        assert sum(report["layers"]["schemes"].values()) == report["layers"]["quantized"] > 0
        assert any("layers quantized" in line for line in summary(report))


def load_torch(folder, kind):
    if kind == "classifier":
        return load_classifier(str(folder), "model_name_or_path")[0]
    return load_for_inference(ModelArguments(model_name_or_path=str(folder))).model


def test_plan_and_skipped_layers_are_followed(exported, tmp_path):
    made = exported("t5")
    layers = [layer.name for layer in quantizable_layers(Source("t5", "seq2seq", made.model, None, None))]
    kinds = [kind for kind in LAYER_KINDS if kind != "int8_static"]
    chosen = {name: LayerScheme(kinds[number % len(kinds)]) for number, name in enumerate(layers)}
    chosen = {name: scheme for name, scheme in chosen.items() if "block.1" not in name}
    plan = PrecisionPlan(LayerScheme("int8_dynamic"), chosen | {"lm_head": LayerScheme("int4", 16)})
    plan.save(tmp_path / "plan.json")
    manifest = quantize(
        arguments(made, tmp_path / "mixed", None, plan=str(tmp_path / "plan.json"), skip_layers=r"EncDecAttention\.kv$")
    )
    kept = manifest.metrics["plan"]
    assert kept["layers"]["lm_head"] == {"kind": "int4", "block_size": 16}
    left = manifest.metrics["layers"]["left"]
    skipped = [name for name in layers if name.endswith("EncDecAttention.kv")]
    assert skipped
    assert set(left) == {*skipped, *(name for name in plan.layers if not plan.scheme(name).is_quantized)}
    assert np.isfinite(logits_of(tmp_path / "mixed", "seq2seq")).all()
    for content, message in (
        ({"format": 1, "layers": {"lm_haed": {"kind": "int4"}}}, "has no layer lm_haed"),
        ({"format": 1, "layers": {"lm_head": {"kind": "int8_static"}}}, "calibration_dataset: int8_static measures"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            quantize(arguments(made, tmp_path / "wrong", None, plan=str(tmp_path / "plan.json")))


def test_calibration_leaves_out_and_counts_long_rows(exported, tmp_path):
    made = exported("gpt2")
    rows = ["w3 w4", "w5", "w6 w7 w8", " ".join(["w9"] * 30), " ".join(["w9"] * 500)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    options = {"calibration_dataset": str(data), "calibration_samples": 5}
    manifest = quantize(arguments(made, tmp_path / "a", "onnx_int8_static", **options))
    found = manifest.metrics["calibration"]
    assert (found["rows"], found["too_long"]) == (4, 1)  # 64 positions
    assert any("1 too long and left out" in line for line in summary(manifest.metrics))
    ranges = {name: scheme["input_range"] for name, scheme in manifest.metrics["plan"]["layers"].items()}
    assert len(ranges) == 9
    shorter = options | {"calibration_max_tokens": 10, "calibration_method": "percentile", "calibration_percentile": 90}
    manifest = quantize(arguments(made, tmp_path / "b", "onnx_int8_static", **shorter))
    assert manifest.metrics["calibration"]["too_long"] == 2
    narrower = {name: scheme["input_range"] for name, scheme in manifest.metrics["plan"]["layers"].items()}
    assert sum(high for _, high in narrower.values()) < 0.8 * sum(high for _, high in ranges.values())
    data.write_text(data.read_text().replace('"w5"', '"w5 w5"'))
    with pytest.raises(InputError, match="calibration_dataset: all 5 prompts are empty or longer than 1 tokens"):
        quantize(arguments(made, tmp_path / "c", "onnx_int8_static", **options | {"calibration_max_tokens": 1}))
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_quantized_is_refused(exported, tmp_path, monkeypatch):
    made = exported("t5")
    quantized = tmp_path / "nf4"
    quantize(arguments(made, quantized, "bnb_nf4"))
    for options, error, message in (
        ({"model_name_or_path": str(quantized)}, InputError, "is quantized already"),
        ({"model_name_or_path": str(made.folder)}, InputError, "is an ONNX folder already"),
        ({"skip_layers": "nowhere"}, InputError, "is in the name of no"),
        ({"skip_layers": "."}, CheckFailed, "nothing to quantize"),
    ):
        for scheme in ("onnx_int8_dynamic", "bnb_int8"):
            with pytest.raises(error, match=message):
                quantize(arguments(made, tmp_path / "out", scheme, **options))
            assert not (tmp_path / "out").exists()
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(quantizing.shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(InputError, match=r"the result needs about .* MB and the disk has 1"):
        quantize(arguments(made, tmp_path / "out", "onnx_int8_dynamic"))
    assert not (tmp_path / "out").exists()


def test_blocks_that_fit_no_layer_are_an_error(exported, tmp_path):
    PrecisionPlan(layers={"lm_head": LayerScheme("int4", 32)}).save(tmp_path / "plan.json")
    with pytest.raises(CheckFailed, match="none of 9 layers changes; of most: rows of 16 features cannot be looked up"):
        quantize(arguments(exported("gpt2"), tmp_path / "out", None, plan=str(tmp_path / "plan.json")))
    assert not (tmp_path / "out").exists()


def test_altered_weights_are_noticed_at_load(exported, tmp_path):
    folder = tmp_path / "int8"
    quantize(arguments(exported("llama"), folder, "onnx_int8_dynamic"))
    runtime.load(folder)
    weights = bytearray((folder / "weights.bin").read_bytes())
    weights[100] ^= 1
    (folder / "weights.bin").write_bytes(weights)
    with pytest.raises(InputError, match=r"weights\.bin has other content"):
        runtime.load(folder)
    (folder / "weights.bin").unlink()
    with pytest.raises(InputError, match=r"weights\.bin is missing"):
        runtime.load(folder)


def test_adapter_is_merged_first(exported, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM

    made = exported("t5")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(made.source),
        LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wo"], init_lora_weights=False),
    )
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    shutil.copy(made.source / "tokenizer.json", adapter)
    shutil.copy(made.source / "tokenizer_config.json", adapter)
    wanted = float_logits(model.merge_and_unload().eval(), "seq2seq")
    for scheme in ("onnx_int8_weights", "bnb_int8"):
        manifest = quantize(arguments(made, tmp_path / scheme, scheme, model_name_or_path=str(adapter)))
        loaded = tmp_path / scheme
        is_torch = scheme == "bnb_int8"
        found = float_logits(load_torch(loaded, "seq2seq"), "seq2seq") if is_torch else logits_of(loaded, "seq2seq")
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 0.15
        assert [parent["path"] for parent in manifest.parents] == [str(adapter), str(made.source)]


@pytest.mark.parametrize("scheme", ["bnb_nf4", "bnb_int8"])
@pytest.mark.parametrize("family", ["opt", "gpt_neox", "electra"])
def test_torch_schemes_take_families_that_cannot_be_exported(tmp_path, family, scheme):
    sizes = {"vocab_size": 64, "num_attention_heads": 2, "hidden_size": 16, **tiny.SPECIAL}
    torch.manual_seed(0)
    if family == "opt":
        model = OPTForCausalLM(OPTConfig(ffn_dim=32, num_hidden_layers=2, word_embed_proj_dim=16, **sizes))
    elif family == "gpt_neox":
        model = GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=32, num_hidden_layers=2, **sizes))
    else:
        model = ElectraForSequenceClassification(
            ElectraConfig(embedding_size=16, intermediate_size=32, num_hidden_layers=2, num_labels=3, **sizes)
        )
    source, folder = tmp_path / "float", tmp_path / "small"
    model.save_pretrained(source)
    tiny.tokenizer().save_pretrained(source)
    manifest = quantize(
        QuantizationArguments(
            model_name_or_path=str(source), scheme=scheme, output_dir=str(folder), parity_prompts=2, parity_tokens=4
        )
    )
    assert manifest.metrics["layers"]["quantized"] >= 8
    assert manifest.metrics["fidelity"]["kl_mean"] < 0.1
    with pytest.raises(InputError, match="cannot be exported"):
        quantize(
            QuantizationArguments(
                model_name_or_path=str(source), scheme="onnx_int8_dynamic", output_dir=str(tmp_path / "onnx")
            )
        )


def test_an_onnx_folder_stands_for_the_model_it_was_made_from(tmp_path, monkeypatch):
    def write(staging):
        tiny.llama().save_pretrained(staging)
        tiny.tokenizer().save_pretrained(staging)

    model, onnx_folder = tmp_path / "model", tmp_path / "onnx"
    artifacts.save_model_folder(model, write, stage="finetune", parents=["base"])
    export(ExportArguments(model_name_or_path=str(model), output_dir=str(onnx_folder), parity_tokens=2))
    assert float_model(str(onnx_folder)) == str(model)
    assert float_model(str(model)) == str(model)
    argv = ["quantize.py", "--model_name_or_path", onnx_folder, "--scheme", "onnx_int8_dynamic", "--parity_tokens", 2]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--output_dir", str(tmp_path / "int8")])
    runpy.run_path(str(ROOT / "compress" / "quantize.py"))["main"]()
    assert artifacts.read_manifest(tmp_path / "int8").parents[0]["path"] == str(model)
    manifest = model / artifacts.MANIFEST
    manifest.write_text(manifest.read_text().replace('"finetune"', '"ppo"'))
    with pytest.raises(InputError, match=rf"made from {model} \(has changed"):
        float_model(str(onnx_folder))
    manifest.unlink()
    shutil.rmtree(model)
    with pytest.raises(InputError, match=rf"made from {model} \(not found"):
        float_model(str(onnx_folder))
