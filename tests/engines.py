"""What tests ask of engines."""

import asyncio

from yunque.runtime import GenerationOptions

ENDLESS = GenerationOptions(max_new_tokens=40, eos_token_ids=())


async def collect(stream):
    """Texts, tokens and reasons by index, and all events."""
    events = [event async for event in stream]
    return [
        (
            "".join(event.text for event in events if event.index == index),
            [token for event in events if event.index == index for token in event.tokens],
            [event.finish_reason for event in events if event.index == index and event.finish_reason],
        )
        for index in range(stream.request.n)
    ], events


def value(engine, name, **labels):
    return engine.metrics.all.registry.get_sample_value(f"yunque_{name}", {"model": engine.metrics.model} | labels)


async def answered(engine, *requests):
    """The first request's texts and events when all are done."""
    return (await asyncio.gather(*(collect(engine.submit(request)) for request in requests)))[0]
