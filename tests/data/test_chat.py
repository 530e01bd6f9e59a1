"""Conversations as transformers and TRL render, tokenize and mask them, over the templates that TRL brings."""

import json
from pathlib import Path

import datasets
import pytest
import tiny
import trl
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl.data_utils import apply_chat_template, extract_prompt

from yunque.data.arguments import DataArguments, PreferenceArguments, TemplateArguments
from yunque.data.chat import MESSAGES, _reads_parts, chat_frame, encode_conversation, pair_texts, prompt_text
from yunque.data.held_out import load_held_out
from yunque.data.instructions import load_instructions
from yunque.data.loading import load_splits
from yunque.data.mixtures import Encoding, Task, prepare_task
from yunque.data.preferences import load_preferences
from yunque.data.prompts import prepare_prompts
from yunque.data.targets import encode_continuations
from yunque.errors import InputError
from yunque.runtime.chat_template import in_parts

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKING = [
    path
    for path in sorted(TEMPLATES.glob("*_training.jinja"))
    if path.with_name(path.name.replace("_training", "")).is_file()
]
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}" + ASK
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %} {% endfor %}" + ASK
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s> [INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} </s>{% endif %}{% endfor %}"
)
WORDS = ("<user>", "<assistant>", "<system>", "[INST]", "[/INST]", "<s>")
TURNS = [("system", "w9"), ("user", "w5 w6"), ("assistant", "w20 w21"), ("user", "w7"), ("assistant", "w30")]
CHAT = [{"role": role, "content": content} for role, content in TURNS]


def letters(template):
    """A tokenizer whose tokens are bytes, so that none stands across a border."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template)


def tokenizer(template):
    return tiny.tokenizer(WORDS, chat_template=template)


def row(messages, *, train_all=True):
    return json.dumps({"prompt": messages[:-1], "answer": messages[-1:], "all": train_all})


def trained_words(tokens, template, messages=CHAT, **options):
    ids, trained = encode_conversation(tokens, row(messages, **options))
    assert ids == tokens.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    return tokens.convert_ids_to_tokens([token for token, said in zip(ids, trained, strict=True) if said])


@pytest.mark.parametrize(("template", "end"), [(PLAIN, "</s>"), (MARKED, "</s>"), (LLAMA2, "</s>")])
def test_what_the_assistant_says_trains_with_its_end(template, end):
    tokens, messages = tokenizer(template), CHAT if template is not LLAMA2 else CHAT[1:]
    assert trained_words(tokens, template, messages) == ["w20", "w21", end, "w30", end]
    assert trained_words(tokens, template, messages, train_all=False) == ["w30", end]


def test_masks_are_transformers_own_where_the_template_marks_them():
    tokens = tokenizer(MARKED)
    _, trained = encode_conversation(tokens, row(CHAT))
    marked = tokens.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    assert trained == [bool(mask) for mask in marked["assistant_masks"]]


@pytest.mark.parametrize("path", MARKING, ids=lambda path: path.stem)
def test_what_trl_s_training_templates_mark_is_found_without_marks(path):
    marked, found = (letters(each.read_text()) for each in (path, path.with_name(path.name.replace("_training", ""))))
    chat = CHAT[1:3]
    try:
        same = marked.apply_chat_template(chat, tokenize=False) == found.apply_chat_template(chat, tokenize=False)
        assert same
        ids, trained = encode_conversation(found, row(chat))
    except (AssertionError, InputError, TemplateError):
        pytest.skip("it takes no such chat, writes another text, or more before a generated answer")
    again, expected = encode_conversation(marked, row(chat))
    assert again == ids
    given = len(found.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"])
    missed = [place for place, wanted in enumerate(expected) if wanted and not trained[place]]
    assert all(place < given for place in missed)  # some mark the end of the prompt too
    extra = found.decode([token for token, said, wanted in zip(ids, trained, expected, strict=True) if said > wanted])
    assert not {"w5", "w6", "user"} & set(extra.split())  # a line break, an empty thought, an end that is not marked


def test_a_template_that_rewrites_answers_or_has_other_prompts_is_refused():
    kept = "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
    rewrites = "{% for m in messages %}{{ m.role }} " + kept + " {% endfor %}"
    with pytest.raises(InputError, match="chat_template: the template writes answer 1 otherwise when more turns"):
        encode_conversation(tokenizer(rewrites), row(CHAT))
    thinks = PLAIN.replace("<assistant>{% endif %}", "<assistant> w60 {% endif %}")
    with pytest.raises(InputError, match="something else before an answer"):
        encode_conversation(tokenizer(thinks), row(CHAT))
    with pytest.raises(InputError, match="chat_template: the tokenizer has none"):
        encode_conversation(tiny.tokenizer(), row(CHAT))


def test_a_space_before_an_answer_is_the_answer_s():
    assert chat_frame(tokenizer(LLAMA2), None).beginning == " "
    assert chat_frame(tokenizer(PLAIN), None).beginning == " "


def spaced(template):
    """A tokenizer that puts a space before every piece of text between special tokens, as Llama 2's."""
    vocabulary = {
        token: number for number, token in enumerate(["<unk>", "</s>", "<s>", *map(chr, range(33, 127)), "▁"])
    }
    inner = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template=template)


@pytest.mark.parametrize("kind", [letters, spaced])
@pytest.mark.parametrize("path", [None, *sorted(TEMPLATES.glob("*.jinja"))], ids=lambda path: path and path.stem)
def test_texts_train_on_the_template_s_own_tokens(kind, path):
    tokens = kind(LLAMA2 if path is None else path.read_text())
    try:
        frame = chat_frame(tokens, None)
    except InputError:
        pytest.skip("it writes more before an answer than before a generated one")
    for text, answer in [("Hello", "Fine."), ("Hello\n", "Fine."), ("  Hello", " Fine. "), ("Hello ", "Fine.\n")]:
        rows = datasets.Dataset.from_dict({"text": [text], "references": [[answer]]})
        rows = frame.wrap(rows, "{text}")
        prompts = prepare_prompts(rows, tokens, DataArguments("x"), append_eos=False, special_tokens=False).dataset
        encoded, _ = encode_continuations(prompts, tokens, 64, [tokens.eos_token_id], frame)
        chat = in_parts([{"role": "user", "content": text}, {"role": "assistant", "content": answer}])
        if not _reads_parts(tokens, tokens.chat_template):
            chat = [{**turn, "content": turn["content"][0]["text"]} for turn in chat]
        prompt = tokens.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert prompts["query"][0] == prompt
        whole = tokens.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
        found = encoded["input_ids"][0]
        assert found == whole if tokens.eos_token_id in whole[-3:] else found[:-1] == whole


def test_white_space_inside_a_prompt_template_stays():
    frame = chat_frame(tokenizer(LLAMA2), None)
    rows = frame.wrap(datasets.Dataset.from_dict({"text": [" a "]}), " Sum: {text} = ")
    assert (rows[0]["head"], rows[0]["text"], rows[0]["tail"]) == ("<s> [INST] Sum: ", " a ", " = [/INST]")


@pytest.mark.parametrize("name", ["smolvlm", "smolvlm_training", "idefics3", "llava_next"])
def test_templates_of_parts_keep_the_words(name):
    tokens, chat = letters((TEMPLATES / f"{name}.jinja").read_text()), CHAT[1:3]
    ids, trained = encode_conversation(tokens, row(chat))
    assert ids == tokens.apply_chat_template(in_parts(chat), tokenize=True, return_dict=True)["input_ids"]
    assert "w5 w6" in tokens.decode(ids)
    assert "w20 w21" in tokens.decode([token for token, said in zip(ids, trained, strict=True) if said])


def test_templates_of_texts_take_lists_of_parts():
    tokens = tokenizer(PLAIN)
    assert encode_conversation(tokens, row(in_parts(CHAT))) == encode_conversation(tokens, row(CHAT))


def test_a_template_without_the_user_s_words_is_refused():
    with pytest.raises(InputError, match="chat_template: its chat template leaves out what a user says"):
        encode_conversation(tokenizer("{% for m in messages %}{{ m.role }}{% endfor %}"), row(CHAT))


# --- data sets --------------------------------------------------------------------------------------------------------


def written(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


SHARE_GPT = [{"from": "human", "value": "w5"}, {"from": "gpt", "value": "w20"}]


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": CHAT[1:3]},
        {"messages": CHAT[1:3], "summary": "w50"},
        {"conversations": SHARE_GPT},
        {"prompt": CHAT[1:2], "completion": CHAT[2:3]},
        {"prompt": CHAT[1:2], "completion": "w20 w21"},
    ],
    ids=["messages", "messages beside another column", "ShareGPT", "prompt and completion", "completion as text"],
)
def test_formats_of_conversations_become_prompts_and_labels(columns, tmp_path):
    name = written(tmp_path, [{**columns, "id": number} for number in range(6)])
    args, tokens = DataArguments(dataset_name=name, test_size=0.4, max_train_samples=None), tokenizer(PLAIN)
    task = prepare_task(Task("test", args, TemplateArguments()), tokens, Encoding(False, 60, 8, [1]), 0)
    (first, *_) = task.train
    said = tokens.convert_ids_to_tokens([label for label in first["labels"] if label != -100])
    assert said in (["w20", "w21", "</s>"], ["w20", "</s>"])
    assert task.test["references"][0] in (["w20 w21"], ["w20"])
    assert task.test["query"][0].endswith("</s> <assistant>")
    assert "conversations: " in task.report


def test_prompts_of_messages_are_the_template_s(tmp_path):
    name = written(tmp_path, [{"dialogue": CHAT[1:4], "summary": "w9"}] * 5)
    args, tokens = DataArguments(dataset_name=name, test_size=0.4), tokenizer(PLAIN)
    prepared = prepare_prompts(load_splits(args, 0).train, tokens, args, append_eos=False)
    expected = tokens.apply_chat_template(CHAT[1:4], tokenize=False, add_generation_prompt=True)
    assert prepared.dataset["query"][0] == expected
    assert prepared.dataset["input_ids"][0] == tokens(expected, add_special_tokens=False)["input_ids"]
    short = DataArguments(dataset_name=name, test_size=0.4, max_prompt_length=3)
    with pytest.raises(InputError, match="max_prompt_length: no conversation has at most 3 tokens"):
        prepare_prompts(load_splits(args, 0).train, tokens, short)


def test_held_out_conversations_keep_their_last_answer_as_reference(tmp_path):
    rows = [{"messages": CHAT}, {"messages": CHAT[:4]}]
    args = DataArguments(dataset_name=written(tmp_path, rows))
    found = load_held_out(args, split=None, max_rows=None, id_column=None)
    assert (found.texts, found.references, found.notes[:1]) == (["w7", "w7"], [["w30"], []], [])
    tokens = tokenizer(PLAIN)
    expected = tokens.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)
    assert [prompt_text(tokens, row) for row in found.messages] == [expected] * 2


@pytest.mark.parametrize("explicit", [True, False])
def test_pairs_of_messages_are_trl_s_texts(explicit, tmp_path):
    prompt, chosen, rejected = CHAT[1:4], CHAT[4:], [{"role": "assistant", "content": "w40"}]
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    other = {
        "prompt": [{"role": "user", "content": "w8"}],
        "chosen": [{"role": "assistant", "content": "w9"}],
        "rejected": [{"role": "assistant", "content": "w10"}],
    }
    if not explicit:
        other = {name: [*other["prompt"], *other[name]] for name in ("chosen", "rejected")}
        pair = {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}
    data = load_preferences(PreferenceArguments(dataset_name=written(tmp_path, [pair, other] * 3), test_size=0.4), 0)
    tokens = tokenizer(PLAIN)
    kept = next(rows for rows in (data.train, data.test) if rows["chosen"][0] == "w30")
    ours = pair_texts(tokens, kept[MESSAGES][0])
    theirs = apply_chat_template(pair if explicit else extract_prompt(pair), tokens)
    assert ours == {name: theirs[name] for name in ("prompt", "chosen", "rejected")}
    assert kept["rejected"][0] == "w40"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "user"}, {"role": "assistant", "content": "w5"}], "row 1 .*message 1 has no role or no content"),
        ([{"role": "user", "content": "w5"}], "row 1 .*does not end with an answer of the assistant"),
        ([{"role": "assistant", "content": "w5"}], "row 1 .*does not end with an answer of the assistant to a message"),
        ([{"role": "user", "content": "w5"}, {"role": "assistant", "content": None}], "message 2 has no role or no"),
    ],
)
def test_bad_conversations_are_named(messages, words, tmp_path):
    args = DataArguments(dataset_name=written(tmp_path, [{"messages": messages}] * 3))
    with pytest.raises(InputError, match=f"text_column: 'messages', {words}" if "row" in words else words):
        load_splits(args, 0)


def test_messages_bring_their_own_system_prompt(tmp_path):
    args = DataArguments(dataset_name=written(tmp_path, [{"messages": CHAT}] * 3))
    with pytest.raises(InputError, match="system_prompt: messages bring their own"):
        load_instructions(args, TemplateArguments(chat_template=True, system_prompt="w9"), 0)
