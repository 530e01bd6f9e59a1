import json

import pytest

from yunque.serving.chat import ChatFormat, ChatRefused, read_chat_format
from yunque.serving.schemas import Message

TEMPLATE = """{{ bos_token }}{% for message in messages %}
{%- if loop.index0 > 3 %}{% break %}{% endif %}
<|{{ message.role }}|>{{ message['content'] | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


def messages(*turns):
    return [Message(role=role, content=content) for role, content in turns]


def folder(tmp_path, template, **config):
    content = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", **config}
    if template is not None:
        content["chat_template"] = template
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    return tmp_path


def test_the_template_is_rendered_as_transformers_does(tmp_path):
    import tiny
    from transformers import PreTrainedTokenizerFast  # torch is not needed for it

    turns = messages(("system", "be kind"), ("user", " hi {{ 7 * 7 }} "), ("assistant", "ho"), ("user", "<b>&"))
    tokenizer = tiny.tokenizer(bos_token="<s>", chat_template=TEMPLATE)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.content} for turn in turns], tokenize=False, add_generation_prompt=True
    )
    rendered = read_chat_format(tmp_path, "auto")
    assert rendered.render(turns) == expected
    assert "{{ 7 * 7 }}" in expected  # what a user writes is never a template
    assert not rendered.adds_special_tokens


def test_plain_form():
    plain = ChatFormat()
    assert plain.render(messages(("user", "Summarize: a"))) == "Summarize: a"
    assert plain.render(messages(("developer", "Be brief."), ("user", "a"))) == "Be brief.\n\na"
    long = messages(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert plain.render(long) == "Be brief.\n\nUser: a\nAssistant: b\nUser: c\nAssistant:"
    assert plain.adds_special_tokens


def test_choice_of_the_form(tmp_path):
    assert read_chat_format(folder(tmp_path, None), "auto") == ChatFormat()
    assert read_chat_format(folder(tmp_path, None), "off") is None
    assert read_chat_format(folder(tmp_path, TEMPLATE), "plain").template is None
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert read_chat_format(folder(tmp_path, named), "off").render(messages(("user", "x"))) == "x"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",  # the way out of a template that is not in a sandbox
        "{{ messages.append(1) }}",
        "{{ 1 / 0 }}",
        "{{ messages[99].content.x }}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_a_template_may_refuse_but_do_no_harm(tmp_path, template):
    with pytest.raises(ChatRefused):
        read_chat_format(folder(tmp_path, template), "auto").render(messages(("user", "x")))


@pytest.mark.parametrize(
    ("template", "reason"), [("{% for %}", "is not valid"), ("{{ bos_token }}Answer:", "leaves out what a user says")]
)
def test_a_broken_template_costs_chats_and_not_the_server(tmp_path, template, reason):
    assert reason in read_chat_format(folder(tmp_path, template), "auto").broken
    assert read_chat_format(folder(tmp_path, template), "plain").broken is None
