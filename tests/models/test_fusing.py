import pytest
import tiny
import torch
from transformers.activations import NewGELUActivation
from transformers.models.t5.modeling_t5 import T5LayerNorm

from yunque.models.fusing import fuse_layers

MODELS = {
    "t5": lambda: tiny.t5(feed_forward_proj="gated-gelu", is_gated_act=True, dense_act_fn="gelu_new"),
    "gpt2": tiny.gpt2,
}


def forward(model):
    ids = torch.tensor([[3, 4, 5, 6]])
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **extra).logits
    logits.square().sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def slow_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, (NewGELUActivation, T5LayerNorm))]


@pytest.mark.parametrize("family", MODELS)
def test_the_same_function_and_gradient_with_the_same_weights(family):
    model, fused = MODELS[family](), MODELS[family]()
    assert slow_layers(fused)
    fuse_layers(fused)
    assert not slow_layers(fused)
    assert model.state_dict().keys() == fused.state_dict().keys()
    (logits, gradients), (ours, our_gradients) = forward(model), forward(fused)
    torch.testing.assert_close(ours, logits, rtol=1e-5, atol=1e-6)
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest.item(), msg=name)


def test_norms_in_half_precision_keep_their_own_rounding():
    model = tiny.t5().bfloat16()
    fuse_layers(model)
    assert all(isinstance(layer, T5LayerNorm) for layer in slow_layers(model))
    assert slow_layers(model)
