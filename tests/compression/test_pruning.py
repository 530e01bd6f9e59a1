"""Pruned models against masked ones, importance against its formulas, masks against their patterns."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from yunque.compression.arguments import PruningArguments
from yunque.compression.calibration import calibration_batches
from yunque.compression.distillation import labelled_row
from yunque.compression.importance import layer_importance, unit_importance
from yunque.compression.pruning import prune
from yunque.compression.units import parts_of, unit_slices
from yunque.errors import InputError
from yunque.models.adapter import adapter_for

IDS = torch.tensor([[5, 6, 7, 1], [9, 10, 11, 12]])
FAMILIES = list(tiny.FAMILIES)


def grouped_llama():
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=4, head_dim=4,
        intermediate_size=32, pad_token_id=0, eos_token_id=1, attention_bias=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


MODELS = {
    "t5": lambda: tiny.t5(num_heads=4, num_layers=3, is_gated_act=True, dense_act_fn="gelu_new"),
    "t5-relu": lambda: tiny.t5(num_heads=4),
    "llama": grouped_llama,
    "gpt2": tiny.gpt2,
    "bart": tiny.bart,
}
WITH_HEADS = ["t5", "t5-relu", "llama"]


def logits(model):
    encoded = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **encoded).logits


def batches_for(model):
    adapter = adapter_for(model, tiny.tokenizer())
    rows = [labelled_row(adapter, [5 + row, 6, 7], [20 + row, 21, 1]) for row in range(6)]
    return calibration_batches(rows, tiny.tokenizer(), model, 2)


def none():
    return []


@pytest.mark.parametrize(("name", "kind"), [(n, "ffn") for n in MODELS] + [(n, "heads") for n in WITH_HEADS])
def test_cutting_units_is_zeroing_them(name, kind, tmp_path):
    """What is left computes what the whole model computes when the cut units contribute nothing."""
    model = MODELS[name]()
    parts = parts_of(model, kind)
    importance = unit_importance(model, parts, "magnitude", none)
    count = parts[0].count // 2
    whole = logits(model)
    for part in parts:
        gone = importance[part.together].argsort(descending=True, stable=True)[count:]
        *_, (reader, units) = unit_slices(part)  # the last: whatever the unit makes is read as nothing
        with torch.no_grad():
            reader.masked_fill_(torch.isin(units, gone), 0.0)
    wanted = logits(model)
    assert not torch.allclose(wanted, whole)

    fresh = MODELS[name]()
    option = {"heads": {"head_sparsity": 0.5}, "ffn": {"ffn_sparsity": 0.5}}[kind]
    pruned = prune(fresh, PruningArguments(importance="magnitude", ffn_multiple_of=1, **option), none)
    torch.testing.assert_close(logits(pruned.model), wanted)
    assert pruned.report["parameters"] < pruned.report["parameters_before"]

    pruned.model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if pruned.model.config.is_encoder_decoder else AutoModelForCausalLM
    again, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    torch.testing.assert_close(logits(again), wanted)
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(IDS, **options), again.generate(IDS, **options, use_cache=False))


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2"])
def test_taylor_is_the_first_order_change_of_the_loss(name):
    model = MODELS[name]()
    parts = parts_of(model, "ffn")
    batches = batches_for(model)
    scores = unit_importance(model, parts, "taylor", batches)
    part, unit, step = parts[0], 3, 1e-3
    changes = []
    for batch in batches():
        before = model(**batch).loss.item()
        saved = [weight.detach().clone() for weight, _ in unit_slices(part)]
        with torch.no_grad():
            for weight, units in unit_slices(part):
                weight.mul_(torch.where(units == unit, 1 - step, 1.0))
        changes.append(abs(model(**batch).loss.item() - before) / step)
        with torch.no_grad():
            for (weight, _), old in zip(unit_slices(part), saved, strict=True):
                weight.copy_(old)
    assert scores[part.together][unit].item() == pytest.approx(sum(changes) / len(changes), rel=0.1, abs=2e-3)


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bart"])
def test_activation_finds_the_unit_that_does_nothing(name):
    model = MODELS[name]()
    parts = parts_of(model, "ffn")
    for number, part in enumerate(parts):
        for weight, units in list(unit_slices(part))[:-1]:
            with torch.no_grad():
                weight.masked_fill_(units == number, 0.0)  # its input to the reader is always act(0) = 0
    scores = unit_importance(model, parts, "activation", batches_for(model))
    for number, part in enumerate(parts):
        assert scores[part.together].argmin() == number
        assert scores[part.together][number] == 0


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2", "bart"])
def test_the_layer_that_does_nothing_goes_first(name):
    model = MODELS[name]()
    path = {"t5": "encoder.block", "llama": "model.layers", "gpt2": "transformer.h", "bart": "model.encoder.layers"}[
        name
    ]
    layers = model.get_submodule(path)
    idle = layers[1]
    if name != "bart":  # post-norm: its output is never its input
        for weight_name, weight in idle.named_parameters():
            if (
                weight_name.endswith(("o.weight", "wo.weight", "o_proj.weight", "down_proj.weight"))
                or "c_proj" in weight_name
            ):
                torch.nn.init.zeros_(weight)
            if weight_name.endswith("o_proj.bias"):
                torch.nn.init.zeros_(weight)
        scores = layer_importance(model, {path: layers}, batches_for(model))[path]
        assert scores.argmin() == 1
        assert scores[1] == pytest.approx(0, abs=1e-5)
    pruned = prune(model, PruningArguments(drop_layers=1), batches_for(model))
    if name != "bart":
        assert 1 not in pruned.report["layers"][path]
    assert len(pruned.model.get_submodule(path)) == len(layers) - 1
    logits(pruned.model)


def test_iterations_reach_the_same_size():
    sizes = []
    for rounds in (1, 3):
        model = MODELS["llama"]()
        args = PruningArguments(ffn_sparsity=0.5, head_sparsity=0.5, prune_iterations=rounds, ffn_multiple_of=4)
        report = prune(model, args, batches_for(model)).report
        sizes.append((report["ffn"], report["heads"], report["parameters"]))
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == {"before": 32, "after": 16}
    assert sizes[0][1] == {"before": 4, "after": 2}


@pytest.mark.parametrize("name", ["t5", "gpt2"])
@pytest.mark.parametrize("importance", ["magnitude", "activation"])
def test_masks_zero_the_stated_share_of_every_row(name, importance):
    model = MODELS[name]()
    shape = {path: weight.shape for path, weight in model.named_parameters()}
    prune(model, PruningArguments(weight_sparsity=0.25, importance=importance), batches_for(model))
    weight = (
        model.transformer.h[0].mlp.c_fc.weight.T
        if name == "gpt2"
        else model.encoder.block[0].layer[0].SelfAttention.q.weight
    )
    assert torch.equal((weight == 0).sum(dim=1), torch.full((weight.shape[0],), weight.shape[1] // 4))
    assert {path: weight.shape for path, weight in model.named_parameters()} == shape
    assert not (model.get_output_embeddings().weight == 0).any()


def test_two_of_four_keeps_the_larger_two():
    model = MODELS["t5"]()
    before = model.encoder.block[0].layer[0].SelfAttention.q.weight.detach().clone()
    prune(model, PruningArguments(semi_structured=True, importance="magnitude"), none)
    after = model.encoder.block[0].layer[0].SelfAttention.q.weight.detach()
    groups, kept = before.reshape(-1, 4), after.reshape(-1, 4) != 0
    assert (kept.sum(dim=1) == 2).all()
    assert (
        groups.abs()[kept].reshape(-1, 2).min(dim=1).values >= groups.abs()[~kept].reshape(-1, 2).max(dim=1).values
    ).all()


def test_wanda_weighs_weights_by_their_inputs():
    """A weight on a silent input goes before a smaller one on a loud input (Sun et al. 2024, figure 1)."""
    model = MODELS["llama"]()
    layer = model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        for maker in (model.model.layers[0].mlp.gate_proj, model.model.layers[0].mlp.up_proj):
            maker.weight[:8] = 0  # the first 8 inputs of the reader are silent
        layer.weight[:, :8] = 10.0
    prune(model, PruningArguments(weight_sparsity=0.25, importance="activation"), batches_for(model))
    assert (layer.weight[:, :8] == 0).all()
    assert (layer.weight[:, 8:] != 0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gpt2", {"head_sparsity": 0.5}, "head_sparsity: transformers takes the head size of gpt2 from its width"),
        ("gpt2", {"drop_layers": 2}, "drop_layers: transformer.h has 2 layers; drop fewer"),
        ("llama", {"ffn_sparsity": 0.01}, "nothing was pruned"),
    ],
)
def test_what_cannot_be_pruned_is_refused(name, options, message):
    model = MODELS[name]()
    with pytest.raises(InputError, match=message):
        prune(model, PruningArguments(importance="magnitude", **options), batches_for(model))


def test_an_unknown_architecture_is_named():
    with pytest.raises(InputError, match="roberta cannot be pruned here; known are bart, gpt2, llama"):
        parts_of(tiny.roberta(), "ffn")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "nothing to prune"),
        ({"ffn_sparsity": 1.0}, "ffn_sparsity: 1.0 is not a share"),
        ({"drop_layers": -1}, "drop_layers: -1"),
        ({"semi_structured": True, "weight_sparsity": 0.5, "importance": "magnitude"}, "leave weight_sparsity out"),
        ({"weight_sparsity": 0.5}, "importance: masks go by magnitude or activation"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PruningArguments(**options)
