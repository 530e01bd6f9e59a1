import warnings
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from yunque.compat.trl011 import PPOConfig, PPOTrainer, create_reference_model
from yunque.compat.trl011.core import LengthSampler
from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.policy import Policy, Reference
from yunque.rl.config import PPOConfig as EngineConfig
from yunque.rl.trainer import NonFiniteError
from yunque.rl.trainer import PPOTrainer as EngineTrainer

START = {"t5": 0, "bart": 1}
"""The decoder's start token; BART's is its end token."""


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(ours, theirs):
    return all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


# --- one engine ---


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2", "llama"])
@pytest.mark.parametrize("lora", [None, "fresh", "trained"])
def test_a_step_is_the_engine_s(wrap, trainer_of, batch_of, family, lora):
    queries, responses, scores = batch_of(start=[START[family]] if family in START else [])
    ours = wrap(family, lora=lora)
    twin = wrap(family, lora=lora)
    stats = trainer_of(ours).step(queries, responses, scores)

    policy = Policy(twin.pretrained_model, adapter_for(twin.pretrained_model, tiny.tokenizer()))
    policy.v_head.summary.load_state_dict(twin.v_head.summary.state_dict())
    engine = EngineTrainer(
        EngineConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-2, ppo_epochs=2),
        policy,
        Reference(policy, adapter_is_trained=lora == "trained"),
        Accelerator(),
        seed=0,
        total_steps=1,
    )
    drop = 1 if family in START else 0
    theirs = engine.step(
        [row.tolist() for row in queries],
        [row.tolist()[drop:] for row in responses],
        [score.item() for score in scores],
    )
    for name, number in theirs.items():
        if not name.startswith("time/") and name != "ppo/policy/ratio":
            assert stats[name] == pytest.approx(number, rel=1e-5, abs=1e-6), name
    moved = dict(policy.model.named_parameters())
    for name, weight in ours.pretrained_model.named_parameters():
        torch.testing.assert_close(weight, moved[name], rtol=1e-5, atol=1e-6)


def test_statistics_hold_what_trl_s_hold(wrap, trainer_of, batch_of):
    queries, responses, scores = batch_of(start=[0])
    stats = trainer_of(wrap("t5")).step(queries, responses, scores)
    tokens = sum(len(response) - 1 for response in responses)
    assert stats["objective/kl_dist"].shape == (4,)
    assert stats["objective/logprobs"].shape == stats["objective/ref_logprobs"].shape == (4, 6)
    assert stats["ppo/policy/advantages"].shape == (1, tokens)
    assert stats["tokens/responses_dist"].tolist() == [4, 3, 6, 2]
    assert stats["ppo/policy/advantages"].mean() == pytest.approx(0, abs=1e-5)
    kinds = ["forward_pass", "compute_rewards", "compute_advantages", "optimize_step", "calc_stats", "total"]
    assert all(stats[f"time/ppo/{kind}"] >= 0 for kind in kinds)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_start_token_may_be_there_or_not(wrap, trainer_of, batch_of, family):
    done = []
    for start in ([], [START[family]]):
        model = wrap(family)
        trainer_of(model).step(*batch_of(start=start))
        done.append(weights(model))
    assert same(*done)


def test_an_empty_answer_of_bart_is_an_end_token_not_a_start_token(wrap, trainer_of, batch_of):
    trainer, end = trainer_of(wrap("bart")), torch.tensor([1])
    assert trainer._without_start(end).tolist() == [1]
    assert trainer._without_start(torch.tensor([1, 1])).tolist() == [1]
    queries, responses, scores = batch_of()
    stats = trainer.step(queries, [end, *responses[1:]], scores)
    assert stats["tokens/responses_dist"].tolist() == [1, 3, 6, 2]


def test_a_response_of_nothing_but_the_start_token_is_refused(wrap, trainer_of, batch_of):
    queries, responses, scores = batch_of(start=[0])
    with pytest.raises(ValueError, match="number 2 has no token but"):
        trainer_of(wrap("t5")).step(queries, [*responses[:2], torch.tensor([0]), responses[3]], scores)


# --- the reference ---


@pytest.mark.parametrize(("strict", "given"), [(False, False), (False, True), (True, False), (True, True)])
def test_reference_of_a_trained_adapter(wrap, trainer_of, batch_of, strict, given):
    model = wrap("gpt2", lora="trained")
    ref_model = create_reference_model(model) if given else None
    trainer = trainer_of(model, ref_model=ref_model, strict=strict, ppo_epochs=1)
    assert trainer.ref_model is ref_model
    kl = trainer.step(*batch_of())["objective/kl"]
    assert (abs(kl) > 1e-2) == strict  # strict compares with the base model
    assert strict or kl == pytest.approx(0, abs=1e-5)
    _, theirs = trainer.generate(batch_of()[0][0], generate_ref_response=True, do_sample=False, max_new_tokens=4)
    assert theirs.shape[1] > 5


def test_a_reference_that_moves_with_the_policy_is_refused(wrap, trainer_of):
    model = wrap("gpt2")
    with pytest.raises(ValueError, match=r"shares the trained weight .* create_reference_model"):
        trainer_of(model, ref_model=model)


def test_num_shared_layers(wrap, trainer_of, batch_of):
    model = wrap("gpt2")
    trainer = trainer_of(model, arguments={"num_shared_layers": 1})
    before = weights(model)
    trainer.step(*batch_of())
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert not [name for name in moved if ".h.0." in name or ".wte." in name]
    assert [name for name in moved if ".h.1." in name]


# --- strict, masks and own pieces ---


def test_response_masks_switch_tokens_off(wrap, trainer_of, batch_of):
    queries, responses, scores = batch_of()
    ones = [torch.ones_like(response) for response in responses]
    runs = {}
    for name, masks in (("none", None), ("ones", ones), ("holed", [torch.tensor([0, 1, 1, 1]), *ones[1:]])):
        model = wrap("gpt2")
        stats = trainer_of(model).step(queries, responses, scores, masks)
        runs[name] = (weights(model), stats["objective/entropy"])
    assert same(runs["none"][0], runs["ones"][0])
    assert not same(runs["none"][0], runs["holed"][0])
    assert runs["holed"][1] < runs["ones"][1]  # the sum over one token less


@pytest.mark.parametrize("strict", [False, True])
def test_own_pieces_are_called(wrap, trainer_of, batch_of, strict):
    calls = []

    class Own(PPOTrainer):
        def compute_rewards(self, *args):
            calls.append(1)
            return super().compute_rewards(*args)

    trainer_of(wrap("gpt2"), cls=Own, strict=strict).step(*batch_of())
    assert calls == [1]


@pytest.mark.filterwarnings("ignore:the mean ratio")
@pytest.mark.parametrize("strict", [False, True])
def test_a_skipped_minibatch_moves_weights_in_strict_only(wrap, trainer_of, batch_of, strict):
    class Own(PPOTrainer):  # by pieces in both
        pass

    Own.loss = lambda self, *args: PPOTrainer.loss(self, *args)
    model = wrap("gpt2")
    trainer = trainer_of(model, cls=Own, strict=strict, ppo_epochs=1)
    trainer.step(*batch_of())  # Adam has momentum now
    before = weights(model)
    trainer.config.ratio_threshold = 1e-6
    trainer.step(*batch_of())
    assert same(weights(model), before) != strict


def test_left_padding_does_not_change_log_probabilities(wrap, trainer_of, batch_of):
    queries, responses, _ = batch_of()
    tokenizer, found = tiny.tokenizer(), []
    trainer = trainer_of(wrap("gpt2"), tokenizer=tokenizer)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        inputs = trainer.prepare_model_inputs(queries, responses)
        logprobs, _, _, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
        found.append(logprobs[mask.bool()])
    torch.testing.assert_close(*found)
    assert len(found[0]) == sum(map(len, responses))


# --- sampling ---


@pytest.mark.parametrize("family", ["t5", "bart", "gpt2"])
def test_batched_generation_is_that_of_one_query(wrap, trainer_of, batch_of, family):
    trainer, queries = trainer_of(wrap(family)), batch_of()[0]
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 2}
    batched = trainer.generate(queries, batch_size=3, **options)
    for query, answer in zip(queries, batched, strict=True):
        alone = trainer.generate(query, **options)[0].tolist()
        assert answer.tolist() == alone[: len(answer)]
        prompt = query.tolist() if family == "gpt2" else [START[family]]
        assert alone[: len(prompt)] == prompt
        assert len(answer) >= len(prompt) + 2  # a query that holds the end token is not cut there, nor is BART's start
    if family == "gpt2":
        bare = trainer.generate(queries, batch_size=3, return_prompt=False, **options)
        assert [row.tolist() for row in bare] == [
            row[len(query) :].tolist() for query, row in zip(queries, batched, strict=True)
        ]


def test_generation_knows_lengths_and_the_reference(wrap, trainer_of, batch_of):
    model = wrap("gpt2", lora="trained")
    trainer, queries = trainer_of(model, strict=True), batch_of()[0]  # strict keeps the model's dropout
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(1.0)
    ours, theirs = trainer.generate(
        queries,
        length_sampler=LengthSampler(5, 6),
        return_prompt=False,
        generate_ref_response=True,
        do_sample=False,
        eos_token_id=-1,
        remove_padding=False,
    )
    assert {len(row) for row in ours + theirs} == {5}
    assert [row.tolist() for row in ours] != [row.tolist() for row in theirs]
    model.train()
    sampled = trainer.generate(queries[0], max_new_tokens=3, do_sample=False)
    assert model.training
    assert trainer.generate(queries[0], max_new_tokens=3, do_sample=False).tolist() == sampled.tolist()
    with pytest.raises(ValueError, match="query_tensor"):
        trainer.generate(queries[0].unsqueeze(0))


# --- what a user may do wrong ---


def test_step_says_what_is_wrong(wrap, trainer_of, batch_of):
    trainer = trainer_of(wrap("gpt2"))
    queries, responses, scores = batch_of()
    for arguments, message in [
        ((queries[:3], responses, scores), "queries: 3 examples do not match the batch size"),
        ((torch.stack(scores), responses, scores), "queries: must be a list of tensors"),
        ((queries, [row.tolist() for row in responses], scores), "responses: number 0 is no tensor but list"),
        ((queries, [row[None] for row in responses], scores), r"responses: number 0 has shape \(1, 4\)"),
        ((queries, responses, [score.reshape(1, 1) for score in scores]), r"scores: number 0 has shape \(1, 1\)"),
        ((queries, responses, scores, [torch.ones(2)] * 4), "response_masks: number 0 has 2 tokens, its response 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer.step(*arguments)
    trainer.step(queries, responses, [score.reshape(1) for score in scores])


@pytest.mark.parametrize("masks", [None, [torch.tensor([0, 1, 1, 1]), *(torch.ones(size) for size in (3, 6, 2))]])
def test_one_nan_score_moves_no_weight(wrap, trainer_of, batch_of, masks):
    model = wrap("gpt2")
    trainer, before = trainer_of(model), weights(model)
    queries, responses, scores = batch_of()
    with pytest.raises(NonFiniteError):
        trainer.step(queries, responses, [*scores[:3], torch.tensor(float("nan"))], masks)
    assert same(weights(model), before)


def test_arguments_of_the_wrong_type(wrap):
    model, tokenizer, config = wrap("gpt2"), tiny.tokenizer(), PPOConfig(batch_size=2, mini_batch_size=1)
    for arguments, name in [
        ({"config": {}}, "config"),
        ({"model": model.pretrained_model}, "model"),
        ({"tokenizer": "gpt2"}, "tokenizer"),
        ({"ref_model": model.pretrained_model}, "ref_model"),
        ({"dataset": [1, 2]}, "dataset"),
        ({"lr_scheduler": 3}, "lr_scheduler"),
    ]:
        with pytest.raises(ValueError, match=f"{name}: must be"):
            PPOTrainer(**({"config": config, "model": model, "tokenizer": tokenizer} | arguments))


# --- options ---


def test_scores_are_scaled_normed_and_clipped(wrap, trainer_of, batch_of):
    queries, responses, scores = batch_of()
    trainer = trainer_of(wrap("gpt2"), use_score_scaling=True, use_score_norm=True, score_clip=1.0)
    stats = trainer.step(queries, responses, scores)
    plain = torch.stack(scores)
    normed = ((plain - plain.mean()) / plain.std()).clamp(-1, 1)
    assert stats["ppo/mean_scores"] == pytest.approx(normed.mean().item(), abs=1e-5)
    assert stats["ppo/std_scores"] == pytest.approx(normed.std().item(), abs=1e-5)


def test_a_scheduler_steps_once_a_ppo_step(wrap, trainer_of, batch_of):
    model = wrap("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    trainer = trainer_of(model, arguments={"optimizer": optimizer, "lr_scheduler": schedule})
    rates = [trainer.step(*batch_of())["ppo/learning_rate"] for _ in range(3)]
    assert rates == pytest.approx([0.0, 0.0025, 0.005])


def test_early_stopping_ends_the_epochs(wrap, trainer_of, batch_of):
    stats = trainer_of(wrap("gpt2"), ppo_epochs=4, early_stopping=True, target_kl=1e-9).step(*batch_of())
    assert stats["ppo/epochs_done"] == 1


def test_the_best_model_is_pushed(wrap, trainer_of, batch_of, monkeypatch):
    pushed = []
    trainer = trainer_of(wrap("gpt2"), push_to_hub_if_best_kwargs={"repo_id": "me/best"}, compare_steps=2)
    monkeypatch.setattr(trainer, "push_to_hub", lambda **options: pushed.append((trainer.compare_step, options)))
    queries, responses, scores = batch_of()
    for factor in (1, 2, 3, 3, 2):
        trainer.step(queries, responses, [score * factor for score in scores])
    assert pushed == [(0, {"repo_id": "me/best"}), (2, {"repo_id": "me/best"})]


def test_tensorboard_gets_the_scalars(wrap, trainer_of, batch_of, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_of(wrap("gpt2"), log_with="tensorboard", project_kwargs={"logging_dir": str(tmp_path)})
    queries, responses, scores = batch_of()
    trainer.log_stats(trainer.step(queries, responses, scores), {"query": [], "response": []}, scores)
    trainer.accelerator.end_training()
    (folder,) = {path.parent for path in (tmp_path / "trl").glob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert {"objective/kl", "env/reward_mean", "ppo/loss/total"} <= set(events.Tags()["scalars"])
    assert events.Scalars("env/reward_mean")[0].value == pytest.approx(torch.stack(scores).mean().item())


def test_no_dataset_is_warned_of(wrap):
    config = PPOConfig(batch_size=2, mini_batch_size=1)
    with pytest.warns(UserWarning, match="dataset: none is given"):
        assert PPOTrainer(config, wrap("gpt2"), None, tiny.tokenizer()).dataloader is None
    dataset = torch.utils.data.TensorDataset(torch.arange(5))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = PPOTrainer(config, wrap("gpt2"), None, tiny.tokenizer(), dataset)
    assert len(trainer.dataloader) == 2


def test_models_that_do_not_train_or_share_are_warned_of(wrap):
    dataset, config = torch.utils.data.TensorDataset(torch.arange(5)), PPOConfig(batch_size=2, mini_batch_size=1)
    frozen, whole = wrap("gpt2", lora="trained"), wrap("gpt2")
    frozen.pretrained_model.requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing but its value head trains"):
        PPOTrainer(config, frozen, None, tiny.tokenizer(), dataset)
    with pytest.warns(UserWarning, match="num_shared_layers"):
        PPOTrainer(config, whole, create_reference_model(whole), tiny.tokenizer(), dataset, num_shared_layers=1)


def test_weights_that_are_sharded_are_refused(wrap, trainer_of, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(InputError, match="shards weights"):
        trainer_of(wrap("gpt2"))


def test_saving_uploads_if_asked_to(wrap, trainer_of, tmp_path, monkeypatch):
    seen = []

    def upload(folder, repo_id, **options):
        seen.append(({path.name for path in Path(folder).iterdir()}, repo_id, options))
        return "https://hub/commit/1"

    monkeypatch.setattr("yunque.compat.trl011.trainer.upload", upload)
    trainer = trainer_of(wrap("gpt2", lora="fresh"))
    assert trainer.save_pretrained(tmp_path / "out") is None
    assert not seen
    assert trainer.push_to_hub("me/ppo", private=True) == "https://hub/commit/1"
    (files, name, options), wanted = seen[0], {path.name for path in (tmp_path / "out").iterdir()}
    assert (files, name, options) == (wanted, "me/ppo", {"private": True})
    assert {"adapter_model.safetensors", "model.safetensors", "tokenizer.json", "README.md"} <= files
    with pytest.raises(ValueError, match="private: has no effect"):
        trainer.save_pretrained(tmp_path / "out", private=True)
