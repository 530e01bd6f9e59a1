"""What an exported folder reads, writes and chats is compared with transformers before the folder is there."""

import json

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from yunque.errors import CheckFailed, InputError
from yunque.export.texts import check_texts

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def saved(tmp_path):
    def save(**options):
        tokenizer = tiny.tokenizer(**options)
        tokenizer.save_pretrained(tmp_path)
        return tokenizer

    return save


def test_a_sound_folder_passes(saved, tmp_path):
    check_texts(saved(chat_template=TEMPLATE), tmp_path, chats=True)


@pytest.mark.parametrize(
    ("template", "reason"), [("{% for %}", "is not valid"), ("Answer:", "leaves out what a user says")]
)
def test_a_template_that_makes_no_prompt_is_refused(template, reason, saved, tmp_path):
    tokenizer = saved(chat_template=template)
    with pytest.raises(InputError, match=f"chat template {reason}.*chat_template.jinja, or remove it"):
        check_texts(tokenizer, tmp_path, chats=True)
    check_texts(tokenizer, tmp_path, chats=False)


def test_a_template_of_its_own_date_or_refusals_passes(saved, tmp_path):
    refuses = "{% if messages | length != 99 %}{{ raise_exception('no') }}{% endif %}"
    check_texts(saved(chat_template=refuses), tmp_path, chats=True)


def test_other_prompts_tokens_and_texts_are_found(saved, tmp_path):
    tokenizer = saved(chat_template=TEMPLATE)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE + "!")
    with pytest.raises(CheckFailed, match="renders other prompts"):
        check_texts(tokenizer, tmp_path, chats=True)
    saved(chat_template=TEMPLATE)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"normalizer": {"type": "Prepend", "prepend": "w5 "}}))
    with pytest.raises(CheckFailed, match="becomes other tokens"):
        check_texts(tokenizer, tmp_path, chats=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.save_pretrained(tmp_path)
    check_texts(tokenizer, tmp_path, chats=False)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": {"type": "Fuse"}}))
    with pytest.raises(CheckFailed, match="become another text"):
        check_texts(tokenizer, tmp_path, chats=False)
