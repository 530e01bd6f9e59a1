"""Instruction rows, several phrasings, chat templates, labels of decoder-only models, mixtures."""

import datasets
import pytest
import tiny

from yunque.data.arguments import DataArguments, MixtureArguments, TemplateArguments
from yunque.data.chat import chat_frame
from yunque.data.instructions import frame, load_instructions
from yunque.data.mixtures import Encoding, Task, mix, prepare_task, prompt_template_of, tasks_of
from yunque.data.targets import encode_continuations, pack
from yunque.errors import InputError

ROWS = [
    {"instruction": f"tell {number}", "input": "" if number % 2 else f"about {number}", "output": f"done {number}"}
    for number in range(40)
]
CHAT = "{% for turn in messages %}<{{ turn['role'] }}> {{ turn['content'] }} </s> {% endfor %}"
GENERATION = "{% if add_generation_prompt %}<assistant> {% endif %}"


def load(path, *templates, seed=0, **options):
    args = DataArguments(dataset_name=str(path), target_column="output", **options)
    return load_instructions(args, TemplateArguments(prompt_templates=list(templates)), seed)


def prompts(rows):
    return [row["head"] + row["text"] + row["tail"] for row in rows]


def test_an_empty_input_leaves_its_section_out(write_jsonl):
    texts = prompts(load(write_jsonl("rows.jsonl", ROWS), "instruction_es").train)
    with_input = [text for text in texts if "### Entrada:" in text]
    assert 0 < len(with_input) < len(texts)
    assert with_input[0] == "### Instrucción:\ntell 0\n\n### Entrada:\nabout 0\n\n### Respuesta:\n"
    assert "### Instrucción:\ntell 1\n\n### Respuesta:\n" in texts


def test_the_longest_value_is_the_one_that_may_be_cut():
    values = {"instruction": "be brief", "input": "a very long story"}
    assert frame("{instruction}: {input}!", values) == ("be brief: ", "a very long story", "!")
    assert frame("{instruction}", {"instruction": ""}) is None


def test_braces_in_a_value_are_its_own():
    values = {"instruction": "use {input} and {x}", "input": "y"}
    assert frame("{input} {instruction}", values) == ("y ", "use {input} and {x}", "")


def test_phrasings_are_drawn_by_seed_and_row(write_jsonl):
    path = write_jsonl("rows.jsonl", ROWS)
    phrasings = ("first {instruction}", "second {instruction}", "third {instruction}")
    drawn = prompts(load(path, *phrasings).train)
    assert {text.split()[0] for text in drawn} == {"first", "second", "third"}
    assert drawn == prompts(load(path, *phrasings).train)
    assert drawn != prompts(load(path, *phrasings, seed=1).train)
    # of other rows beside it a row's phrasing knows nothing
    assert set(prompts(load(path, *phrasings, max_train_samples=5).train)) <= set(drawn)


def test_text_stands_for_the_text_column(write_jsonl):
    rows = load(write_jsonl("rows.jsonl", ROWS), "Sum up: {text}", text_column="instruction").train
    assert prompts(rows)[0] == "Sum up: tell 0"


def test_a_placeholder_that_is_no_column_is_refused(write_jsonl):
    with pytest.raises(InputError, match=r"prompt_templates: no column 'context'.*instruction, input, output"):
        load(write_jsonl("rows.jsonl", ROWS), "{context}")


@pytest.mark.parametrize("templates", [["Answer:"], ["{instruction}", "no place"], []])
def test_a_template_without_placeholder_is_refused(templates):
    with pytest.raises(InputError, match="prompt_templates: "):
        TemplateArguments(prompt_templates=templates)


def test_labels_of_prompt_tokens_do_not_count():
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6, 7], [8]], "references": [["w9 w10"], ["w11"]]})
    encoded, _ = encode_continuations(rows, tiny.tokenizer(), 8, [1])
    assert encoded["input_ids"] == [[5, 6, 7, 9, 10, 1], [8, 11, 1]]
    assert encoded["labels"] == [[-100, -100, -100, 9, 10, 1], [-100, 11, 1]]


def test_a_cut_answer_keeps_its_end():
    rows = datasets.Dataset.from_dict({"input_ids": [[5]], "references": [["w9 w10 w11 w12"]]})
    encoded, report = encode_continuations(rows, tiny.tokenizer(), 3, [1])
    assert encoded["labels"] == [[-100, 9, 10, 1]]
    assert report.endswith("cut to 3 tokens: 1 (2 tokens lost)")


def test_packing_keeps_every_label():
    rows = datasets.Dataset.from_dict(
        {"input_ids": [[5, 6, 1], [7, 1], [8, 9, 9, 1]], "labels": [[-100, 6, 1], [-100, 1], [-100, 9, 9, 1]]}
    )
    packed, _ = pack(rows, 5)
    assert sorted(length for lengths in packed["seq_lengths"] for length in lengths) == [2, 3, 4]
    assert max(sum(lengths) for lengths in packed["seq_lengths"]) <= 5
    labels = sorted(label for row in packed["labels"] for label in row)
    assert labels == sorted(label for row in rows["labels"] for label in row)
    with pytest.raises(InputError, match="packing_length: a sequence has 4 tokens"):
        pack(rows, 3)


def chat_tokenizer(template):
    tokenizer = tiny.tokenizer(("<user>", "<system>", "<assistant>"))
    tokenizer.chat_template = template
    return tokenizer


def test_the_chat_template_is_taken_apart():
    frame = chat_frame(chat_tokenizer(CHAT + GENERATION), "be kind")
    assert (frame.head, frame.tail) == ("<system> be kind </s> <user> ", " </s> <assistant> ")
    assert frame.ending == " </s> "


def test_a_chat_answer_ends_as_the_template_says(write_jsonl):
    path = write_jsonl("rows.jsonl", [{"instruction": f"w{number}", "output": "w9 w10"} for number in range(20, 30)])
    args = DataArguments(dataset_name=str(path), target_column="output")
    task = Task("test", args, TemplateArguments(prompt_templates=["{instruction}"], chat_template=True))
    prepared = prepare_task(task, chat_tokenizer(CHAT + GENERATION), Encoding(False, 64, 8, [1]), 0)
    row = prepared.train[0]
    assert row["input_ids"] == [3, int(row["input_ids"][1]), 1, 5, 9, 10, 1]
    assert row["labels"] == [-100, -100, -100, -100, 9, 10, 1]


@pytest.mark.parametrize("template", [None, CHAT + "{% if add_generation_prompt %}<assistant> think {% endif %}"])
def test_a_chat_template_that_does_not_fit_is_refused(template):
    with pytest.raises(InputError, match="chat_template: "):
        chat_frame(chat_tokenizer(template), None)


def rows_of(value, count):
    return datasets.Dataset.from_dict({"input_ids": [[value]] * count, "labels": [[value]] * count})


def test_a_mixture_follows_its_weights():
    parts = [rows_of(1, 30), rows_of(2, 10)]
    values = [ids[0] for ids in mix(parts, [1, 3], 0)["input_ids"]]
    assert (values.count(1), values.count(2)) == (10, 30)
    values = [ids[0] for ids in mix(parts, [None, None], 0)["input_ids"]]
    assert (values.count(1), values.count(2)) == (30, 10)


def test_the_old_task_has_a_name_of_its_own():
    with pytest.raises(InputError, match="old_task: 'a' is also"):
        MixtureArguments(mixture=['{"name": "a"}'], old_task='{"name": "a"}')


def test_a_task_differs_from_the_run_where_it_says():
    run = DataArguments(dataset_name="here", target_column="output")
    phrased = TemplateArguments(prompt_templates=["{instruction}"])
    mixture = MixtureArguments(
        mixture=['{"name": "a"}', '{"name": "b", "dataset_name": "b", "prompt_template": "{text}"}']
    )
    first, second = tasks_of(run, phrased, mixture)
    assert (first.data, first.templates) == (run, phrased)
    assert (second.data.dataset_name, second.data.target_column) == ("b", "output")
    assert second.templates.prompt_templates is None
    assert prompt_template_of([first]) == "{instruction}"
    assert prompt_template_of([first, second]) is None


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (["{"], "not a JSON object"),
        (['{"weight": 1}'], "a name"),
        (['{"name": "a"}', '{"name": "a"}'], "name of its own"),
        (['{"name": "a", "weight": 0}'], "not positive"),
        (['{"name": "a", "weight": 1}', '{"name": "b"}'], "some have none"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(tasks, words):
    with pytest.raises(InputError, match=words):
        MixtureArguments(mixture=tasks)
