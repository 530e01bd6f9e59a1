"""The engine: texts that join and leave a batch are those made alone; turns, limits, ends and failures."""

import asyncio
import random
import time
from dataclasses import replace

import pytest
from engines import ENDLESS, answered, collect, value

from yunque.errors import InputError
from yunque.runtime import Batch, GenerationOptions
from yunque.runtime.batch import sizes
from yunque.runtime.rows import Rows
from yunque.serving.requests import Draining, EngineFailed, QueueFull, Request


def mixed_options(rng, count):
    """Greedy and sampled, short and long, with penalties and shortest lengths."""
    return [
        GenerationOptions(
            max_new_tokens=rng.randrange(1, 30), do_sample=number % 3 == 0, temperature=1.5, top_k=9 * (number % 2),
            seed=number, repetition_penalty=1 + 0.3 * (number % 4 == 1), eos_token_ids=(5, 9),
            logprobs=number % 5 == 0, top_logprobs=2 * (number % 5 == 0),
        )
        for number in range(count)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["t5", "llama", "bart_untied", "gpt2"])
def test_answers_are_those_made_alone(engine, exported, prompts, name):
    made, rng = exported(name).runtime, random.Random(3)
    ids = made.encode(prompts * 2)
    options = mixed_options(rng, len(ids))
    alone = [made.generate([row], option)[0] for row, option in zip(ids, options, strict=True)]
    served = engine(name, max_rows=5, prefill_tokens=40)

    async def ask(row, option):
        await asyncio.sleep(rng.random() * 0.05)
        return await collect(served.submit(Request(prompt=row, options=option, client=str(len(row) % 3))))

    async def ask_all():
        return await asyncio.gather(*(ask(row, option) for row, option in zip(ids, options, strict=True)))

    for (texts, events), answer, option in zip(asyncio.run(ask_all()), alone, options, strict=True):
        text, tokens, reasons = texts[0]
        assert tokens == answer.tokens
        assert text == answer.text
        assert reasons == [{"eos": "stop", "length": "length"}[answer.finish_reason]]
        if option.logprobs:
            logprobs = [part for event in events for part in event.logprobs]
            assert [part.logprob for part in logprobs] == answer.logprobs
            assert all(len(part.top) == 2 and part.top[0].logprob >= part.top[1].logprob for part in logprobs)
    assert value(served, "batch_size_bucket", le="1.0") < value(served, "batch_size_count")
    assert value(served, "batch_size_bucket", le="8.0") == value(served, "batch_size_count")


def test_a_request_for_several_texts_gets_them_by_seed(engine, exported, prompts):
    made = exported("t5").runtime
    row = made.encode(prompts[:1])[0]
    option = GenerationOptions(max_new_tokens=12, do_sample=True, temperature=2.0, seed=7, eos_token_ids=())
    texts, _ = asyncio.run(answered(engine("t5", max_rows=2), Request(prompt=row, options=option, n=3)))
    alone = [made.generate([row], replace(option, seed=seed))[0].tokens for seed in (7, 8, 9)]
    assert [tokens for _, tokens, _ in texts] == alone
    assert len({tuple(tokens) for tokens in alone}) == 3


def test_stop_strings_are_never_shown(engine, exported, prompts):
    made = exported("llama").runtime
    row = made.encode(prompts[:1])[0]
    free = made.generate([row], ENDLESS)[0]
    words = free.text.split()
    stop = f"{words[4][-1]} {words[5]} {words[6]}"  # over three tokens, from the middle of the first
    end = free.text.index(stop)
    option = replace(ENDLESS, stop=("never", stop))
    served = engine("llama", max_rows=2)
    texts, events = asyncio.run(answered(served, Request(prompt=row, options=option)))
    assert texts == [(free.text[:end], free.tokens[:7], ["stop"])]
    shown = ""
    for event in events:
        shown += event.text
        assert free.text[:end].startswith(shown)
    assert served.running == 0


def test_clients_take_turns(engine, exported, prompts):
    served = engine("t5", max_rows=1)
    row = exported("t5").runtime.encode(prompts[:1])[0]
    order = []

    async def ask(client):
        await collect(served.submit(Request(prompt=row, options=ENDLESS, client=client)))
        order.append(client)

    async def ask_all():
        await asyncio.gather(*(ask(client) for client in "aaaaaabbc"))

    asyncio.run(ask_all())
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert order[3:5] in (["a", "b"], ["b", "a"])
    assert order[5:] == ["a"] * 4


def test_cancelling_frees_the_place_within_a_step(engine, exported, prompts, gate):
    served = engine("t5", max_rows=1)
    rows = exported("t5").runtime.encode(prompts[:2])

    async def run():
        gate.shut = True
        first, second = (served.submit(Request(prompt=row, options=ENDLESS)) for row in rows)
        gate.release(3)
        for _ in range(3):
            await anext(first)
        first.cancel()
        gate.release(2)  # the step that may be under way, and the next
        assert (await anext(second)).tokens
        rest = [event async for event in first]
        assert len(rest) <= 2
        assert rest[-1].finish_reason == "cancelled"
        waiting = served.submit(Request(prompt=rows[0], options=ENDLESS))
        waiting.cancel()
        gate.release(2)
        assert [event.finish_reason async for event in waiting] == ["cancelled"]
        second.cancel()
        gate.release(5)

    asyncio.run(run())


def test_deadlines_end_texts_that_wait_and_that_run(engine, exported, prompts, gate):
    served = engine("t5", max_rows=1)
    row = exported("t5").runtime.encode(prompts[:1])[0]

    async def run():
        gate.shut = True
        runs = served.submit(Request(prompt=row, options=ENDLESS, deadline_s=0.3))
        waits = served.submit(Request(prompt=row, options=ENDLESS, deadline_s=0.2))
        gate.release(2)
        await anext(runs)
        await asyncio.sleep(0.35)
        gate.release(1)
        return [event async for event in runs], [event async for event in waits]

    running, waiting = asyncio.run(run())
    assert [event.finish_reason for event in running] == [None, None, "deadline"]
    assert [(event.finish_reason, event.tokens) for event in waiting] == [("deadline", ())]
    assert value(served, "finished_total", reason="deadline") == 2


def test_a_full_queue_refuses_with_the_seconds_to_wait(engine, exported, prompts, gate):
    served = engine("t5", max_rows=1, max_queued=2)
    row = exported("t5").runtime.encode(prompts[:1])[0]
    request = Request(prompt=row, options=ENDLESS)

    async def run():
        gate.shut = True
        streams = [served.submit(request)]
        gate.release(1)
        await anext(streams[0])
        streams += [served.submit(request), served.submit(request)]
        with pytest.raises(QueueFull) as refusal:
            served.submit(request)
        assert 1 <= refusal.value.retry_after_s <= 60
        gate.shut = False
        gate.release(1)
        return [(await collect(stream))[0][0][2] for stream in streams]

    assert asyncio.run(run()) == [["length"]] * 3
    assert value(served, "refused_total", reason="queue_full") == 1
    with pytest.raises(InputError, match="n: 3"):
        asyncio.run(answered(served, replace(request, n=3)))


def test_draining_finishes_what_was_accepted(engine, exported, prompts, gate):
    served = engine("t5", max_rows=1)
    row = exported("t5").runtime.encode(prompts[:1])[0]
    request = Request(prompt=row, options=ENDLESS)

    async def run():
        gate.shut = True
        streams = [served.submit(request), served.submit(request)]
        assert not await asyncio.to_thread(served.drain, 0.05)
        with pytest.raises(Draining):
            served.submit(request)
        gate.shut = False
        gate.release(2)
        assert await asyncio.to_thread(served.drain, 20)
        return [(await collect(stream))[0][0] for stream in streams]

    answer = exported("t5").runtime.generate([row], ENDLESS)[0]
    assert asyncio.run(run()) == [(answer.text, answer.tokens, ["length"])] * 2


def test_a_failing_step_ends_what_runs_and_the_rest_goes_on(engine, exported, prompts, monkeypatch):
    served = engine("t5", max_rows=2)
    row = exported("t5").runtime.encode(prompts[:1])[0]
    step, failures = Batch.step, [3]

    def fail(self):
        if len(self) == 2 and failures[0]:
            failures[0] -= 1
            raise RuntimeError("out of luck")
        return step(self)

    monkeypatch.setattr(Batch, "step", fail)

    async def run():
        streams = [served.submit(Request(prompt=row, options=ENDLESS)) for _ in range(7)]
        return [(await collect(stream))[1][-1] for stream in streams]

    events = asyncio.run(run())
    assert [event.finish_reason for event in events].count("error") >= 4
    assert events[-1].finish_reason == "length"
    assert "RuntimeError" in events[0].error
    assert value(served, "worker_restarts_total") >= 2
    failures[0] = 1000

    async def until_given_up():
        for _ in range(8):
            await asyncio.gather(*(collect(served.submit(Request(prompt=row, options=ENDLESS))) for _ in range(2)))

    monkeypatch.setattr(Batch, "step", lambda self: 1 / 0)
    with pytest.raises(EngineFailed):
        asyncio.run(until_given_up())
    assert not served.healthy


def test_a_prompt_that_cannot_be_read_fails_alone(engine, exported, prompts, monkeypatch):
    served = engine("llama", max_rows=4)
    ids = exported("llama").runtime.encode(prompts[:4])
    alone = exported("llama").runtime.generate(ids, ENDLESS)
    forward = Rows.forward

    def fail(self, first, tokens, lengths):
        if tokens.shape[0] > 1 and (tokens == 63).any():
            raise RuntimeError("cannot")
        if (tokens == 63).any():
            raise RuntimeError("cannot")
        forward(self, first, tokens, lengths)

    monkeypatch.setattr(Rows, "forward", fail)
    bad = Request(prompt=[63, 63, 63], options=ENDLESS)

    async def run():
        streams = [served.submit(Request(prompt=row, options=ENDLESS)) for row in ids[:2]]
        streams += [served.submit(bad), *(served.submit(Request(prompt=row, options=ENDLESS)) for row in ids[2:])]
        return [(await collect(stream))[0][0] for stream in streams]

    assert not any(63 in row for row in ids)
    answers = asyncio.run(run())
    assert answers.pop(2)[2] == ["error"]
    assert [tokens for _, tokens, _ in answers] == [answer.tokens for answer in alone]


@pytest.mark.parametrize(("name", "longest"), [("llama", 95), ("t5", 130)])
def test_prompts_are_read_in_groups_of_similar_length(engine, monkeypatch, name, longest):
    served = engine(name, max_rows=12, prefill_tokens=96)
    groups, add = [], Batch.add

    def note(self, requests, prompts, options):
        groups.append([len(prompt) for prompt in prompts])
        add(self, requests, prompts, options)

    monkeypatch.setattr(Batch, "add", note)
    lengths = [5, longest, 6, 40, 7, 44, 90, 4, 50, 8]

    async def run():
        requests = [Request(prompt=[3] * length, options=ENDLESS, client=str(length)) for length in lengths]
        return await asyncio.gather(*(collect(served.submit(request)) for request in requests))

    assert all(texts[0][2] == ["length"] for texts, _ in asyncio.run(run()))
    assert sorted(length for group in groups for length in group) == sorted(lengths)
    for group in groups:
        assert max(group) <= 2 * max(16, min(group))
        assert len(group) == 1 or len(group) * max(group) <= 96
    assert len(groups) < len(lengths)


def test_caches_stay_within_the_budget(engine, exported, prompts):
    made = exported("llama").runtime
    limit = made.new_rows().bytes_for(3, 64, 0)
    served = engine("llama", max_rows=12, memory_budget_bytes=1 << 40)
    served.capacity = replace(served.capacity, cache_bytes=limit)
    ids = made.encode(prompts)
    most = 0

    async def ask(row, new):
        nonlocal most
        stream = served.submit(Request(prompt=row, options=replace(ENDLESS, max_new_tokens=new)))
        tokens = []
        async for event in stream:
            tokens += event.tokens
            rows = served._batch.rows
            most = max(most, rows.bytes_for(*rows.capacity))
        return tokens

    async def ask_all():
        lengths = [60 if number == 5 else 20 for number in range(len(ids))]
        return lengths, await asyncio.gather(*(ask(row, new) for row, new in zip(ids, lengths, strict=True)))

    lengths, answers = asyncio.run(ask_all())
    assert limit / 3 < most <= limit
    for row, new, tokens in zip(ids, lengths, answers, strict=True):
        assert tokens == made.generate([row], replace(ENDLESS, max_new_tokens=new))[0].tokens
    with pytest.raises(InputError, match="max_tokens"):
        asyncio.run(answered(served, Request(prompt=[3] * 100, options=replace(ENDLESS, max_new_tokens=200))))


@pytest.mark.parametrize(("rows_allowed", "kept"), [(100, True), (9, False)])
def test_an_idle_engine_frees_caches_that_take_more_than_half_of_what_is_allowed(
    engine, exported, prompts, rows_allowed, kept
):
    made = exported("llama").runtime
    prompt = made.encode(prompts)[0]
    served = engine("llama", max_rows=8)
    needed = made.new_rows().bytes_for(1, *sizes(made.spec, prompt, ENDLESS.max_new_tokens))
    served.capacity = replace(served.capacity, cache_bytes=rows_allowed * needed)
    asyncio.run(answered(served, Request(prompt=prompt, options=ENDLESS)))
    assert (served._batch.rows.capacity[0] == 8) == kept
    assert (value(served, "cache_bytes") > 0) == kept


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_the_warm_up_times_prompts_that_are_read_one_by_one(engine, monkeypatch, name):
    read, add = [], Batch.add

    def note(self, requests, prompts, options):
        read.append((len(prompts), len({tuple(prompt) for prompt in prompts})))
        add(self, requests, prompts, options)

    monkeypatch.setattr(Batch, "add", note)
    served = engine(name)
    assert read[0] == (1, 1)
    assert all(different == min(many, 8) for many, different in read)
    assert max(different for _, different in read) == 8
    assert 128 <= served.capacity.prefill_tokens <= 2048


def test_a_budget_that_holds_no_text_is_refused(engine):
    with pytest.raises(InputError, match="memory_budget"):
        engine("t5", memory_budget_bytes=1000)


def test_impossible_requests_are_refused(engine):
    served = engine("gpt2", max_rows=2)
    for prompt, options, message in (
        ([], ENDLESS, "empty"),
        ([3, 999], ENDLESS, "token ids"),
        ([-1], ENDLESS, "token ids"),
        ([3] * 5000, ENDLESS, "shorten"),
        ([3], GenerationOptions(num_beams=2), "num_beams"),
    ):
        with pytest.raises(InputError, match=message):
            asyncio.run(answered(served, Request(prompt=prompt, options=options)))


def test_closing_ends_what_is_unfinished(engine, exported, prompts, gate):
    served = engine("t5", max_rows=1)
    row = exported("t5").runtime.encode(prompts[:1])[0]

    async def run():
        gate.shut = True
        streams = [served.submit(Request(prompt=row, options=ENDLESS)) for _ in range(2)]
        gate.release(1)
        await anext(streams[0])
        gate.shut = False
        gate.release(1)
        begin = time.monotonic()
        await asyncio.to_thread(served.close)
        assert time.monotonic() - begin < 10
        return [(await collect(stream))[1][-1].finish_reason for stream in streams]

    assert asyncio.run(run())[1] == "cancelled"
