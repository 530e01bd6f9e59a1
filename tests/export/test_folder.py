"""Every family as an ONNX folder: the proof, one copy of the weights, adapters, what is refused."""

import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from exported import CLASSIFIERS, GENERATORS, MANY_WORDS, REPEATING
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, OPTConfig, T5Config

from yunque import artifacts
from yunque.errors import CheckFailed, InputError
from yunque.export import t5
from yunque.export.arguments import ExportArguments
from yunque.export.folder import export
from yunque.export.source import Source
from yunque.runtime import load

ROOT = Path(__file__).parents[2]
NEVER_BELOW = 1e-4  # logits of the tiny models are of size 1 to 10; float32 sums in another order differ by 1e-6


def regions(path):
    """Initializers in the weights file by name: offset and length."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    stored = [tensor for tensor in tensors if tensor.data_location == onnx.TensorProto.EXTERNAL]
    fields = [{item.key: item.value for item in tensor.external_data} for tensor in stored]
    return {tensor.name: (int(f["offset"]), int(f["length"])) for tensor, f in zip(stored, fields, strict=True)}


@pytest.mark.parametrize("name", GENERATORS | REPEATING)
def test_generators_are_the_same_model(exported, name):
    parity = exported(name).manifest.metrics["parity"]
    assert parity["max_logit_difference"] < NEVER_BELOW
    assert parity["max_step_difference"] < NEVER_BELOW
    assert parity["tokens_equal"] + parity["ties"] == parity["tokens_compared"] >= 6 * (MANY_WORDS - 9)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_the_same_model(exported, name):
    parity = exported(name).manifest.metrics["parity"]
    assert parity["max_logit_difference"] < NEVER_BELOW
    assert parity["tokens_equal"] == parity["tokens_compared"] == 6


@pytest.mark.parametrize("name", ["t5", "t5_untied", "bart", "gpt2", "llama_scaled"])
def test_one_copy_of_the_weights_serves_all_graphs(exported, name):
    made = exported(name)
    wanted = 0
    with safe_open(made.source / "model.safetensors", "np") as file:
        wanted = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118  # not a dict
    tables = 2 * 2 * (257 + 129) * 4 + 128 * 8 * 4  # by distance; of rotary embeddings
    alignment = 64 * 60
    assert (made.folder / "weights.bin").stat().st_size <= wanted + tables + alignment
    assert {path.name for path in made.folder.iterdir()} >= {"weights.bin", "runtime.json", "config.json"}


def test_embedding_lies_in_the_file_once(exported):
    tied, untied = (
        {name: regions(exported(model).folder / f"{name}.onnx") for name in ("encoder", "decoder")}
        for model in ("t5", "t5_untied")
    )
    for graphs in (tied, untied):
        assert graphs["encoder"]["shared.weight"] == graphs["decoder"]["shared.weight"]
    assert tied["decoder"]["lm_head.weight"] == tied["decoder"]["shared.weight"]
    assert untied["decoder"]["lm_head.weight"] != untied["decoder"]["shared.weight"]


def test_manifest_names_its_parent_and_its_files(exported):
    made = exported("t5")
    assert made.manifest.stage == "onnx"
    assert made.manifest.parents[0]["path"] == str(made.source)
    assert artifacts.verify(made.folder) == []
    assert made.manifest.config["parity_tokens"] == MANY_WORDS


def save(model, folder):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def arguments(source, folder, **options):
    return ExportArguments(model_name_or_path=str(source), output_dir=str(folder), parity_tokens=8, **options)


def test_answers_end_at_every_token_that_any_file_names(tmp_path):
    model, tokenizer = tiny.llama(), tiny.tokenizer(eos_token="w40")
    model.generation_config.eos_token_id = [1, 41]
    model.config.eos_token_id = 42
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(ExportArguments(model_name_or_path=str(tmp_path / "model"), output_dir=tmp_path / "onnx"))
    loaded = load(tmp_path / "onnx", threads=1)
    assert loaded.spec.eos_token_ids == (40, 1, 41, 42)


def test_adapter_is_merged(exported, tmp_path):
    base = exported("t5").source
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(base), LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = save(model, tmp_path / "adapter")
    manifest = export(arguments(folder, tmp_path / "onnx"))
    with torch.inference_mode():
        wanted = model.eval()(input_ids=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[0, 9]])).logits
        plain = exported("t5").model(input_ids=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[0, 9]]))
    found = load(tmp_path / "onnx").logits([[5, 6, 7]], [[9]])[0]
    np.testing.assert_allclose(found, wanted[0].numpy(), atol=NEVER_BELOW)
    assert np.abs(found - plain.logits[0].numpy()).max() > 0.1
    assert [parent["path"] for parent in manifest.parents] == [folder, str(base)]


def test_classifier_adapter_is_merged(exported, tmp_path):
    base = exported("roberta").source
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False),
    )
    folder = save(model, tmp_path / "adapter")
    export(arguments(folder, tmp_path / "onnx"))
    with torch.inference_mode():
        wanted = model.eval()(torch.tensor([[5, 6, 7]])).logits.numpy()
    np.testing.assert_allclose(load(tmp_path / "onnx").logits([[5, 6, 7]]), wanted, atol=NEVER_BELOW)


def with_large_logits(model, factor=4):
    """A gated T5 whose float32 logits differ from float64's by far more than 1e-3, being of size 100."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= factor
    return model


def large(folder):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=1, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = with_large_logits(AutoModelForSeq2SeqLM.from_config(config))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(64, 64) * 40)
    return save(model, folder)


def test_the_limit_grows_with_the_logits(tmp_path):
    parity = export(arguments(large(tmp_path / "model"), tmp_path / "onnx")).metrics["parity"]
    assert parity["logit_scale"] > 10
    assert parity["max_logit_difference"] <= 1e-3 * parity["logit_scale"]


FAULTS = {
    "a layer's norm of another epsilon": lambda state: state | {NORM: state[NORM] * 1.02},
    "heads swapped": lambda state: state | {QUERY: np.roll(state[QUERY], 8, axis=0)},
    "a head of another scale": lambda state: state | {HEAD: state[HEAD] * 1.05},
}
NORM, QUERY, HEAD = (
    "decoder.block.0.layer.2.layer_norm.weight", "decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("size", ["small", "large"])
def test_a_fault_of_the_export_is_found_whatever_the_size_of_the_logits(exported, tmp_path, monkeypatch, size, fault):
    folder = large(tmp_path / "model") if size == "large" else exported("t5_untied").source
    state = Source.state
    monkeypatch.setattr(Source, "state", lambda self: FAULTS[fault](state(self)))
    with pytest.raises(CheckFailed, match=r"--parity_tolerance|greedy choices"):
        export(arguments(folder, tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


def test_another_answer_than_torch_s_fails_the_export(exported, tmp_path, monkeypatch):
    table = t5._bias_table
    monkeypatch.setattr(t5, "_bias_table", lambda *args, **options: table(*args, **options)[:, ::-1])
    with pytest.raises(CheckFailed, match="parity"):
        export(arguments(exported("t5").source, tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()


def test_unknown_architecture_lists_the_known_ones(tmp_path):
    OPTConfig(architectures=["OPTForCausalLM"]).save_pretrained(tmp_path / "opt")
    tiny.tokenizer().save_pretrained(tmp_path / "opt")
    with pytest.raises(InputError, match=r"type opt cannot be exported.*gpt2, llama.*t5.*roberta"):
        export(arguments(tmp_path / "opt", tmp_path / "onnx"))
    assert not (tmp_path / "onnx").exists()


def test_what_cannot_be_exported_is_refused_by_name(exported, tmp_path):
    made = exported("t5")
    odd = save(tiny.t5(d_kv=6), tmp_path / "odd")
    silly = save(tiny.llama(hidden_act="mish"), tmp_path / "mish")
    torch.manual_seed(0)
    prompt = get_peft_model(
        AutoModelForSeq2SeqLM.from_pretrained(made.source),
        PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=2, num_transformer_submodules=1),
    )
    virtual = save(prompt, tmp_path / "virtual")
    for source, message in (
        (odd, "multiple of 8"),
        (silly, "activation mish cannot be exported"),
        (virtual, "virtual tokens"),
        (str(made.folder), "is an ONNX folder already"),
        (str(tmp_path / "absent"), "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            export(arguments(source, tmp_path / "onnx"))
        assert not (tmp_path / "onnx").exists()
    with pytest.raises(InputError, match="holds a finished run"):
        export(arguments(made.source, made.folder))


def test_command_prints_the_proof(exported, tmp_path, monkeypatch, capsys):
    source = tmp_path / "model"
    shutil.copytree(exported("gpt2").source, source)
    command = ["to_onnx.py", "--model_name_or_path", str(source), "--output_dir", str(tmp_path / "onnx")]
    codes = []
    for argv in (command, command, [*command, "--overwrite_output_dir", "--parity_tokens", "4"], command[:3]):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(ROOT / "compress" / "to_onnx.py"), run_name="__main__")
        codes.append(left.value.code)
    assert codes == [0, 2, 0, 2]
    out, err = capsys.readouterr()
    assert out.count("greedy choices equal") == 2
    assert "holds a finished run" in err
    assert "output_dir: is missing" in err
