"""Answers on the command line: those of plain transformers, whatever kind of folder gives them."""

import shutil

import pytest
import tiny
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from yunque import artifacts
from yunque.cli import app
from yunque.errors import InputError

CHAT = (
    "{% for m in messages %}{{ 'w4' if m.role == 'user' else 'w5' if m.role == 'assistant' else 'w6' }} "
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}w5{% endif %}"
)


def said(*words, given=None):
    done = CliRunner().invoke(app, [*map(str, words), "--max_new_tokens", "8"], input=given)
    if done.exception:
        raise done.exception
    return done.stdout.splitlines()


def of_transformers(model, prompt, **options):
    ids = torch.tensor([tiny.tokenizer()(prompt, add_special_tokens=False).input_ids])
    torch.manual_seed(0)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, **options)[0]
    start = 1 if model.config.is_encoder_decoder else ids.shape[1]
    return tiny.tokenizer().decode(tokens[start:], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["t5_untied", "llama"])
@pytest.mark.parametrize("kind", ["source", "folder"])
def test_greedy_answers_are_those_of_transformers(name, kind, exported, prompts):
    model = exported(name)
    expected = [of_transformers(model.model, prompt, do_sample=False) for prompt in prompts[:4]]
    assert len(set(expected)) > 1
    assert said("generate", getattr(model, kind), *prompts[:4]) == expected
    assert said("generate", getattr(model, kind), given="\n".join(prompts[:4])) == expected


def test_samples_are_those_of_transformers(exported, prompts):
    model = exported("llama")
    wanted = of_transformers(model.model, prompts[0], do_sample=True, temperature=0.8, top_k=20, top_p=0.9)
    options = ("--temperature", "0.8", "--top_k", "20", "--top_p", "0.9")
    assert said("generate", model.source, prompts[0], *options) == [wanted]
    assert said("generate", model.source, prompts[0], *options, "--seed", "1") != [wanted]
    one, again, other = (said("generate", model.folder, prompts[0], *options, "--seed", seed) for seed in (1, 1, 2))
    assert one == again != other


def test_a_decoder_s_prompt_does_not_end(exported, tmp_path, prompts):
    model = exported("llama")
    shutil.copytree(model.source, tmp_path / "llama")
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save_pretrained(tmp_path / "llama")
    assert said("generate", tmp_path / "llama", prompts[0]) == [
        of_transformers(model.model, prompts[0], do_sample=False)
    ]


@pytest.fixture
def trained(exported, tmp_path):
    """Copy a folder with a manifest that says how it was trained."""

    def make(name, **config):
        source = exported(name).source
        config = {"prompt_template": "w9 {text} w8"} | config

        def write(staging):
            shutil.copytree(source, staging, dirs_exist_ok=True)
            (staging / "chat_template.jinja").write_text(CHAT)

        template = config["prompt_template"]
        artifacts.save_model_folder(
            tmp_path / name, write, stage="finetune", parents=(), prompt_template=template, config=config
        )
        return tmp_path / name, exported(name).model

    return make


def test_a_text_goes_into_the_prompt_of_the_training(trained, prompts):
    folder, model = trained("llama")
    wanted = of_transformers(model, f"w9 {prompts[0]} w8", do_sample=False)
    assert wanted != of_transformers(model, prompts[0], do_sample=False)
    assert said("generate", folder, prompts[0]) == [wanted]
    assert said("generate", folder, prompts[0], "--raw") == [of_transformers(model, prompts[0], do_sample=False)]


def test_that_prompt_may_be_a_chat(trained, prompts):
    folder, model = trained("llama", chat_template=True, system_prompt="w20")
    wanted = of_transformers(model, f"w6 w20 w4 w9 {prompts[0]} w8 w5", do_sample=False)
    assert said("generate", folder, prompts[0]) == [wanted]


def test_a_chat_remembers_until_an_empty_line(trained):
    folder, model = trained("llama")
    first = of_transformers(model, "w6 w7 w4 w10 w11 w5", do_sample=False)
    second = of_transformers(model, f"w6 w7 w4 w10 w11 w5 {first} w4 w12 w5", do_sample=False)
    assert first != second
    found = said("chat", folder, "--system_prompt", "w7", given="w10 w11\nw12\n\nw10 w11\n")
    assert found == [first, second, first]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("generate", "./nothing", "w3"), r"model_name_or_path: .*nothing"),
        (("generate", "{llama}"), "prompts: give a text, or lines on standard input"),
        (("generate", "{llama}", "w3", "--top_p", "2", "--temperature", "1"), r"top_p: 2.0 is not possible"),
        (("chat", "{llama}"), "its tokenizer has no chat template; use yunque generate"),
        (("generate", "{roberta}", "w3"), "a classifier makes no text; give a language model"),
    ],
)
def test_bad_input_is_one_line(words, line, exported):
    places = {"llama": exported("llama").source, "roberta": exported("roberta").folder}
    with pytest.raises(InputError, match=line):
        said(*(word.format(**places) for word in words), given="")
