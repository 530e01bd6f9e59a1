"""Classifier micro-batches and the guard over them."""

import asyncio
import threading
import time

import pytest

from yunque.errors import InputError
from yunque.runtime import GenerationOptions
from yunque.serving.classifier_engine import ClassifierEngine
from yunque.serving.engine_settings import ClassifierSettings, GuardSettings
from yunque.serving.guard import Guard
from yunque.serving.metrics import EngineMetrics, Metrics
from yunque.serving.requests import DeadlinePassed, Draining, EngineFailed, Event, QueueFull, Request


@pytest.fixture
def classifier(exported):
    started = []

    def start(name="roberta", **settings):
        made = ClassifierEngine(exported(name).runtime, ClassifierSettings(**settings), EngineMetrics(Metrics(), name))
        started.append(made)
        made.start()
        return made

    yield start
    for made in started:
        made.close()


def value(engine, name):
    return engine.metrics.all.registry.get_sample_value(f"yunque_{name}", {"model": engine.metrics.model})


def test_texts_of_many_requests_are_scored_together_as_alone(classifier, exported, prompts):
    served = classifier(max_batch=8, max_wait_s=0.05)

    async def run():
        return await asyncio.gather(*(served.classify([prompt, prompts[0]]) for prompt in prompts))

    answers = asyncio.run(run())
    alone = [exported("roberta").runtime.classify([prompt])[0] for prompt in prompts]
    assert answers == [[scores, alone[0]] for scores in alone]  # to the last bit
    assert value(served, "batch_size_count") <= 6 < value(served, "batch_size_sum") == 2 * len(prompts)


def test_refusals_deadlines_and_failures(classifier, exported, prompts, monkeypatch):
    served = classifier(max_batch=2, max_queued=3, max_wait_s=0)
    gate, classify = threading.Event(), served.model.classify

    def wait(texts, **options):
        assert gate.wait(20)
        if [9, 9] in texts:
            raise RuntimeError("cannot")
        return classify(texts, **options)

    monkeypatch.setattr(served.model, "classify", wait)
    monkeypatch.setattr(served, "_encoded", lambda texts: [[9, 9] if text == "bad" else [5, 6] for text in texts])

    async def run():
        first = asyncio.create_task(served.classify(["a", "b"]))
        while not served.running:
            await asyncio.sleep(0.005)
        rest = [asyncio.create_task(served.classify([text], deadline_s=s)) for text, s in (("c", 0.05), ("bad", 9))]
        rest.append(asyncio.create_task(served.classify(["d"])))
        await asyncio.sleep(0.1)
        with pytest.raises(QueueFull):
            await served.classify(["e"])
        with pytest.raises(InputError, match="3 at most"):
            await served.classify(["e"] * 4)
        gate.set()
        return await asyncio.gather(first, *rest, return_exceptions=True)

    first, late, bad, good = asyncio.run(run())
    assert first == [good[0]] * 2
    assert isinstance(late, DeadlinePassed)
    assert isinstance(bad, EngineFailed)
    assert served.drain(5)
    with pytest.raises(Draining):
        asyncio.run(served.classify(["a"]))


class Rude:
    """A classifier engine for which shouting is toxic."""

    class model:
        labels = ("nothate", "hate")

        class spec:
            independent_labels, max_positions = False, None

        class tokenizer:
            encode = staticmethod(lambda texts: [text.split() for text in texts])

    def __init__(self):
        self.seen = []

    async def classify(self, texts, **_):
        self.seen += texts
        if "FAIL" in texts[0]:
            raise QueueFull(1)
        return [{"nothate": 0.1, "hate": 0.9} if "DAMN" in text else {"nothate": 0.8, "hate": 0.2} for text in texts]


class Words:
    """A stream of words of two texts."""

    def __init__(self, *texts):
        self.request = Request(prompt=[1], options=GenerationOptions(), n=len(texts))
        self.texts, self.is_cancelled = texts, False

    async def __aiter__(self):
        for index, text in enumerate(self.texts):
            words = text.split(" ")
            for place, word in enumerate(words):
                last = place == len(words) - 1
                yield Event(word + " " * (not last), (place,), finish_reason="stop" if last else None, index=index)

    def cancel(self):
        self.is_cancelled = True


def watch(texts, **settings):
    guard, stream = Guard(Rude(), GuardSettings(label="hate", **settings)), Words(*texts)
    metrics = EngineMetrics(Metrics(), "m")

    async def run():
        return [event async for event in guard.watch(stream, metrics)]

    return asyncio.run(run()), stream, guard.classifier.seen


def test_blocking_shows_nothing_of_what_scores_too_high():
    events, stream, seen = watch(["Nice day. Really", "Hello. DAMN it"], action="block")
    assert [(event.text, event.finish_reason, event.score, event.index) for event in events] == [
        ("Nice day. Really", "stop", 0.2, 0), ("", "content_filter", 0.9, 1),
    ]  # fmt: skip
    assert events[0].tokens == (0, 1, 2)
    assert not stream.is_cancelled
    assert seen == ["Nice day. Really", "Hello. DAMN it"]


def test_blocking_by_sentence_shows_what_came_before():
    events, stream, _ = watch(["One two. Three DAMN four. Five. Six"], action="block", release="sentence")
    assert [(event.text, event.finish_reason) for event in events] == [("One two. ", None), ("", "content_filter")]
    assert stream.is_cancelled


def test_flagging_and_passing_let_everything_through():
    for action, score in (("flag", 0.9), ("pass", None)):
        events, _, seen = watch(["Oh DAMN it"], action=action)
        assert [event.text for event in events] == ["Oh ", "DAMN ", "it"]
        assert [event.score for event in events] == [None, None, score]
        assert seen == ["Oh DAMN it"]


def test_what_cannot_be_scored_is_not_shown():
    events, _, _ = watch(["so FAIL now"], action="block")
    assert [(event.text, event.finish_reason) for event in events] == [("", "error")]
    events, _, _ = watch(["so FAIL now"], action="flag")
    assert [event.text for event in events] == ["so ", "FAIL ", "now"]
    with pytest.raises(InputError, match="guard_label"):
        Guard(Rude(), GuardSettings(label="rude"))


def test_a_long_answer_is_scored_in_parts(classifier, exported):
    guard = Guard(classifier(), GuardSettings())
    most = exported("roberta").runtime.spec.max_positions
    text = " ".join(f"w{3 + number % 60}" for number in range(3 * most))
    parts = guard._parts(text)
    assert " ".join(parts) == text
    assert max(len(row) for row in exported("roberta").runtime.encode(parts)) <= most
    begin = time.monotonic()
    assert 0 <= asyncio.run(guard.score(text)) <= 1
    assert time.monotonic() - begin < 10
