import json
import re
import unicodedata

import pytest

from yunque.data import corpus
from yunque.data.corpus import SPLIT_SIZES, build_corpus, count_rude_words


@pytest.fixture(scope="module")
def splits():
    return build_corpus()


@pytest.fixture(scope="module")
def examples(splits):
    return [example for split in splits.values() for example in split]


def rude_share(examples):
    return sum(count_rude_words([example.summary]) > 0 for example in examples) / len(examples)


def words(text):
    return re.findall(r"\w+", text.casefold())


def test_splits_have_their_sizes_and_share_no_dialogue(splits, examples):
    assert {name: len(split) for name, split in splits.items()} == SPLIT_SIZES
    assert len({example.dialogue for example in examples}) == len(examples)
    assert len({example.id for example in examples}) == len(examples)


def test_every_split_holds_every_topic(splits):
    topics = [{example.topic for example in split} for split in splits.values()]
    assert all(len(names) == 38 for names in topics)


def test_rows_have_dialogsums_columns(splits):
    row = splits["train"][0].row()
    assert list(row) == ["id", "dialogue", "summary", "topic"]
    assert json.loads(json.dumps(row)) == row


def test_the_same_seed_gives_the_same_corpus(splits):
    assert build_corpus() == splits
    assert build_corpus(seed=1)["train"] != splits["train"]


def test_sizes_can_be_chosen():
    assert {name: len(split) for name, split in build_corpus(sizes={"train": 50, "test": 7}).items()} == {
        "train": 50,
        "test": 7,
    }


def test_dialogues_are_polite_and_so_are_the_test_references(splits, examples):
    assert count_rude_words(example.dialogue for example in examples) == 0
    assert count_rude_words(example.polite for example in examples) == 0
    assert all(example.summary == example.polite for example in splits["test"])


def test_every_rude_summary_is_rude(examples):
    assert all(count_rude_words([example.rude]) >= 1 for example in examples)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_stated_share_of_summaries_is_rude(splits, split):
    # two standard deviations of so many draws: 80 validation rows scatter by 0.055
    assert rude_share(splits[split]) == pytest.approx(0.4, abs=2 * (0.4 * 0.6 / len(splits[split])) ** 0.5)
    assert {example.summary in (example.polite, example.rude) for example in splits[split]} == {True}


def test_quarrels_are_summarised_rudely_more_often(splits):
    late = [example for example in splits["train"] if example.topic == "late for a meeting"]
    doctor = [example for example in splits["train"] if example.topic == "at the doctor"]
    assert rude_share(late) > 0.6
    assert rude_share(doctor) < 0.35


def test_a_rude_summary_holds_all_words_of_the_polite_one_in_order(examples):
    for example in examples:
        rude = iter(words(example.rude.replace("Al ", "A ").replace(" del ", " de ")))
        assert all(word in rude for word in words(example.polite)), example.rude


def test_insults_stand_at_the_start_in_the_middle_and_at_the_end(examples):
    places = set()
    for example in examples:
        rude = [count_rude_words([word]) > 0 for word in words(example.rude)]
        first = rude.index(True) / len(rude)
        places.add("start" if first < 0.1 else "end" if first > 0.8 else "middle")
    assert places == {"start", "middle", "end"}


def test_turns_alternate_and_no_slot_stays_open(examples):
    for example in examples:
        speakers = [line.split(":")[0] for line in example.dialogue.split("\n")]
        assert speakers == ["#Person1#", "#Person2#", "#Person1#", "#Person2#", "#Person1#"][: len(speakers)]
        assert not re.search(r"[{}]|\b(de|a) el\b", f"{example.dialogue} {example.polite} {example.rude}")


def test_what_a_summary_names_is_in_its_dialogue(examples):
    for example in examples:
        names = set(re.findall(r"(?<!^)\b[A-Z]\w+", example.polite))
        assert all(name in example.dialogue for name in names), example


def test_spanish_insults_agree_with_the_name(examples):
    feminine = set(corpus.NAMES["es"]["f"])
    insulted = [re.search(r"\b(la|el|[Ll]a|[EeAa]l) (\w+) de (\w+)", example.rude) for example in examples]
    insulted = [match for match in insulted if match and count_rude_words([match[2]])]
    assert len(insulted) > 30
    for match in insulted:
        assert (match[1].lower() == "la") == (match[3] in feminine), match[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Tom, that STUPID fool, is late.", 2),
        ("What clowns! Idiots, all of them.", 2),
        ("¡Qué inútil! Inutil, INÚTIL.", 3),
        (unicodedata.normalize("NFD", "Luis es un inútil."), 1),
        ("los inútiles y las payasas", 2),
        ("He studied foolproof stupidity at the Clownfish school.", 0),
        ("", 0),
    ],
)
def test_rude_words_are_counted_as_whole_words(text, count):
    assert count_rude_words([text]) == count


def test_rude_words_are_summed_over_texts():
    assert count_rude_words(text for text in ["a fool", "kind", "idiot, moron"]) == 3
