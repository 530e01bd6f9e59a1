import pytest
import tiny
import torch
import transformers

from yunque.errors import InputError
from yunque.models.adapter import DecoderOnly, EncoderDecoder, adapter_for
from yunque.models.arguments import GenerationArguments
from yunque.models.loading import save_model
from yunque.models.policy import Policy, disable_dropout
from yunque.rl.rollout import generate

CPU = torch.device("cpu")
QUERIES = [[3, 4, 5], [6, 7, 8, 9, 10], [11]]
RESPONSES = [[12, 13, 14, 1], [15, 1], [16, 17, 18, 19, 20, 21]]


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


def policy_of(family, **options):
    model = tiny.FAMILIES[family](**options)
    return Policy(model, adapter_for(model, tiny.tokenizer())).eval()


def test_adapter_is_chosen_by_the_model():
    tokenizer = tiny.tokenizer()
    assert isinstance(adapter_for(tiny.t5(), tokenizer), EncoderDecoder)
    assert isinstance(adapter_for(tiny.llama(), tokenizer), DecoderOnly)


def test_scores_do_not_depend_on_padding(family):
    policy = policy_of(family)
    together = policy(policy.adapter.scoring_batch(QUERIES, RESPONSES, CPU))
    for row, (query, response) in enumerate(zip(QUERIES, RESPONSES, strict=True)):
        alone = policy(policy.adapter.scoring_batch([query], [response], CPU))
        for ours, theirs in zip(
            (together.logprobs_BR, together.values_BR), (alone.logprobs_BR, alone.values_BR), strict=True
        ):
            torch.testing.assert_close(ours[row, : len(response)], theirs[0], rtol=1e-5, atol=1e-5)


def test_logprobs_are_those_of_the_plain_model(family):
    policy = policy_of(family)
    query, response = QUERIES[1], RESPONSES[0]
    scores = policy(policy.adapter.scoring_batch([query], [response], CPU))
    if policy.model.config.is_encoder_decoder:
        start = policy.model.config.decoder_start_token_id
        decoder = torch.tensor([[start, *response[:-1]]])
        logits = policy.model(input_ids=torch.tensor([query]), decoder_input_ids=decoder).logits[0]
    else:
        logits = policy.model(input_ids=torch.tensor([query + response])).logits[0, len(query) - 1 : -1]
    expected = logits.log_softmax(-1)[torch.arange(len(response)), response]
    torch.testing.assert_close(scores.logprobs_BR[0], expected, rtol=1e-5, atol=1e-5)


def test_temperature_divides_the_logits(family):
    policy = policy_of(family)
    batch = policy.adapter.scoring_batch(QUERIES, RESPONSES, CPU)
    logits = policy(batch, keep_logits=True).logits_BRV
    expected = (logits / 0.5).log_softmax(-1).gather(-1, batch.response_BR.unsqueeze(-1)).squeeze(-1)
    mask = batch.mask_BR
    torch.testing.assert_close(policy(batch, temperature=0.5).logprobs_BR[mask], expected[mask])


def test_entropy_is_that_of_the_distribution():
    policy = policy_of("t5")
    scores = policy(policy.adapter.scoring_batch(QUERIES, RESPONSES, CPU), keep_logits=True)
    expected = torch.distributions.Categorical(logits=scores.logits_BRV).entropy()
    torch.testing.assert_close(scores.entropy_BR, expected, rtol=1e-4, atol=1e-5)


def test_mask_covers_exactly_the_response_tokens(family):
    mask = policy_of(family).adapter.scoring_batch(QUERIES, RESPONSES, CPU).mask_BR
    assert mask.tolist() == [[True] * len(row) + [False] * (6 - len(row)) for row in RESPONSES]


def test_disabled_dropout_makes_training_mode_exact(family):
    noise = dict.fromkeys(
        ("dropout_rate", "dropout", "attention_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"), 0.5
    )
    policy = policy_of(family, **noise)
    batch = policy.adapter.scoring_batch(QUERIES, RESPONSES, CPU)
    expected = policy(batch).logprobs_BR
    policy.train()
    if family != "llama" or policy.model.config.attention_dropout:
        assert not torch.allclose(policy(batch).logprobs_BR, expected, atol=1e-3)
    disable_dropout(policy)
    torch.testing.assert_close(policy(batch).logprobs_BR, expected)


def test_texts_are_joined_as_the_model_reads_them():
    tokenizer = tiny.tokenizer()
    assert adapter_for(tiny.t5(), tokenizer).join_text("Summary:", "Ana is late.") == "Summary: Ana is late."
    assert adapter_for(tiny.gpt2(), tokenizer).join_text("The film", " is good") == "The film is good"


def test_prompts_leave_room_for_the_response():
    tokenizer = tiny.tokenizer()
    assert adapter_for(tiny.gpt2(), tokenizer).prompt_limit(max_new_tokens=24) == 40
    assert adapter_for(tiny.bart(), tokenizer).prompt_limit(max_new_tokens=24) == 64
    assert adapter_for(tiny.t5(), tokenizer).prompt_limit(max_new_tokens=24) == 512


def test_responses_beyond_the_positions_are_refused():
    tokenizer = tiny.tokenizer()
    for family, positions in (("gpt2", 64), ("bart", 64), ("t5", 512)):
        with pytest.raises(InputError, match=f"max_new_tokens.*{positions} positions of {family}"):
            adapter_for(tiny.FAMILIES[family](), tokenizer).prompt_limit(max_new_tokens=positions + 1)


PLACES = ("tokenizer", "generation configuration", "configuration")


def ending_at(family, token, place):
    """A model and tokenizer that name ``token`` as an end in one place, and token 1 in the others."""
    model, tokenizer = tiny.FAMILIES[family](), tiny.tokenizer()
    if place == "tokenizer":
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    elif place == "generation configuration":
        model.generation_config.eos_token_id = [1, token]
    else:
        model.config.eos_token_id = [1, token]
    return model, tokenizer


@pytest.mark.parametrize("place", PLACES)
def test_an_answer_ends_at_a_token_that_only_one_place_names(family, place, tmp_path):
    def sampled(adapter, sample):
        options = GenerationArguments(max_new_tokens=6)
        return generate(model, adapter, QUERIES[:1], options, seed=0, samples=[sample], device=CPU)[0].tokens

    model = tiny.FAMILIES[family]()
    endless = adapter_for(model, tiny.tokenizer())
    endless.eos_ids = [63]
    free = {sample: sampled(endless, sample) for sample in range(20)}
    # an answer that nothing else would end, and that says its fourth token for the first time
    sample, tokens = next(item for item in free.items() if len({1, *item[1]}) == 7)

    model, tokenizer = ending_at(family, tokens[3], place)
    adapter = adapter_for(model, tokenizer)
    assert tokens[3] in adapter.eos_ids
    assert sampled(adapter, sample) == tokens[:4]

    save_model(model, tokenizer, tmp_path)
    saved = type(model).from_pretrained(tmp_path)
    ids = saved.generation_config.eos_token_id
    assert set(ids if isinstance(ids, list) else [ids]) == set(
        adapter.eos_ids
    )  # where transformers' own generate stops


@pytest.mark.parametrize("ids", [70, -1, [1, 70]], ids=str)
def test_an_end_token_outside_the_vocabulary_ends_nothing(ids):
    model = tiny.gpt2()
    model.config.eos_token_id = ids
    assert adapter_for(model, tiny.tokenizer()).eos_ids == [1]


def test_a_model_without_end_token_is_refused():
    model = tiny.gpt2(eos_token_id=None)
    with pytest.raises(InputError, match="end-of-sequence"):
        adapter_for(model, tiny.tokenizer(eos_token=None))


# --- families that differ in heads, caches and positions ---

IDS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
START = {"decoder_start_token_id": 0}
OTHERS = {
    "mt5": (
        "MT5",
        {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, **START},
    ),
    "led": (
        "LED",
        {
            **{"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 8},
            **{"max_encoder_position_embeddings": 60, "max_decoder_position_embeddings": 24},
            "decoder_start_token_id": 1,
        },
    ),
    "opt350": (
        "OPT",
        {
            **{"hidden_size": 16, "word_embed_proj_dim": 8, "do_layer_norm_before": False, "ffn_dim": 32},
            **{"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40},
        },
    ),
    "mamba": ("Mamba", {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}),
    "bloom": ("Bloom", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "mpt": ("Mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 40}),
}
LIMITS = {"mt5": 128, "led": 56, "opt350": 34, "mpt": 34}


def other(name):
    kind, options = OTHERS[name]
    config = getattr(transformers, f"{kind}Config")(vocab_size=tiny.VOCABULARY, **options, **IDS)
    seq2seq = config.is_encoder_decoder
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    return tiny._build(auto, config, {})


@pytest.mark.parametrize("name", OTHERS)
def test_sampling_and_scoring_agree_for_families_without_a_decoder_of_their_own(name):
    model, tokenizer = other(name), tiny.tokenizer(model_max_length=128)
    policy = Policy(model, adapter_for(model, tokenizer)).eval()
    options = GenerationArguments(max_new_tokens=6)
    sampled = generate(
        model, policy.adapter, QUERIES, options, seed=0, samples=[0, 1, 2], device=CPU, value_head=policy.v_head
    )
    scores = policy(policy.adapter.scoring_batch(QUERIES, [response.tokens for response in sampled], CPU))
    for row, response in enumerate(sampled):
        length = len(response.tokens)
        torch.testing.assert_close(scores.logprobs_BR[row, :length], torch.tensor(response.logprobs))
        torch.testing.assert_close(scores.values_BR[row, :length], torch.tensor(response.values))


@pytest.mark.parametrize(("name", "limit"), LIMITS.items())
def test_the_longest_prompt_is_what_the_position_tables_hold(name, limit):
    model = other(name)
    adapter = adapter_for(model, tiny.tokenizer(model_max_length=128))
    assert adapter.prompt_limit(6) == limit
    adapter.score(model, adapter.scoring_batch([[5] * limit], [[6] * 6], CPU))


def test_responses_beyond_the_decoder_positions_are_refused_though_the_encoder_has_more():
    adapter = adapter_for(other("led"), tiny.tokenizer(model_max_length=128))
    with pytest.raises(InputError, match=r"max_new_tokens: .* 24 positions of led"):
        adapter.prompt_limit(25)
