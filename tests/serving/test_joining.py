"""How texts join an engine's batch: what a first token waits for, and long prompts in pieces."""

import asyncio
import itertools
import threading
from dataclasses import replace

import pytest
from engines import ENDLESS, answered, collect, value

from yunque.runtime import Batch, GenerationOptions
from yunque.runtime.pieces import PromptReader
from yunque.runtime.rows import Rows
from yunque.serving.engine import Engine
from yunque.serving.requests import Request

SAMPLED = replace(ENDLESS, do_sample=True, temperature=2.0, max_new_tokens=12)
LONG = [3 + number % 60 for number in range(200)]


@pytest.fixture
def told(monkeypatch):
    """What engines do: ("read", prompts), ("piece", tokens left), ("step", rows), ("token", length of its prompt)."""
    notes = []

    def note(owner, name, before=None, after=None):
        method = getattr(owner, name)

        def noting(self, *arguments):
            if before:
                notes.append(before(self, *arguments))
            result = method(self, *arguments)
            if after:
                notes.append(after(self))
            return result

        monkeypatch.setattr(owner, name, noting)

    note(Batch, "add", lambda batch, requests, prompts, options: ("read", len(prompts)))
    note(PromptReader, "read", after=lambda reader: ("piece", reader.left))
    note(Rows, "step", lambda rows, tokens: ("step", len(tokens)))
    note(Engine, "_post", lambda engine, stream, event: ("token", len(stream.request.prompt)))
    return notes


def alone(made, row, option):
    return made.generate([row], option)[0].tokens


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_a_first_token_waits_for_no_step_of_the_others(engine, exported, prompts, told, name):
    ids = exported(name).runtime.encode(prompts)
    ids = list({len(row): row for row in ids}.values())
    served = engine(name, max_rows=8, prefill_tokens=64)
    told.clear()

    async def run():
        async def ask_later(row, seconds):
            await asyncio.sleep(seconds)
            await answered(served, Request(prompt=row, options=ENDLESS))

        await asyncio.gather(*(ask_later(row, 0.003 * number) for number, row in enumerate(ids)))

    asyncio.run(run())
    for row in ids:
        token = told.index(("token", len(row)))
        read = max(place for place, (kind, _) in enumerate(told[:token]) if kind == "read")
        assert "step" not in [kind for kind, _ in told[read:token]]
    assert max(number for kind, number in told if kind == "step") > 1  # they did run together


def test_neighbours_get_tokens_between_the_pieces_of_a_long_prompt(engine, exported, told, monkeypatch):
    made, second_sent, read = exported("llama").runtime, threading.Event(), PromptReader.read

    def wait(self, most):
        if self.left < len(LONG):
            assert second_sent.wait(20)
        read(self, most)

    monkeypatch.setattr(PromptReader, "read", wait)
    served = engine("llama", max_rows=4, prefill_tokens=32)
    short, late = [5] * 7, [9] * 8

    async def run():
        told.clear()
        running = served.submit(Request(prompt=short, options=ENDLESS))
        long = served.submit(Request(prompt=LONG, options=SAMPLED, n=2))
        while not any(kind == "piece" for kind, _ in told):
            await asyncio.sleep(0.001)
        second = served.submit(Request(prompt=late, options=ENDLESS))
        second_sent.set()
        texts = [(await collect(stream))[0] for stream in (long, running, second)]
        return [[tokens for _, tokens, _ in each] for each in texts]

    long, (running,), (second,) = asyncio.run(run())
    assert long == [alone(made, LONG, replace(SAMPLED, seed=seed)) for seed in (0, 1)]
    assert [alone(made, short, ENDLESS), alone(made, late, ENDLESS)] == [running, second]
    pieces = [place for place, (kind, _) in enumerate(told) if kind == "piece"]
    assert 200 // 32 < len(pieces) <= 1 + 200 // 16  # once for both texts, at least half of 32 tokens each
    for before, after in itertools.pairwise(pieces):
        assert "step" in [kind for kind, _ in told[before:after]]
    assert pieces[0] < told.index(("token", len(late))) < pieces[-1] < told.index(("token", len(LONG)))


def test_long_prompts_of_models_with_an_encoder_are_read_at_once(engine, exported, told):
    served = engine("t5", max_rows=2, prefill_tokens=32)
    texts, _ = asyncio.run(answered(served, Request(prompt=LONG, options=ENDLESS)))
    assert texts[0][1] == alone(exported("t5").runtime, LONG, ENDLESS)
    assert "piece" not in [kind for kind, _ in told]


def test_long_prompts_end_as_others_do(engine, monkeypatch):
    served = engine("llama", max_rows=2, prefill_tokens=32)
    read, held = PromptReader.read, threading.Semaphore(0)

    def wait(self, most):
        assert held.acquire(timeout=20)
        if 63 in self.prompt:
            raise RuntimeError("cannot")
        read(self, most)

    monkeypatch.setattr(PromptReader, "read", wait)
    bad = [*LONG[:100], 63]
    request = Request(prompt=LONG, options=replace(ENDLESS, max_new_tokens=3))

    async def run():
        cancelled, late = served.submit(request), served.submit(replace(request, deadline_s=0.05))
        held.release(2)
        await asyncio.sleep(0.1)
        assert served.running == 1  # its place is kept while it is read
        cancelled.cancel()
        failing, fine = served.submit(replace(request, prompt=bad)), served.submit(request)
        held.release(40)
        ended = [(await collect(stream))[1] for stream in (cancelled, late, failing, fine)]
        while held._value:
            held.acquire(blocking=False)
        left = served.submit(request)
        closing = asyncio.create_task(asyncio.to_thread(served.close))
        while not served._is_closed:
            await asyncio.sleep(0.001)
        held.release()
        await closing
        return ended, (await collect(left))[1]

    ended, left = asyncio.run(run())
    assert [events[-1].finish_reason for events in ended] == ["cancelled", "deadline", "error", "length"]
    assert "RuntimeError" in ended[2][-1].error
    assert left[-1].finish_reason == "cancelled"
    assert (served.running, served.queued) == (0, 0)


def test_caches_of_long_prompts_stay_within_the_budget(engine, exported, monkeypatch):
    made = exported("llama").runtime
    served = engine("llama", max_rows=8, prefill_tokens=32)
    short = replace(ENDLESS, max_new_tokens=20)
    limit = made.new_rows().bytes_for(3, 224, 0)
    served.capacity = replace(served.capacity, cache_bytes=limit)
    most = []
    step = Rows.step

    def note(self, tokens):
        reader = served._reader.rows.bytes_for(*served._reader.rows.capacity) if served._reader else 0
        most.append(self.bytes_for(*self.capacity) + reader)
        step(self, tokens)

    monkeypatch.setattr(Rows, "step", note)

    async def run():
        requests = [Request(prompt=[7] * (3 + number), options=short) for number in range(10)]
        requests[3:3] = [Request(prompt=LONG, options=short), Request(prompt=LONG[:150], options=short)]
        answers = await asyncio.gather(*(collect(served.submit(request)) for request in requests))
        return requests, [texts[0][1] for texts, _ in answers]

    requests, answers = asyncio.run(run())
    assert limit / 2 < max(most) <= limit
    assert answers == [alone(made, request.prompt, short) for request in requests]


def test_a_prompt_being_read_keeps_a_drain_waiting(engine, monkeypatch):
    served, reading, go_on = engine("t5", max_rows=2), threading.Event(), threading.Event()
    add = Batch.add

    def wait(self, *arguments):
        reading.set()
        assert go_on.wait(20)
        add(self, *arguments)

    monkeypatch.setattr(Batch, "add", wait)

    async def run():
        stream = served.submit(Request(prompt=[5, 6], options=ENDLESS))
        assert await asyncio.to_thread(reading.wait, 20)
        assert not await asyncio.to_thread(served.drain, 0.02)
        go_on.set()
        assert await asyncio.to_thread(served.drain, 20)
        return (await collect(stream))[1]

    assert asyncio.run(run())[-1].finish_reason == "length"


def test_a_step_that_fails_while_a_group_joins_one_by_one_ends_all_of_them(engine, monkeypatch):
    served = engine("t5", max_rows=4)
    add, step, failures = Batch.add, Batch.step, [1]

    def one_by_one(self, requests, *rest):
        if len(requests) > 1:
            raise RuntimeError("too many")
        add(self, requests, *rest)

    def fail(self):
        if failures:
            failures.pop()
            raise RuntimeError("out of luck")
        return step(self)

    monkeypatch.setattr(Batch, "add", one_by_one)
    monkeypatch.setattr(Batch, "step", fail)
    option = GenerationOptions(max_new_tokens=2, eos_token_ids=())

    async def run():
        streams = [served.submit(Request(prompt=[5, 6 + number], options=option)) for number in range(3)]
        async with asyncio.timeout(20):
            return [(await collect(stream))[1][-1].finish_reason for stream in streams]

    assert set(asyncio.run(run())) <= {"error", "length"}
    assert value(served, "worker_restarts_total") == 1
