"""Generation beside transformers' own: greedy, penalties, beams, limits; ragged batches that rows join and leave."""

import itertools

import numpy as np
import pytest
import torch
from exported import GENERATORS

from yunque.errors import InputError
from yunque.runtime import GenerationOptions

CAUSAL = ("gpt2", "llama", "llama_grouped", "llama_scaled", "qwen2", "qwen3")
NEW = 20


def theirs(model, ids, **options):
    """What transformers generates for each prompt by itself: new tokens, and the score of the best beam."""
    answers = []
    for row in ids:
        tokens = torch.tensor([row])
        output = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, return_dict_in_generate=True,
            output_scores=True, **options,
        )  # fmt: skip
        begin = 1 if model.config.is_encoder_decoder else len(row)
        found = output.sequences[0, begin:].tolist()
        score = output.sequences_scores.item() if options.get("num_beams", 1) > 1 else None
        answers.append((found, score))
    return answers


def with_eos(made, ids):
    """The two end-of-text tokens that end these greedy answers at the most different steps."""
    free = [answer.tokens for answer in made.runtime.generate(ids, max_new_tokens=NEW, eos_token_ids=())]

    def variety(eos):
        return len({next((place for place, token in enumerate(tokens) if token in eos), NEW) for tokens in free})

    return max(itertools.combinations(sorted({token for tokens in free for token in tokens}), 2), key=variety)


@pytest.mark.parametrize("name", GENERATORS)
def test_greedy_in_a_ragged_batch_equals_transformers(exported, prompts, name):
    made = exported(name)
    ids = [row for row in made.runtime.encode(prompts) if row]
    assert len({len(row) for row in ids}) > 3
    eos = with_eos(made, ids)
    answers = made.runtime.generate(ids, max_new_tokens=NEW, eos_token_ids=eos, batch_size=5)
    for answer, (wanted, _) in zip(
        answers, theirs(made.model, ids, max_new_tokens=NEW, eos_token_id=list(eos)), strict=True
    ):
        assert answer.tokens == wanted
        ended = wanted[-1] in eos
        assert answer.finish_reason == ("eos" if ended else "length")
    assert len({len(answer.tokens) for answer in answers}) > 1


@pytest.mark.parametrize("name", ["t5_gated", "gpt2", "llama"])
def test_penalty_and_shortest_length_equal_transformers(exported, prompts, name):
    made = exported(name)
    ids = made.runtime.encode(prompts[:6])
    eos = with_eos(made, ids)
    options = {"max_new_tokens": NEW, "min_new_tokens": 9, "repetition_penalty": 1.7}
    plain = made.runtime.generate(ids, max_new_tokens=NEW, eos_token_ids=eos)
    answers = made.runtime.generate(ids, eos_token_ids=eos, **options)
    wanted = [tokens for tokens, _ in theirs(made.model, ids, eos_token_id=list(eos), **options)]
    assert [answer.tokens for answer in answers] == wanted
    assert wanted != [answer.tokens for answer in plain]
    assert min(map(len, wanted)) >= 9


@pytest.mark.parametrize("name", ["t5_untied", "bart_untied", "gpt2", "llama_grouped"])
@pytest.mark.parametrize(
    ("beams", "penalty", "stopping"), [(3, 1.0, False), (4, 0.0, "never"), (2, 2.0, True), (3, -1.0, "never")]
)
def test_beams_equal_transformers(exported, prompts, name, beams, penalty, stopping):
    made = exported(name)
    ids = made.runtime.encode(prompts[:5])
    eos = with_eos(made, ids)
    options = {
        "num_beams": beams, "length_penalty": penalty, "early_stopping": stopping, "max_new_tokens": 12,
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "min_new_tokens": 2,
    }  # fmt: skip
    answers = made.runtime.generate(ids, eos_token_ids=eos, batch_size=beams * 3, **options)
    for answer, (wanted, score) in zip(
        answers, theirs(made.model, ids, eos_token_id=list(eos), **options), strict=True
    ):
        assert answer.tokens == wanted
        assert answer.score == pytest.approx(score, rel=1e-4, abs=1e-5)


def test_beams_and_greedy_in_one_call(exported, prompts):
    model = exported("llama").runtime
    options = [GenerationOptions(max_new_tokens=6, num_beams=1 + number % 3) for number in range(6)]
    together = model.generate(prompts[:6], options)
    alone = [model.generate([prompt], option)[0] for prompt, option in zip(prompts, options, strict=False)]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]


@pytest.mark.parametrize("name", ["t5", "llama_grouped"])
def test_logprobs_are_the_model_s_own(exported, prompts, name):
    made = exported(name)
    ids = made.runtime.encode(prompts[:3])
    answers = made.runtime.generate(
        ids, max_new_tokens=6, eos_token_ids=(), logprobs=True, do_sample=True, temperature=2.0, top_k=9
    )
    for row, answer in zip(ids, answers, strict=True):
        with torch.inference_mode():
            if made.model.config.is_encoder_decoder:
                decoder = torch.tensor([[0, *answer.tokens[:-1]]])
                logits = made.model(torch.tensor([row]), decoder_input_ids=decoder).logits[0]
            else:
                logits = made.model(torch.tensor([[*row, *answer.tokens[:-1]]])).logits[0, len(row) - 1 :]
        wanted = logits.log_softmax(dim=-1)[torch.arange(6), answer.tokens].numpy()
        np.testing.assert_allclose(answer.logprobs, wanted, atol=1e-4)


def test_a_seed_gives_its_text_in_any_batch(exported, prompts):
    model = exported("t5").runtime
    options = [GenerationOptions(max_new_tokens=15, do_sample=True, seed=seed) for seed in range(6)]
    together = model.generate([prompts[3]] * 6, options)
    backwards = model.generate([prompts[3]] * 6, options[::-1], batch_size=2)[::-1]
    alone = model.generate([prompts[3]], options[4])
    assert [answer.tokens for answer in together] == [answer.tokens for answer in backwards]
    assert together[4].tokens == alone[0].tokens
    assert len({tuple(answer.tokens) for answer in together}) == 6


def test_stop_strings_end_the_text_before_them(exported, prompts):
    model = exported("llama").runtime
    free = model.generate(prompts[:2], max_new_tokens=NEW, eos_token_ids=())
    word = free[0].text.split()[5]
    answers = model.generate(prompts[:2], max_new_tokens=NEW, eos_token_ids=(), stop=(f" {word}",))
    assert answers[0].finish_reason == "stop"
    assert free[0].text.startswith(answers[0].text)
    assert f" {word}" not in answers[0].text
    assert len(answers[0].tokens) <= 6


@pytest.mark.parametrize("name", ["t5", "bart_untied", "gpt2", "llama"])
def test_requests_join_and_leave_a_running_batch(exported, prompts, name):
    model = exported(name).runtime
    ids = model.encode(prompts[:8])
    option = GenerationOptions(max_new_tokens=10, eos_token_ids=())
    alone = [model.generate([row], option)[0].tokens for row in ids]
    batch = model.new_batch()
    found = {number: [] for number in range(8)}
    joins = {0: [0, 1], 2: [2], 3: [3, 4, 5], 11: [6], 25: [7]}
    for time in range(40):
        joining = joins.get(time, [])
        batch.add(joining, [ids[number] for number in joining], [option] * len(joining))
        if time == 5:
            batch.cancel([3])
        if len(batch):
            step = batch.step()
            for request, token in zip(step.requests.tolist(), step.tokens.tolist(), strict=True):
                found[request].append(token)
    assert len(found.pop(3)) == 2
    assert found == {number: alone[number] for number in found}


@pytest.mark.parametrize("name", CAUSAL[:2])
def test_a_text_ends_where_the_model_s_positions_do(exported, name):
    model = exported(name).runtime
    most = model.spec.max_positions
    begin = [5] * (min(most, 2048) - 3)
    if len(begin) + 3 == most:
        answer = model.generate([begin], max_new_tokens=50, eos_token_ids=())[0]
        assert (len(answer.tokens), answer.finish_reason) == (3, "length")
    with pytest.raises(InputError, match=f"{most} positions; shorten"):
        model.generate([[5] * most])


def test_impossible_requests_are_refused(exported):
    model = exported("t5").runtime
    for values, message in (
        ({"temperature": 0}, "temperature: 0 is not possible"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens"),
        ({"num_beams": 2, "do_sample": True}, "num_beams: does not go with"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"stop": ("",)}, "stop"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(["w5"], **values)
    with pytest.raises(InputError, match="is empty"):
        model.generate([[]])
    with pytest.raises(InputError, match="options for 2 prompts"):
        model.generate(["w5", "w6"], [GenerationOptions()])
    assert model.generate([]) == []


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_what_a_call_leaves_in_memory_does_not_reach_the_next(exported, prompts, name):
    model = exported(name).runtime
    first, second = prompts[:4], prompts[4:8]
    options = {"max_new_tokens": 12, "eos_token_ids": ()}
    alone = [model.generate([prompt], **options)[0].tokens for prompt in first]
    for former in (second, first[::-1], second[:2], [max(prompts, key=len)] * 4):
        model.generate(former, max_new_tokens=20, eos_token_ids=())
        assert [answer.tokens for answer in model.generate(first, **options)] == alone
    assert model.generate([]) == []
