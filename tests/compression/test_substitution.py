"""Layers in a scheme's numbers, and back."""

import numpy as np
import pytest
import tiny
import torch

from yunque.compression.schemes import LayerScheme
from yunque.compression.substitution import Target, int8_blocks, quantized, uint8_inputs
from yunque.export.dequantized import quantize_dequantize, quantized_inputs

IDS = torch.tensor([[5, 6, 7, 1], [9, 10, 11, 12]])
QKV = tuple(f"decoder.block.0.layer.0.SelfAttention.{part}" for part in "qkv")


def rounding(name, weight, scheme):
    return quantize_dequantize(weight, scheme)


def logits(model):
    encoded = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **encoded).logits


def test_fused_weights_are_rounded_as_one_and_given_back():
    model = tiny.t5()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = logits(model)
    target = Target("qkv", tuple(f"{name}.weight" for name in QKV), QKV)
    scheme = LayerScheme("int4", 16)
    together = np.concatenate([before[f"{name}.weight"].numpy() for name in QKV], axis=0).T
    wanted = quantize_dequantize(together, scheme).T

    def stopped_midway():
        with quantized(model, {target: scheme}, rounding):
            found = np.concatenate([model.get_parameter(f"{name}.weight").detach().numpy() for name in QKV], axis=0)
            np.testing.assert_array_equal(found, wanted)
            assert not torch.allclose(logits(model), whole)
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        stopped_midway()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model), whole), "no hook is left"


def test_conv1d_weights_lie_the_other_way():
    model = tiny.gpt2()
    name = "transformer.h.0.attn.c_proj"  # square: only its class says which way it lies
    before = model.get_parameter(f"{name}.weight").detach().clone().numpy()
    scheme = LayerScheme("int8_dynamic")
    with quantized(model, {Target("o", (f"{name}.weight",), (name,)): scheme}, rounding):
        found = model.get_parameter(f"{name}.weight").detach().numpy()
        np.testing.assert_array_equal(found, quantize_dequantize(before, scheme))
        assert not np.array_equal(found, quantize_dequantize(before.T, scheme).T)


def test_float32_changes_nothing():
    model = tiny.t5()
    whole = logits(model)
    target = Target("qkv", tuple(f"{name}.weight" for name in QKV), QKV)
    with quantized(model, {target: LayerScheme()}, rounding):
        assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("kind", ["int8_dynamic", "int8_static", "int8_weights", "int4", "nf4"])
def test_inputs_are_rounded_as_by_the_kernels(kind):
    """The hook and the exporter's own arithmetic agree, of which the exporter's tests show that kernels do it."""
    scheme = LayerScheme(kind, input_range=(-1.5, 2.0) if kind == "int8_static" else None)
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    wanted = quantized_inputs(x.numpy(), scheme)
    seen = []
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(40, 8)})
    target = Target("layer", ("layer.weight",), ("layer",))
    with quantized(model, {target: scheme}, rounding):
        model["layer"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model["layer"](x)
    np.testing.assert_allclose(seen[0].numpy(), wanted, atol=1e-5)
    assert np.array_equal(wanted, x.numpy()) == (kind == "nf4")


def test_a_row_has_a_scale_of_its_own_and_zeros_stay():
    x = torch.tensor([[[1.0, 0.5], [100.0, 7.3]], [[-1.0, 0.25], [3.0, 50.0]]])  # [rows, positions, features]
    rounded = int8_blocks(x, 2)
    torch.testing.assert_close(rounded[:, :1], int8_blocks(x[:, :1], 2))
    assert ((rounded - x).abs().amax(dim=-1) <= x.abs().amax(dim=-1) / 254 + 1e-6).all()
    assert torch.equal(int8_blocks(torch.zeros(2, 3), 16), torch.zeros(2, 3))
    assert torch.equal(uint8_inputs(torch.zeros(2, 3), 0.0, 0.0), torch.zeros(2, 3))
