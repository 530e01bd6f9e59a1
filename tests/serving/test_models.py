"""Several models by name, and swapping one while requests run."""

import asyncio
import gc
import shutil
import subprocess
import sys
import weakref

import pytest

from yunque.errors import InputError
from yunque.runtime import GenerationOptions
from yunque.serving import models
from yunque.serving.engine_settings import EngineSettings
from yunque.serving.metrics import Metrics
from yunque.serving.models import Registry, UnknownModel, named_folders
from yunque.serving.requests import Request

ENDLESS = GenerationOptions(max_new_tokens=40, eos_token_ids=())


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(models, "_GRACE_S", 0.05)
    made = []

    def build(folders, **options):
        made.append(Registry(folders, Metrics(), EngineSettings(max_rows=2, threads=1), **options))
        return made[-1]

    yield build
    for one in made:
        one.close()


async def tokens_of(stream):
    return [token async for event in stream for token in event.tokens]


def test_models_by_name(registry, exported, prompts):
    folders = {"flan:a": exported("t5").folder, "flan:b": exported("t5_gated").folder, "c": exported("roberta").folder}
    served = registry(folders)
    assert not served.ready
    served.load()
    assert served.ready
    assert served.names == ["flan:a", "flan:b", "c"]
    assert served.get().name == "flan:a"
    assert [served.get(name).kind for name in served.names] == ["seq2seq", "seq2seq", "classifier"]
    assert served.get("c").generates is False
    with pytest.raises(UnknownModel, match="flan:a, flan:b, c"):
        served.get("flan")
    text = served.metrics.exposition().decode()
    assert f'manifest_sha256="{served.get("flan:b").manifest_sha256}",model="flan:b"' in text

    async def ask(name):
        engine = served.get(name).engine
        row = served.get(name).model.encode(prompts[:1])[0]
        return await tokens_of(engine.submit(Request(prompt=row, options=ENDLESS)))

    for name, made in (("flan:a", "t5"), ("flan:b", "t5_gated")):
        assert asyncio.run(ask(name)) == exported(made).runtime.generate(prompts[:1], ENDLESS)[0].tokens
    assert served.drain(5)


def test_a_swap_under_load_finishes_on_the_old_model_and_frees_it(registry, exported, prompts, gate):
    served = registry({"m": exported("t5").folder})
    served.load()
    row = exported("t5").runtime.encode(prompts[:1])[0]
    request = Request(prompt=row, options=ENDLESS)

    async def run():
        gate.shut = True
        before = [served.get("m").engine.submit(request) for _ in range(3)]  # one of them waits
        gate.release(2)
        await anext(before[0])
        gate.shut = False
        new = await asyncio.to_thread(served.swap, "m", exported("t5_gated").folder)
        gate.release(1)
        assert served.get("m") is new
        after = served.get("m").engine.submit(request)
        return [await tokens_of(stream) for stream in (*before, after)]

    old = weakref.ref(served.get("m").model)
    answers = asyncio.run(run())
    first = exported("t5").runtime.generate([row], ENDLESS)[0].tokens
    assert answers[0] == first[1:]
    assert answers[1:3] == [first] * 2
    assert answers[3] == exported("t5_gated").runtime.generate([row], ENDLESS)[0].tokens
    assert answers[3] != first
    for thread in served._retiring:
        thread.join(20)
    gc.collect()
    assert old() is None
    assert served.metrics.registry.get_sample_value("yunque_swaps_total", {"model": "m", "outcome": "done"}) == 1


def test_a_swap_that_fails_leaves_the_old_model(registry, exported, prompts, tmp_path):
    served = registry({"m": exported("t5").folder})
    served.load()
    damaged = tmp_path / "damaged"
    shutil.copytree(exported("t5_gated").folder, damaged)
    weights = damaged / "weights.bin" if (damaged / "weights.bin").exists() else max(damaged.iterdir(), key=_size)
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    old = served.get("m")
    for folder, message in ((damaged, "damaged"), (tmp_path / "none", "no such"), (exported("bert").folder, "classif")):
        with pytest.raises(InputError, match=message):
            served.swap("m", folder)
        assert served.get("m") is old
    assert served.ready
    assert served.metrics.registry.get_sample_value("yunque_swaps_total", {"model": "m", "outcome": "failed"}) == 3
    with pytest.raises(InputError, match="damaged"):
        registry({"good": exported("t5").folder, "bad": damaged}).load()


def _size(path):
    return path.stat().st_size


def test_names_of_the_command_line(tmp_path):
    folders = named_folders(["flan:int8=/a/b", str(tmp_path)])
    assert [(name, str(folder)) for name, folder in folders.items()] == [
        ("flan:int8", "/a/b"), (tmp_path.name, str(tmp_path)),
    ]  # fmt: skip
    for values in (["a=/x", "a=/y"], ["=/x"], ["a="]):
        with pytest.raises(InputError, match="model:"):
            named_folders(values)
    with pytest.raises(InputError, match="default_model"):
        Registry({"a": tmp_path}, Metrics(), default="b")


def test_serving_works_where_torch_cannot_be_imported(exported):
    code = f"""
import asyncio, sys
for name in ("torch", "transformers"):
    sys.modules[name] = None
from pathlib import Path
from yunque.runtime import GenerationOptions
from yunque.serving import guard
from yunque.serving.engine_settings import EngineSettings
from yunque.serving.metrics import Metrics
from yunque.serving.models import Registry
from yunque.serving.requests import Request
registry = Registry({{"m": Path({str(exported("t5").folder)!r})}}, Metrics(), EngineSettings(max_rows=2))
registry.load()
async def ask():
    stream = registry.get().engine.submit(Request(prompt=[3, 4], options=GenerationOptions(max_new_tokens=4)))
    return [event async for event in stream][-1].finish_reason
assert asyncio.run(ask()) in ("stop", "length")
assert registry.drain(5)
registry.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
