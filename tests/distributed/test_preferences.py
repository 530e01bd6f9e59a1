"""The trainer of pairs beside TRL's DPOTrainer and ORPOTrainer, its references, and its sums over batches."""

import warnings
from collections import defaultdict

import datasets
import pairs
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import TrainingArguments

from yunque.distributed.preferences import PreferenceTrainer
from yunque.models.adapter import adapter_for
from yunque.models.preference_arguments import PairArguments
from yunque.models.preference_losses import DPO, ORPO
from yunque.models.preference_pairs import encode_pairs

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32 sums in another order
TRL_OPTIONS = {"use_cpu": True, "report_to": [], "max_length": 60, "beta": 0.1, "bf16": False}
MEANS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


def perturbed(model, std=0.05, only=""):
    """Move the policy away from its start, the same for the same weights."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and only in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * std)
    return model


@pytest.fixture
def trainer_of(tmp_path):
    def build(model, objective, rows, tokenizer=None, **options):
        tokenizer = tokenizer or tiny.tokenizer()
        adapter = adapter_for(model, tokenizer)
        encoded, _ = encode_pairs(
            datasets.Dataset.from_list(rows), tokenizer, adapter, PairArguments(max_completion_length=40)
        )
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "ours"), use_cpu=True, report_to=[], remove_unused_columns=False, **options
        )
        return PreferenceTrainer(
            model, arguments, adapter=adapter, objective=objective, train_dataset=encoded, tokenizer=tokenizer
        )

    return build


def step(trainer, batches=None):
    """Loss of one optimizer step and the gradients it leaves."""
    batches = [list(trainer.train_dataset)] if batches is None else batches
    samples, counts = trainer.get_batch_samples(
        iter([trainer.data_collator(rows) for rows in batches]), len(batches), "cpu"
    )
    loss = sum(backward(trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts)) for batch in samples)
    return loss, gradients(trainer.model)


def backward(loss):
    loss.backward()
    return loss.detach()


def gradients(model):
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def logged(trainer):
    logs = {"loss": 0.0}
    trainer.log(logs)
    return logs


def assert_same_gradients(ours, theirs):
    assert ours.keys() <= theirs.keys()
    assert len(ours) > 10
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=2e-5, atol=1e-5)


# --- beside TRL ---


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "hinge"}, {"loss_type": "ipo"}, {"sft_weight": 0.5}])
def test_dpo_is_trl_s(family, options, trainer_of, tmp_path):
    from trl import DPOConfig, DPOTrainer

    rows, tokenizer = pairs.pairs(4), tiny.tokenizer()
    ours = trainer_of(tiny.FAMILIES[family](), DPO(beta=0.1, **options), rows)
    ours.keep_reference(adapter_is_trained=False)
    perturbed(ours.model)
    loss, found = step(ours)

    kinds = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]} if "sft_weight" in options else options
    tiny.FAMILIES[family]().save_pretrained(tmp_path / "start")
    start = tiny.FAMILIES[family]()
    policy = perturbed(tiny.FAMILIES[family]())
    for model in (start, policy):
        model.config._name_or_path = str(tmp_path / "start")
    theirs = DPOTrainer(
        model=policy,
        ref_model=start,
        args=DPOConfig(output_dir=str(tmp_path / "trl"), **TRL_OPTIONS | kinds),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = theirs.data_collator([theirs.train_dataset[number] for number in range(4)])
    theirs.model.train()
    their_loss = theirs.compute_loss(theirs.model, batch)
    their_loss.backward()

    torch.testing.assert_close(loss, their_loss.detach(), **CLOSE)
    assert_same_gradients(found, gradients(theirs.model))
    line = logged(ours)
    for name in MEANS:
        assert line[name] == pytest.approx(theirs._metrics["train"][name][0], rel=1e-4), name


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_orpo_is_trl_s(family, trainer_of, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    tokenizer = tiny.tokenizer(bos_token="w3")
    # TRL's decoder-only NLL covers the prompt too; of a prompt that is the first token there is nothing to predict
    rows = [row | ({"prompt": "w3"} if family == "llama" else {}) for row in pairs.pairs(4)]
    if family == "t5":  # as T5's own tokenizer
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    ours = trainer_of(tiny.FAMILIES[family](), ORPO(beta=0.1), rows, tokenizer)
    loss, found = step(ours)

    options = TRL_OPTIONS | ({"is_encoder_decoder": True, "max_completion_length": 40} if family == "t5" else {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ORPOTrainer(
            model=tiny.FAMILIES[family](),
            args=ORPOConfig(output_dir=str(tmp_path / "trl"), remove_unused_columns=False, **options),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    batch = theirs.data_collator([theirs.train_dataset[number] for number in range(4)])
    their_loss, metrics = theirs.get_batch_loss_metrics(theirs.model, batch)
    their_loss.backward()

    torch.testing.assert_close(loss, their_loss.detach(), **CLOSE)
    assert_same_gradients(found, gradients(theirs.model))
    line = logged(ours)
    for name in MEANS[:4]:  # their log-probabilities are per token
        assert line[name] == pytest.approx(metrics[name], rel=1e-4), name


# --- references ---


def lora(family):
    torch.manual_seed(0)
    targets = {"t5": ["q", "v"], "llama": ["q_proj", "v_proj"]}[family]
    return get_peft_model(
        tiny.FAMILIES[family](),
        LoraConfig(r=4, target_modules=targets, task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"),
    )


@pytest.mark.parametrize("start", ["full", "new adapter", "trained adapter"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_reference_is_the_start_model(family, start, trainer_of):
    model = tiny.FAMILIES[family]() if start == "full" else lora(family)
    if start == "trained adapter":
        perturbed(model, std=0.3)
    trainer = trainer_of(model, DPO(beta=0.1), pairs.pairs(4))
    before = torch.from_numpy(trainer.log_probabilities(trainer.train_dataset))
    trainer.keep_reference(adapter_is_trained=start == "trained adapter")
    perturbed(trainer.model, std=0.3, only="" if start == "full" else ".default.")
    after = torch.from_numpy(trainer.log_probabilities(trainer.train_dataset))
    assert (before - after).abs().min() > 1e-3
    step(trainer)
    line = logged(trainer)
    rewards = 0.1 * (after - before).mean(dim=0)
    assert [line["rewards/chosen"], line["rewards/rejected"]] == pytest.approx(rewards.tolist(), rel=1e-3)
    assert [line["logps/chosen"], line["logps/rejected"]] == pytest.approx(after.mean(dim=0).tolist(), rel=1e-4)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_precomputed_reference_gives_the_same_step(family, trainer_of, tmp_path):
    trainers = [trainer_of(tiny.FAMILIES[family](), DPO(beta=0.1), pairs.pairs(6)) for _ in range(3)]
    trainers[0].keep_reference(adapter_is_trained=False)
    trainers[1].precompute_reference(tmp_path / "cache.npy")
    perturbed(trainers[2].model, std=0.3)
    trainers[2].precompute_reference(tmp_path / "cache.npy")  # read, or the start would be the perturbed model
    for trainer in trainers[:2]:
        perturbed(trainer.model, std=0.3)
    results = [step(trainer) for trainer in trainers]
    for loss, found in results[1:]:
        torch.testing.assert_close(loss, results[0][0], **CLOSE)
        assert_same_gradients(found, results[0][1])


def test_a_cache_of_other_rows_is_passed_over(trainer_of, tmp_path):
    for rows in (4, 6):
        trainer = trainer_of(tiny.t5(), DPO(beta=0.1), pairs.pairs(rows))
        trainer.precompute_reference(tmp_path / "cache.npy")
        assert len(trainer.collator.reference) == rows


# --- sums over batches ---


@pytest.mark.parametrize("objective", [DPO(beta=0.1, sft_weight=0.5), ORPO(beta=0.1)], ids=["dpo", "orpo"])
def test_uneven_batches_of_one_step_count_every_pair_and_token_once(objective, trainer_of):
    results = []
    for cuts in ([7], [4, 2, 1]):
        trainer = trainer_of(tiny.t5(), objective, pairs.pairs(7))
        trainer.keep_reference(adapter_is_trained=False)
        perturbed(trainer.model)
        rows = iter(list(trainer.train_dataset))
        results.append(step(trainer, [[next(rows) for _ in range(size)] for size in cuts]))
    torch.testing.assert_close(results[1][0], results[0][0], **CLOSE)
    assert_same_gradients(results[1][1], results[0][1])


def test_dropout_is_off_unless_kept(trainer_of):
    model = trainer_of(tiny.t5(dropout_rate=0.5), DPO(beta=0.1), pairs.pairs(4)).model.train()
    assert {layer.p for layer in model.modules() if isinstance(layer, torch.nn.Dropout)} == {0.0}


def test_batches_group_similar_lengths(trainer_of):
    trainer = trainer_of(tiny.t5(), DPO(beta=0.1), pairs.pairs(40), per_device_train_batch_size=4)
    trainer.group_by_length = True
    lengths = defaultdict(list)
    for place, row in enumerate(trainer._get_train_sampler()):
        pair = trainer.train_dataset[row]
        lengths[place // 4].append(len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])))
    assert sum(max(part) - min(part) for part in lengths.values()) <= 20  # 2 a batch; in random order about 6
