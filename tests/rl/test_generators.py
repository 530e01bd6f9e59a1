import math
from pathlib import Path

import pytest
import tiny
import torch

from yunque.errors import InputError, Stopped
from yunque.models.arguments import GenerationArguments
from yunque.rl.endpoint import Endpoint
from yunque.rl.feedback_arguments import WriterArguments
from yunque.rl.generators import LocalModel, open_models
from yunque.rl.writing import Request, stream

OPTIONS = GenerationArguments(max_new_tokens=6)
REQUESTS = [
    Request(" ".join(f"w{10 + place + step}" for step in range(2 + place)), stream(0, place)) for place in range(5)
]
TEMPLATE = "{% for m in messages %}w9 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w8{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def build(family, *words, template=None, **special):
        path = tmp_path_factory.mktemp(family)
        tiny.FAMILIES[family]().save_pretrained(path)
        tokenizer = tiny.tokenizer(words, **special)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(path)
        return str(path)

    return build


def local(name, stopped=lambda: False, **changed):
    args = WriterArguments(model_name_or_path=name, **({"batch_size": 2} | changed))
    return LocalModel(args, name, "model_name_or_path", stopped)


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "bart"])
def test_a_text_depends_on_its_prompt_and_stream_not_on_its_batch(folder, family):
    name = folder(family)
    texts = dict(local(name).write(REQUESTS, OPTIONS))
    assert dict(local(name, batch_size=5).write(REQUESTS, OPTIONS)) == texts
    assert dict(local(name).write(REQUESTS[3:], OPTIONS)) == {0: texts[3], 1: texts[4]}
    assert len(set(texts.values())) > 1


def test_a_chat_template_is_used_where_there_is_one(folder):
    model = local(folder("llama", template=TEMPLATE))
    ids = model.tokenizer.convert_tokens_to_ids
    assert model.encode("w20 w21") == ids(["w9", "w20", "w21", "w8"])
    assert local(folder("llama")).encode("w20") == ids(["w20"])


def test_prompts_beyond_the_model_are_none(folder):
    long = Request("w10 " * 60, 1)  # gpt2 has 64 positions
    texts = dict(local(folder("gpt2")).write([long, REQUESTS[0]], OPTIONS))
    assert texts[0] is None
    assert texts[1] is not None


def test_a_signal_stops_between_batches(folder):
    seen = []
    model = local(folder("llama"), stopped=lambda: len(seen) >= 2)
    texts = model.write(REQUESTS, OPTIONS)
    seen += [next(texts), next(texts)]
    with pytest.raises(Stopped, match="--resume"):
        next(texts)


@pytest.mark.parametrize("family", ["t5", "llama"])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_log_odds_are_those_of_the_letters(folder, family, template):
    model = local(folder(family, "A", "B", template=template))
    prompts = ["w20 w21", "w30", "w40 w41 w42"]
    found = model.log_odds(prompts, 8)
    letters = model.tokenizer.convert_tokens_to_ids(["A", "B"])
    for prompt, odds in zip(prompts, found, strict=True):
        ids = torch.tensor([model.encode(prompt)])
        inputs = {"decoder_input_ids": torch.tensor([[0]])} if family == "t5" else {}
        logprobs = model.model(input_ids=ids, **inputs).logits[0, -1].log_softmax(-1)
        assert math.isclose(odds, float(logprobs[letters[0]] - logprobs[letters[1]]), abs_tol=1e-4)


def test_a_judge_without_the_letters_is_refused(folder):
    with pytest.raises(InputError, match="cannot tell the letters A and B apart"):
        local(folder("llama")).log_odds(["w20"], 8)


def test_a_comparison_too_long_is_none(folder):
    assert local(folder("gpt2", "A", "B")).log_odds(["w10 " * 70, "w10"], 8)[0] is None


def test_weights_and_tokenizer_make_the_identity_not_the_place(folder, tmp_path):
    name = folder("llama")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path(name).iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert local(str(copy)).identity == local(name).identity
    (copy / "generation_config.json").write_text("{}")
    assert local(str(copy)).identity != local(name).identity


def test_the_generator_judges_unless_a_judge_is_named(folder):
    name, other = folder("llama"), folder("t5")

    def opened(**judge):
        return open_models(WriterArguments(model_name_or_path=name, **judge), OPTIONS, lambda: False)

    generator, judge = opened()
    assert judge is generator
    generator, judge = opened(judge_model_name_or_path=other)
    assert (generator.source, judge.source) == (name, other)
    _, judge = opened(judge_model_name_or_path="m", judge_url="http://127.0.0.1:9/v1")
    assert isinstance(judge, Endpoint)
    assert judge.source == "http://127.0.0.1:9/v1#m"


def test_the_judge_s_option_is_named_in_its_errors(folder):
    args = WriterArguments(model_name_or_path=folder("llama"), judge_model_name_or_path="./nowhere")
    with pytest.raises(InputError, match=r"^judge_model_name_or_path: no such model folder"):
        open_models(args, OPTIONS, lambda: False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_name_or_path": None}, "model_name_or_path: give"),
        ({"generator_url": "localhost:8000"}, "generator_url: 'localhost:8000' is not a base URL"),
        ({"generator_url": "http://me:secret@host/v1"}, "leave user and password out"),
        ({"judge_url": "http://host/v1"}, "judge_model_name_or_path: give the model's name"),
        ({"generator_url": "http://host:abc/v1"}, "generator_url"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"request_timeout_s": 0}, "request_timeout_s: 0"),
        ({"max_retries": -1}, "max_retries: -1"),
    ],
)
def test_bad_arguments(changed, words):
    with pytest.raises(InputError) as error:
        WriterArguments(**({"model_name_or_path": "m"} | changed))
    assert words in str(error.value)
    assert "secret" not in str(error.value)
