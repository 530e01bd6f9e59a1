import pytest
import tiny
import torch
from transformers import GenerationConfig

from yunque.models.adapter import adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.models.policy import Policy
from yunque.rl.rollout import Response, generate

CPU = torch.device("cpu")
QUERIES = [[3, 4, 5], [6, 7, 8, 9, 10], [11], [12, 13]]
BUILDS = [("t5", False), ("bart", False), ("gpt2", False), ("llama", False), ("t5", True), ("llama", True)]

FILTERS = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 10, "top_p": 0.8},
]


@pytest.fixture(params=BUILDS, ids=lambda build: f"{build[0]}{'-lora' * build[1]}")
def model(request, model_of):
    family, lora = request.param
    model = model_of(family, lora=lora)
    with torch.no_grad():  # a fresh adapter does nothing: make its sampling differ from the base's
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


def sample(model, queries, samples=None, *, seed=0, shortest_limit=None, adapter=None, value_head=None, **options):
    adapter = adapter or adapter_for(model, tiny.tokenizer())
    samples = range(len(queries)) if samples is None else samples
    arguments = GenerationArguments(**({"max_new_tokens": 8} | options))
    return generate(
        model, adapter, queries, arguments,
        seed=seed, samples=samples, shortest_limit=shortest_limit, device=CPU, value_head=value_head,
    )  # fmt: skip


def adapter_ending_at(model, *eos_ids):
    adapter = adapter_for(model, tiny.tokenizer())
    adapter.eos_ids = list(eos_ids)
    return adapter


def greedy_token(model, query=QUERIES[0]):
    """The likeliest first token of a response that is not the end."""
    (response,) = sample(model, [query], temperature=0.0, max_new_tokens=1, min_new_tokens=1)
    return response.tokens[0]


# --- the response of a sample belongs to (seed, sample) ---


def test_a_response_does_not_depend_on_the_batch_around_it(model):
    together = sample(model, QUERIES, [7, 8, 9, 10], shortest_limit=3)
    alone = [sample(model, [query], [7 + row], shortest_limit=3)[0] for row, query in enumerate(QUERIES)]
    assert together == alone
    backwards = sample(model, QUERIES[::-1], [10, 9, 8, 7], shortest_limit=3)
    assert backwards[::-1] == together


def test_other_samples_and_other_seeds_draw_other_responses(model):
    copies = [QUERIES[0]] * 4
    first = sample(model, copies, range(4))
    assert len({tuple(response.tokens) for response in first}) == 4
    assert sample(model, copies, range(4)) == first
    assert sample(model, copies, range(4, 8)) != first
    assert sample(model, copies, range(4), seed=1) != first


def test_generation_leaves_torch_s_random_state_alone(model):
    state = torch.get_rng_state()
    sample(model, QUERIES)
    assert torch.equal(torch.get_rng_state(), state)


# --- where a response ends ---


def test_limits_are_drawn_from_low_to_high_both_inclusive(model):
    responses = sample(model, [QUERIES[0]] * 64, shortest_limit=3, max_new_tokens=6, min_new_tokens=6)
    assert {len(response.tokens) for response in responses} == {3, 4, 5, 6}
    assert not any(response.finished for response in responses)


def test_without_a_shortest_limit_every_response_may_take_the_longest(model):
    responses = sample(model, [QUERIES[0]] * 8, max_new_tokens=6, min_new_tokens=6)
    assert {len(response.tokens) for response in responses} == {6}


def test_a_response_ends_at_its_first_end_token_which_it_keeps(model):
    end = greedy_token(model)
    adapter = adapter_ending_at(model, 1, end)
    (response,) = sample(model, [QUERIES[0]], adapter=adapter, temperature=0.0)
    assert response == Response([end], finished=True)
    for sampled in sample(model, [QUERIES[0]] * 32, adapter=adapter):
        ends = [index for index, token in enumerate(sampled.tokens) if token in (1, end)]
        assert ends == ([len(sampled.tokens) - 1] if sampled.finished else [])


def test_an_end_token_in_the_last_allowed_place_is_finished(model):
    adapter = adapter_ending_at(model, greedy_token(model))
    (response,) = sample(model, [QUERIES[0]], adapter=adapter, temperature=0.0, max_new_tokens=1)
    assert response.finished


def test_min_new_tokens_holds_the_end_back(model):
    adapter = adapter_ending_at(model, 1, greedy_token(model))
    for temperature in (0.0, 1.0):
        for response in sample(
            model, [QUERIES[0]] * 16, adapter=adapter, temperature=temperature, min_new_tokens=3, max_new_tokens=5
        ):
            assert len(response.tokens) >= 3
            assert not set(response.tokens[:3]) & set(adapter.eos_ids)


# --- what is drawn ---


def test_temperature_0_is_greedy_decoding(model):
    start_id = getattr(model.config, "decoder_start_token_id", None)
    own = GenerationConfig(max_new_tokens=8, eos_token_id=1, pad_token_id=0, decoder_start_token_id=start_id)
    model.generation_config = own
    for query in QUERIES:
        ours = sample(model, [query], temperature=0.0)[0].tokens
        inputs = torch.tensor([query])
        output = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=own)[0]
        start = 1 if model.config.is_encoder_decoder else len(query)
        assert ours == output[start:].tolist()


def expected_distribution(model, query, *, temperature=1.0, top_k=0, top_p=1.0):
    """First token's probabilities, from the model's logits by the definition of each filter."""
    adapter = adapter_for(model, tiny.tokenizer())
    logits, _ = adapter.score(model, adapter.scoring_batch([query], [[1]], CPU))
    probabilities = (logits[0, 0].double() / temperature).softmax(-1)
    order = probabilities.argsort(descending=True)
    ranked = probabilities[order]
    if top_k:
        ranked[top_k:] = 0
    ranked = ranked / ranked.sum()
    mass_before = ranked.cumsum(0) - ranked
    ranked[mass_before >= top_p] = 0
    return torch.zeros_like(probabilities).scatter(0, order, ranked / ranked.sum())


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_tokens_are_drawn_from_the_softmax(model_of, family, options):
    model, draws = model_of(family), 4000
    with torch.no_grad():
        expected = expected_distribution(model, QUERIES[1], **options)
    responses = sample(model, [QUERIES[1]] * draws, max_new_tokens=1, **options)
    counts = torch.bincount(torch.tensor([response.tokens[0] for response in responses]), minlength=tiny.VOCABULARY)
    assert not counts[expected == 0].any()
    assert (expected > 0).sum() > 2
    common = expected * draws >= 5  # chi-square wants 5 expected draws a cell: the rarer tokens are one cell
    cells = torch.cat([counts[common], counts[~common].sum()[None]]).double()
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]) * draws
    chi_square = ((cells - wanted).square() / wanted.clamp(min=1)).sum()
    freedom = int(common.sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and four standard deviations


# --- what sampling computes on the way ---


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"temperature": 0.0}], ids=str)
def test_logprobs_and_values_are_those_of_a_forward_pass(model, options):
    adapter = adapter_for(model, tiny.tokenizer())
    policy = Policy(model, adapter).eval()
    responses = sample(model, QUERIES * 3, shortest_limit=2, max_new_tokens=20, value_head=policy.v_head, **options)
    assert len({len(response.tokens) for response in responses}) > 2  # some rows ended long before others
    tokens = [response.tokens for response in responses]
    with torch.no_grad():
        scores = policy(adapter.scoring_batch(QUERIES * 3, tokens, CPU), options.get("temperature", 1.0))
    for row, response in enumerate(responses):
        length = len(response.tokens)
        torch.testing.assert_close(
            torch.tensor(response.logprobs), scores.logprobs_BR[row, :length], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(torch.tensor(response.values), scores.values_BR[row, :length], rtol=1e-4, atol=1e-5)


def test_half_precision_leaves_them_to_a_forward_pass(model_of):
    assert sample(model_of("t5").bfloat16(), QUERIES)[0].logprobs is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sample(model_of("t5"), QUERIES)[0].logprobs is None
    assert sample(model_of("t5"), QUERIES)[0].values is None  # no value head was given


def test_a_cold_temperature_with_a_minimum_length_still_samples_among_the_others(model):
    end = greedy_token(model)
    for response in sample(
        model, [QUERIES[0]] * 8, adapter=adapter_ending_at(model, end), temperature=1e-3, min_new_tokens=1
    ):
        assert response.tokens[0] != end


# --- the model is left as it was ---


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bart_s_own_generation_config_is_ignored_and_restored(model_of, lora):
    model = model_of("bart", lora=lora)
    base = model.get_base_model() if lora else model
    base.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=1, decoder_start_token_id=1)
    plain = sample(model, QUERIES, min_new_tokens=8)
    own = GenerationConfig(
        num_beams=4, forced_eos_token_id=1, forced_bos_token_id=2, no_repeat_ngram_size=1, min_length=5,
        early_stopping=True, max_length=30, pad_token_id=0, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    model.generation_config = base.generation_config = own
    kept = own.to_dict()
    assert sample(model, QUERIES, min_new_tokens=8) == plain
    assert not any(response.finished for response in plain)  # the last token was not forced to be the end
    assert model.generation_config is base.generation_config is own
    assert own.to_dict() == kept


def test_train_mode_comes_back_and_has_no_part_in_the_rollout(model):
    in_eval_mode = sample(model, QUERIES)
    assert not model.training
    model.train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.5
    assert sample(model, QUERIES) == in_eval_mode
    assert all(layer.training for layer in model.modules())


def test_the_model_is_restored_when_generation_fails(model, monkeypatch):
    own = model.generation_config
    model.train()
    monkeypatch.setattr("yunque.rl.rollout.decoder_for", lambda *options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(model, QUERIES)
    assert model.generation_config is own
    assert model.training
