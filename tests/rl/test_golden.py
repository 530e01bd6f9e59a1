"""Our PPO against numbers recorded from TRL 0.11.4's; tests/golden.py says how near they must be."""

import zlib
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from golden import close, tensors
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, T5Config

from yunque.models.adapter import adapter_for, pad
from yunque.models.loading import keep_head_untied
from yunque.models.policy import Policy, Reference, token_scores
from yunque.rl.advantages import gae, token_rewards, whitened_gae
from yunque.rl.config import PPOConfig
from yunque.rl.kl import AdaptiveKLController, full_kl, kl_per_token
from yunque.rl.losses import policy_loss, value_loss
from yunque.rl.masked import masked_mean, masked_var, masked_whiten
from yunque.rl.trainer import PPOTrainer

ESTIMATORS = {"kl": "k1", "abs": "abs", "mse": "k2", "full": "full"}
"""TRL's name of each estimator, and ours."""

RUNS = {
    "causal-sgd": 0,
    "causal-adam": 1,
    "causal-sgd-accumulated": 2,
    "causal-sgd-full-kl": 3,
    "seq2seq-sgd-first-token-left-out": 4,
    "seq2seq-sgd": 5,
    "seq2seq-adam": 6,
}


pytestmark = pytest.mark.usefixtures("one_thread")

POLICY_LOSS, VALUE_LOSS = -0.036504030, 1.2849971
"""Ours of causal-sgd, where one of four minibatches is skipped; TRL reports -0.0135 and 0.9992."""

LEAKLESS_ADVANTAGES = [-0.9449, -1.2307, -1.6976]
"""Ours with whiten_rewards; TRL's are -0.9696, -1.2500, -1.7041."""

Tokenizer = namedtuple("Tokenizer", "pad_token_id eos_token_id model_max_length", defaults=(0, 1, 512))


# --- pieces ---


def test_tensor_operations(golden):
    ops = golden["tensor_ops"]
    x, mask = tensors(ops, "x", "mask")
    close(masked_mean(x, mask), ops["masked_mean"])
    close(torch.stack([masked_mean(*pair) for pair in zip(x, mask, strict=True)]), ops["masked_mean_axis1"])
    close(masked_var(x, mask), ops["masked_var_unbiased"])
    close(masked_var(x, mask, unbiased=False), ops["masked_var_biased"])
    close(masked_whiten(x, mask), ops["masked_whiten"])
    close(masked_whiten(x, mask, shift_mean=False), ops["masked_whiten_keep_mean"])
    close(masked_whiten(x, torch.ones_like(x)), ops["whiten"])
    close(masked_whiten(x, torch.ones_like(x), shift_mean=False), ops["whiten_keep_mean"])


def test_logprobs_and_entropy(golden):
    logits, labels = tensors(golden["tensor_ops"], "logits", "labels")
    scores = token_scores(logits, labels, temperature=1.0, keep_logits=False)
    close(scores.logprobs_BR, golden["tensor_ops"]["logprobs"])
    close(scores.entropy_BR, golden["tensor_ops"]["entropy"])


def kl_of(golden, kind):
    section = golden["kl_penalty"]
    if kind == "full":
        return full_kl(*tensors(section, "full_logprobs", "full_ref_logprobs"))
    return kl_per_token(ESTIMATORS[kind], *tensors(section, "logprobs", "ref_logprobs"))


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_kl_penalty(golden, kind):
    close(kl_of(golden, kind), golden["kl_penalty"]["out"][kind])


@pytest.mark.parametrize("index", range(5))
def test_compute_rewards(golden, index):
    section = golden["compute_rewards"]
    case = section["cases"][index]
    (scores, mask) = tensors(section, "scores", case["mask"])
    rewards, penalty = token_rewards(scores, kl_of(golden, case["kl_penalty"]), case["kl_coef"], mask)
    inside = mask.bool()  # TRL leaves the penalty of padding in place, ours is 0 there
    close(rewards[inside], torch.tensor(case["rewards"])[inside])
    close(penalty[inside], torch.tensor(case["non_score_reward"])[inside])
    assert not rewards[~inside].any()


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_compute_advantages(golden, index):
    case, values, rewards, mask = advantages_case(golden, index)
    inside, options = mask.bool(), {"gamma": case["gamma"], "lam": case["lam"]}
    advantages, returns = whitened_gae(values, rewards, mask, whiten_rewards=False, **options)
    close(advantages[inside], torch.tensor(case["advantages"])[inside])
    close(returns[inside], torch.tensor(case["returns"])[inside])
    plain, same_returns = gae(values, rewards, mask, **options)
    close(masked_whiten(plain, mask)[inside], advantages[inside])
    close(same_returns, returns)


def test_whitened_rewards_of_padding_do_not_leak_into_the_response(golden):
    # TRL whitens rewards of 0 in the padding to something else and lets GAE carry it back into the last real token;
    # ours masks the rewards again. Its numbers follow from gae with the padding left in.
    case, values, rewards, mask = advantages_case(golden, 3)
    inside, options = mask.bool(), {"gamma": case["gamma"], "lam": case["lam"]}
    assert case["whiten_rewards"]
    scaled = masked_whiten(rewards * mask, mask, shift_mean=False)
    leaking, leaking_returns = gae(values * mask, scaled, torch.ones_like(mask), **options)
    close(masked_whiten(leaking, mask)[inside], torch.tensor(case["advantages"])[inside])
    close(leaking_returns[inside], torch.tensor(case["returns"])[inside])
    advantages, returns = whitened_gae(values, rewards, mask, whiten_rewards=True, **options)
    for row in range(len(mask)):  # a row without its padding gives the same returns
        tokens = mask[row].nonzero().squeeze(1)
        alone = [tensor[row : row + 1, tokens] for tensor in (values, scaled, mask)]
        close(returns[row, tokens], gae(*alone, **options)[1][0])
    close(advantages[inside][:3], LEAKLESS_ADVANTAGES, atol=1e-4)


def advantages_case(golden, index):
    section = golden["compute_advantages"]
    case = section["cases"][index]
    return case, *tensors(section, "values", "rewards"), torch.tensor(golden["compute_rewards"][case["mask"]])


def losses_of(section, case):
    old, new, values, predicted, advantages, returns = tensors(
        section, "old_logprobs", "logprobs", "values", "vpreds", "advantages", "returns"
    )
    new.requires_grad_()
    predicted.requires_grad_()
    policy = policy_loss(new, old, advantages, case["cliprange"])
    value = value_loss(predicted, values, returns, case["cliprange_value"])
    return new, predicted, policy, value


@pytest.mark.parametrize("index", [0, 1])
def test_loss_and_its_gradients(golden, index):
    section = golden["loss"]
    case, mask = section["cases"][index], torch.tensor(section["mask"])
    new, predicted, policy, value = losses_of(section, case)
    policy_mean, value_mean = masked_mean(policy.per_token_BR, mask), masked_mean(value.per_token_BR, mask)
    (policy_mean + case["vf_coef"] * value_mean).backward()
    close(policy_mean, case["policy_loss_returned"])
    close(case["vf_coef"] * value_mean, case["value_loss_returned"])
    close(new.grad, case["grad_logprobs"])
    close(predicted.grad, case["grad_vpreds"])
    stats = case["stats"]
    close(value_mean, stats["loss/value"])
    close(masked_mean(policy.clipped_BR, mask), stats["policy/clipfrac"])
    close(masked_mean(value.clipped_BR, mask), stats["val/clipfrac"])


def test_ratio_guard_leaves_the_reported_loss_true(golden):
    # TRL multiplies the loss of a minibatch above the threshold by 0 and reports that 0; ours skips the optimizer
    # step (test_trainer.py) and reports the loss there was: that of the case with the default threshold
    section, mask = golden["loss"], torch.tensor(golden["loss"]["mask"])
    allowed, refused = section["cases"][0], section["cases"][2]
    new, _, policy, value = losses_of(section, refused)
    ratio = masked_mean((new - torch.tensor(section["old_logprobs"])).exp(), mask)
    assert ratio > refused["ratio_threshold"]
    assert refused["stats"]["loss/policy"] == refused["stats"]["loss/value"] == 0
    close(masked_mean(policy.per_token_BR, mask), allowed["stats"]["loss/policy"])
    close(masked_mean(value.per_token_BR, mask), allowed["stats"]["loss/value"])


def test_kl_controller(golden):
    section = golden["kl_controller"]
    controller = AdaptiveKLController(section["init"], section["target"], section["horizon"])
    for update in section["trace"]:
        controller.update(update["kl"], update["n_steps"])
        assert controller.value == pytest.approx(update["value_after"], rel=1e-10)


# --- whole steps ---


def fill_by_formula(policy):
    """Weights of the recorded models: a sine of position and of TRL's parameter name."""
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            phase = zlib.crc32((trl_name(name) + "policy").encode()) % 1000
            weights = torch.sin(0.37 * index + phase) * (0.3 if parameter.dim() > 1 else 0.1)
            if parameter.dim() == 1 and name.endswith("weight"):
                weights += 1
            parameter.copy_(weights.reshape(parameter.shape))


def trl_name(name):
    return "pretrained_model." + name.removeprefix("model.") if name.startswith("model.") else name


def recorded_trainer(section, run):
    if run["arch"] == "seq2seq":
        model = AutoModelForSeq2SeqLM.from_config(T5Config(**section["t5_config"]))
        # transformers 5 ties T5's head whatever the configuration says; the recorded model had a head of its own
        model.lm_head.weight = torch.nn.Parameter(model.shared.weight.clone())
        keep_head_untied(model)
    else:
        model = AutoModelForCausalLM.from_config(GPT2Config(**section["gpt2_config"]))
    policy = Policy(model, adapter_for(model, Tokenizer()))
    fill_by_formula(policy)
    reference = Reference(policy)
    with reference.model() as copy, torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(0.9)
    options = dict(run["options"])
    options["kl_estimator"] = ESTIMATORS[options.pop("kl_penalty", "kl")]
    options |= {"loss_normalization": "minibatches", "group_by_length": False}
    config = PPOConfig(batch_size=4, learning_rate=run["lr"], **options)
    optimizer = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[run["optimizer"]](policy.parameters(), lr=run["lr"])
    trainer = PPOTrainer(
        config, policy, reference, Accelerator(cpu=True), seed=0, total_steps=len(run["steps"]), optimizer=optimizer
    )
    permutations = iter(run["permutations"])
    trainer._permutation = lambda size, epoch: np.array(next(permutations))
    return trainer


def leave_out_first_token(monkeypatch, trainer):
    """TRL's own mask for encoder-decoder models: the first generated token earns and learns nothing."""
    scoring_batch = trainer.adapter.scoring_batch

    def without_first(mask_BR):
        return mask_BR & (torch.arange(mask_BR.shape[1]) > 0)

    def padded(*args, **options):
        rows_BR, mask_BR = pad(*args, **options)
        return rows_BR, without_first(mask_BR)

    def batch_of(*args):
        batch = scoring_batch(*args)
        return replace(batch, mask_BR=without_first(batch.mask_BR))

    monkeypatch.setattr("yunque.rl.trainer.pad", padded)  # the trainer pads for the mask alone
    monkeypatch.setattr(trainer.adapter, "scoring_batch", batch_of)


class Replay:
    """One recorded run done by ours: statistics and rollouts of every step, minibatch means, and the end."""

    def __init__(self, section, run, monkeypatch):
        self.trainer = recorded_trainer(section, run)
        if run["first_generated_token"] != "kept":
            leave_out_first_token(monkeypatch, self.trainer)
        skip = 1 if run["arch"] == "seq2seq" else 0  # TRL's responses begin with the decoder's start token
        responses = [response[skip:] for response in run["responses"]]
        self.statistics, self.rollouts, self.minibatches, self.kl_coefs = [], [], [], []
        self._spy("_score", self.rollouts.append)
        self._spy("_accumulate", self.minibatches.extend)
        for _ in run["steps"]:
            self.statistics.append(self.trainer.step(section["queries"], responses, section["scores"]))
            self.kl_coefs.append(self.trainer.kl_controller.value)

    def _spy(self, name, note):
        method = getattr(self.trainer, name)

        def noting(*args):
            result = method(*args)
            note(result)
            return result

        setattr(self.trainer, name, noting)


@pytest.fixture
def replay(golden, monkeypatch):
    def do(name):
        run = golden["step"]["runs"][RUNS[name]]
        return run, Replay(golden["step"], run, monkeypatch)

    return do


@pytest.mark.parametrize("name", RUNS)
def test_step_reports_the_same_scalars(replay, name):
    run, ours = replay(name)
    different = set()
    if name == "causal-sgd":  # its last minibatch is above ratio_threshold: next test
        different |= {"ppo/loss/policy", "ppo/loss/value", "ppo/loss/total"}
    if run["arch"] == "seq2seq":  # TRL counts the start token
        different |= {"tokens/responses_len_mean"}
    for statistics, recorded in zip(ours.statistics, run["steps"], strict=True):
        scalars = recorded["scalars"]
        assert scalars.keys() <= statistics.keys()
        for key in scalars.keys() - different:
            # sums over tokens of advantages and of differences of log-probabilities cancel to about 0.01 of their terms
            assert statistics[key] == pytest.approx(scalars[key], rel=1e-5, abs=1e-5), key
        if run["arch"] == "seq2seq":
            assert statistics["tokens/responses_len_mean"] == 4.75
            assert scalars["tokens/responses_len_mean"] == 5.75


def test_step_reports_the_loss_of_a_skipped_minibatch_where_trl_reports_0(replay):
    run, ours = replay("causal-sgd")
    means, recorded = torch.stack(ours.minibatches), run["steps"][0]["scalars"]
    ran_away = means[:, 6] > ours.trainer.config.ratio_threshold
    assert ran_away.tolist().count(True) == ours.statistics[0]["ppo/skipped_updates"] == 1
    for column, name in enumerate(["ppo/loss/policy", "ppo/loss/value"]):
        close(means[:, column].masked_fill(ran_away, 0).mean(), recorded[name])
        assert ours.statistics[0][name] == pytest.approx(means[:, column].mean().item())
    assert ours.statistics[0]["ppo/loss/policy"] == pytest.approx(POLICY_LOSS, rel=1e-5)
    assert ours.statistics[0]["ppo/loss/value"] == pytest.approx(VALUE_LOSS, rel=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_step_scores_the_same_tokens_alike(replay, name):
    run, ours = replay(name)
    recorded_mask = torch.tensor(run["mask"]).bool()
    for rollout, recorded in zip(ours.rollouts, run["steps"], strict=True):
        # TRL's slots count from the first token of the padded model input, ours from the response: the masked tokens
        # of a row come in the same order
        assert rollout.mask_BR.sum(dim=1).tolist() == recorded_mask.sum(dim=1).tolist()
        for tensor_BR, key in ((rollout.logprobs_BR, "logprobs"), (rollout.ref_logprobs_BR, "ref_logprobs")):
            close(tensor_BR[rollout.mask_BR], torch.tensor(recorded[key])[recorded_mask], atol=1e-5)
        kl_B = (rollout.kl_BR * rollout.mask_BR).sum(dim=1)
        close(kl_B, recorded["kl_dist"], atol=1e-5)  # differences of log-probabilities around 5
    close(ours.rollouts[0].values_BR[ours.rollouts[0].mask_BR], torch.tensor(run["values_before"])[recorded_mask])


@pytest.mark.parametrize("name", RUNS)
def test_step_moves_the_kl_coefficient_alike(replay, name):
    run, ours = replay(name)
    for coef, recorded in zip(ours.kl_coefs, run["steps"], strict=True):
        assert coef == pytest.approx(recorded["kl_coef_after"], rel=1e-7)  # 8 digits are recorded


@pytest.mark.parametrize("name", RUNS)
def test_step_moves_the_weights_alike(replay, name):
    run, ours = replay(name)
    updates = len(ours.minibatches)
    for parameter_name, parameter in ours.trainer.policy.named_parameters():
        p = parameter.detach()
        sums = torch.stack([p.sum(), p.abs().sum(), p.square().sum()])
        # sums of up to 1,000 float32 weights that cancel
        tolerance = 1e-6 * max(1.0, float(sums[1]))
        if run["optimizer"] == "adam":
            tolerance += 0.2 * run["lr"]  # Adam divides a gradient by its own size, so that rounding near 0 shows
            if "attn.c_attn.bias" in parameter_name:
                # the key bias cannot change the attention (next test): its gradient is rounding noise, which Adam
                # turns into steps of +-lr. Those 16 entries alone may differ, by 2 lr an update
                tolerance += 2 * run["lr"] * updates * 16
        close(sums, run["params_after_sum_abs_sq"][trl_name(parameter_name)], atol=tolerance)


def test_the_key_bias_of_gpt2_changes_nothing(golden):
    section = golden["step"]
    trainer = recorded_trainer(section, section["runs"][RUNS["causal-adam"]])
    batch = trainer.adapter.scoring_batch(section["queries"], section["runs"][0]["responses"], torch.device("cpu"))
    policy = trainer.accelerator.unwrap_model(trainer.policy).eval()
    before = policy(batch).logprobs_BR
    with torch.no_grad():
        for block in policy.model.transformer.h:
            block.attn.c_attn.bias[16:32] += 0.5  # query, key and value of 16 each
    close(policy(batch).logprobs_BR, before, atol=1e-4)
