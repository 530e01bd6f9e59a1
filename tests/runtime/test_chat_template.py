"""Every chat template that TRL and transformers bring, rendered as transformers renders it."""

from pathlib import Path

import pytest
import tiny
import transformers
import trl

from yunque.runtime.chat_template import TemplateFailed, read_chat_template

SHIPPED = sorted(path for package in (trl, transformers) for path in Path(package.__file__).parent.rglob("*.jinja"))
CHATS = [
    [("user", "hi there")],
    [("system", "be kind"), ("user", "hi")],
    [("user", " a "), ("assistant", "b "), ("user", "c")],
    [("system", "s"), ("user", "q"), ("assistant", "<think>\nx\n</think>\n\nyes"), ("user", "é日 <b>&")],
]
GENERATION = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
)
TOOLS = "{% if tools is not none %}{{ tools | length }}{% endif %}{{ documents is none }}{{ messages[0].content }}"
PARTS = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
SYSTEM_FIRST = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + PARTS
UPPER = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
SCOPE = (
    "{% for m in messages %}{% generation %}{% set seen = 'inside' %}{{ loop.index }}{{ m.content }}"
    "{% endgeneration %}{{ seen }}{% endfor %}"
)
MISSING = "{{ bos_token }}{% if cls_token is defined %}x{% endif %}{{ messages[0].content }}{{ unknown }}"


def rendered(source, folder, **tokens):
    """Prompts of all chats by transformers and by ours; None where a template refuses one."""
    tokenizer = tiny.tokenizer(bos_token="<s>", chat_template=source, **tokens)
    tokenizer.save_pretrained(folder)
    template = read_chat_template(folder)
    for chat in CHATS:
        turns = [{"role": role, "content": content} for role, content in chat]
        parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
        try:
            theirs = tokenizer.apply_chat_template(
                parts if template.parts else turns, tokenize=False, add_generation_prompt=True
            )
        except Exception:
            theirs = None
        try:
            ours = template.render(turns)
        except TemplateFailed:
            ours = None
        yield theirs, ours


def test_there_are_templates():
    assert len(SHIPPED) > 20


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_template_gives_transformers_prompts(path, tmp_path):
    pairs = [*rendered(path.read_text(encoding="utf-8"), tmp_path)]
    assert [ours for _, ours in pairs] == [theirs for theirs, _ in pairs]
    assert any(theirs for theirs, _ in pairs)


@pytest.mark.parametrize("source", [GENERATION, TOOLS, PARTS, MISSING], ids=["generation", "tools", "parts", "missing"])
def test_what_templates_are_given_is_what_transformers_gives(source, tmp_path):
    pairs = [*rendered(source, tmp_path)]
    assert [ours for _, ours in pairs] == [theirs for theirs, _ in pairs]
    assert "hi there" in pairs[0][1]


@pytest.mark.parametrize("source", [SYSTEM_FIRST, UPPER, SCOPE], ids=["system first", "upper case", "scope"])
def test_no_template_loses_words_or_keeps_what_a_block_sets(source, tmp_path):
    pairs = [*rendered(source, tmp_path)]
    assert [ours for _, ours in pairs] == [theirs for theirs, _ in pairs]
    assert "be kind" in pairs[1][1].lower()


@pytest.mark.parametrize("given", ["attribute", "extra_special_tokens"])
def test_templates_get_a_model_s_own_named_tokens(given, tmp_path):
    source = "{{ image_token }}{{ messages[-1].content }}"
    tokens = {"image_token": "</s>"}
    pairs = [*rendered(source, tmp_path, **(tokens if given == "attribute" else {given: tokens}))]
    assert [ours for _, ours in pairs] == [theirs for theirs, _ in pairs]
    assert pairs[0][1] == "</s>hi there"
