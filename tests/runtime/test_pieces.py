"""Prompts read piece by piece, and read once for several texts: the texts are those made alone."""

import random
from dataclasses import replace

import numpy as np
import pytest

from yunque.runtime import GenerationOptions
from yunque.runtime.models import Seq2SeqModel
from yunque.runtime.pieces import PromptReader
from yunque.runtime.rows import Rows

OPTIONS = GenerationOptions(max_new_tokens=9, eos_token_ids=())
SAMPLED = replace(OPTIONS, do_sample=True, temperature=2.0)


def finish(batch, found):
    """Step a batch to its end; tokens by request."""
    while len(batch):
        step = batch.step()
        for request, token in zip(step.requests.tolist(), step.tokens.tolist(), strict=True):
            found.setdefault(request, []).append(token)
    return found


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", ["llama", "llama_grouped", "llama_scaled", "gpt2", "mistral", "qwen3"])
def test_pieces_give_the_same_bits_and_texts(exported, name, precision, tmp_path):
    made = exported(name)
    model = made.as_int8(tmp_path) if precision == "int8" else made.runtime
    rng = random.Random(0)
    for length, most in ((50, 16), (49, 40), (48, 16), (16, 16), (5, 1)):
        prompt = [rng.randrange(3, 64) for _ in range(length)]
        whole = model.new_rows()
        model.begin(whole, [prompt], [9])
        reader = PromptReader(model.new_rows(), prompt, model.spec.max_positions)
        pieces = 0
        while reader.left:
            reader.read(most)
            pieces += 1
        assert pieces == -(-length // max(16, most // 16 * 16))
        np.testing.assert_array_equal(reader.rows.logits[0], whole.logits[0])
        neighbour = [7] * 20
        batch = model.new_batch()
        batch.add([0], [neighbour], [OPTIONS])
        found = {0: batch.step().tokens.tolist()}
        batch.join([1, 2], reader, [OPTIONS, SAMPLED])
        alone = [model.generate([ids], option)[0].tokens for ids, option in (
            (neighbour, OPTIONS), (prompt, OPTIONS), (prompt, SAMPLED))]  # fmt: skip
        assert finish(batch, found) == dict(enumerate(alone))


@pytest.mark.parametrize("name", ["t5", "bart_untied", "llama", "gpt2"])
def test_a_prompt_of_several_texts_is_read_once(exported, prompts, name, monkeypatch):
    model = exported(name).runtime
    one, two = model.encode([prompts[0], prompts[3]])
    ids = [one, two, one, one, two]
    options = [replace(SAMPLED, seed=seed, max_new_tokens=4 + seed) for seed in range(len(ids))]
    alone = [model.generate([row], option)[0].tokens for row, option in zip(ids, options, strict=True)]
    read = []
    if isinstance(model, Seq2SeqModel):
        set_source = Rows.set_source
        monkeypatch.setattr(
            Rows,
            "set_source",
            lambda self, row, cross, lengths: read.extend(lengths) or set_source(self, row, cross, lengths),
        )
    else:
        forward = Rows.forward
        monkeypatch.setattr(
            Rows, "forward", lambda self, first, *tokens: read.extend(tokens[0]) or forward(self, first, *tokens)
        )
    batch = model.new_batch()
    batch.add([9, 10, 11, 12], [two] * 4, [OPTIONS] * 4)
    batch.step()
    batch.add(range(len(ids)), ids, options)
    assert len(read) == 1 + 2
    assert batch.rows.capacity[0] == 4 + len(ids)  # grown once, to what they need
    found = finish(batch, {})
    assert [found[number] for number in range(len(ids))] == alone
