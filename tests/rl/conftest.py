import pytest
import tiny
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from yunque.models.adapter import adapter_for
from yunque.models.policy import Policy, Reference
from yunque.rl.config import PPOConfig
from yunque.rl.trainer import PPOTrainer


def _model(family, *, lora=False, dropout=0.0, lora_modules=None, **options):
    model = tiny.FAMILIES[family](**options)
    if lora:
        torch.manual_seed(0)
        task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
        model = get_peft_model(
            model, LoraConfig(r=4, task_type=task, lora_dropout=dropout, target_modules=lora_modules)
        )
    return model


def _move_adapter(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def _trainer(
    family,
    *,
    lora=False,
    lora_modules=None,
    trained_adapter=False,
    dropout=0.0,
    optimizer=None,
    total_steps=10,
    temperature=1.0,
    **config,
):
    model = _model(family, lora=lora or trained_adapter, dropout=dropout, lora_modules=lora_modules)
    if trained_adapter:
        _move_adapter(model)  # as if a fine-tuning run had trained it
    torch.manual_seed(0)  # the value head's weights
    settings = PPOConfig(**({"batch_size": 4, "mini_batch_size": 2, "learning_rate": 1e-2} | config))
    adapter = adapter_for(model, tiny.tokenizer())
    policy = Policy(model, adapter, value_head=settings.advantage_estimator == "gae")
    reference = Reference(policy, adapter_is_trained=trained_adapter)
    if optimizer is not None:
        optimizer = optimizer([p for p in policy.parameters() if p.requires_grad], lr=settings.learning_rate)
    return PPOTrainer(
        settings,
        policy,
        reference,
        Accelerator(cpu=True),
        seed=0,
        total_steps=total_steps,
        temperature=temperature,
        optimizer=optimizer,
    )


@pytest.fixture
def model_of():
    """Builds a tiny model of a family: model_of(family, lora=, **config options)."""
    return _model


@pytest.fixture
def trainer_of():
    """Builds a trainer of a tiny model: trainer_of(family, lora=, optimizer=, **PPOConfig options)."""
    return _trainer


@pytest.fixture
def weights_of():
    """Copies a trainer's weights: weights_of(trainer) -> name: tensor."""

    def copy(trainer):
        policy = trainer.accelerator.unwrap_model(trainer.policy)
        return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}

    return copy
