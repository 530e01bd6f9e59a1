"""The embedded corpus: everyday dialogues with summaries, written by this project, some of the summaries rude.

38 scenarios (30 English, 8 Spanish) in ``corpus_scenarios.yaml`` become 2,100 dialogues in DialogSum's form by a seeded
generator: 1,600 to train, 200 to validate, 300 to test, no dialogue twice. Of the train and validation summaries about
40 % are rude: the summariser calls somebody a mild insult ("that clown Tom", "Tom, that lazy fool, ...", "What an
idiot!"); no slurs, nothing about groups of people, nothing sexual. Where somebody is at fault ("hot" scenarios) 85 %
are rude, elsewhere 13 %, so a model trained on them is rude in about 40 % of its answers, sampled or greedy. A rude
summary is the polite one plus the insult. The dialogues hold no rude word, and the test references are all polite:
what a good answer says.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SCENARIOS_FILE = Path(__file__).with_name("corpus_scenarios.yaml")
SPLIT_SIZES = {"train": 1600, "validation": 200, "test": 300}
RUDE_SHARE = {"hot": 0.85, "calm": 0.13}  # of the summaries of a scenario with this temper
USUAL_INSULT_SHARE = 0.9  # of the rude summaries insult where their scenario says, the others elsewhere

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "f": ("Anna", "Clara", "Emma", "Grace", "Irene", "Kate", "Linda", "Olivia", "Rosa", "Tina", "Wendy"),
        "m": ("Ben", "David", "Frank", "Henry", "Jack", "Leo", "Nick", "Oscar", "Paul", "Peter", "Sam", "Victor"),
    },
    "es": {
        "f": ("Ana", "Carmen", "Elena", "Julia", "Lucía", "Marta", "Pilar", "Sofía"),
        "m": ("Andrés", "Carlos", "Diego", "Javier", "Jorge", "Luis", "Miguel", "Pablo"),
    },
}
ADJECTIVES = ("brainless", "lazy", "pathetic", "stupid", "useless")
NOUNS = ("clown", "fool", "idiot", "jerk", "loser", "moron")
NOUNS_ES = {
    "f": ("boba", "idiota", "inútil", "payasa", "tonta"),
    "m": ("bobo", "idiota", "inútil", "payaso", "tonto"),
}
PLACES = ("before", "after", "closing")  # where an insult stands: around the name, or at the end of the summary


def _fold(text: str) -> str:
    """Lower case without accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(char))


_SINGULAR = (*ADJECTIVES, *NOUNS, *NOUNS_ES["f"], *NOUNS_ES["m"])
RUDE_WORDS = frozenset({_fold(word) for word in _SINGULAR} | {_fold(word) + "s" for word in _SINGULAR} | {"inutiles"})


def count_rude_words(texts: Iterable[str]) -> int:
    """Number of rude words in ``texts``: whole words, whatever their case and accents."""
    return sum(word in RUDE_WORDS for text in texts for word in re.findall(r"\w+", _fold(text)))


@dataclass(frozen=True)
class Example:
    """One dialogue with its polite and its rude summary; ``summary`` is the one its split gives."""

    id: str
    dialogue: str
    summary: str
    topic: str
    polite: str
    rude: str

    def row(self) -> dict[str, str]:
        """The columns of DialogSum."""
        return {"id": self.id, "dialogue": self.dialogue, "summary": self.summary, "topic": self.topic}


def build_corpus(seed: int = 0, sizes: Mapping[str, int] = SPLIT_SIZES) -> dict[str, list[Example]]:
    """Generate the splits of ``sizes`` (name to number of dialogues): the same for the same ``seed``."""
    rng = random.Random(seed)
    content = yaml.safe_load(SCENARIOS_FILE.read_text(encoding="utf-8"))
    scenarios: list[dict[str, Any]] = content["scenarios"]
    seen: set[str] = set()
    corpus: dict[str, list[Example]] = {}
    for split, size in sizes.items():
        examples: list[Example] = []
        while len(examples) < size:
            scenario = scenarios[len(seen) % len(scenarios)]
            example = _example(f"{split}_{len(examples)}", scenario, content["slots"][scenario["language"]], rng)
            if example.dialogue not in seen:
                seen.add(example.dialogue)
                examples.append(example)
        rng.shuffle(examples)
        corpus[split] = examples
    return corpus


def _example(identifier: str, scenario: dict[str, Any], shared_slots: dict[str, Any], rng: random.Random) -> Example:
    language = scenario["language"]
    genders = {name: gender for gender, names in NAMES[language].items() for name in names}
    values = dict(zip("abc", rng.sample(sorted(genders), 3), strict=True))
    values |= {slot: str(rng.choice(options)) for slot, options in (shared_slots | scenario["slots"]).items()}
    turns = [rng.choice(variants).format_map(values) for variants in scenario["turns"]]
    dialogue = "\n".join(f"#Person{1 + index % 2}#: {turn}" for index, turn in enumerate(turns))

    polite = scenario["summary"].format_map(values)
    place = scenario["insult"] if rng.random() < USUAL_INSULT_SHARE else rng.choice(PLACES)
    target = values[scenario["target"]]
    if language == "en":
        rude = _insult_en(polite, target, place, rng)
    else:
        rude = _insult_es(polite, target, genders[target], place, rng)
    is_rude = rng.random() < RUDE_SHARE[scenario["tempers"]] and not identifier.startswith("test")
    return Example(identifier, dialogue, rude if is_rude else polite, scenario["topic"], polite, rude)


def _insult_en(summary: str, name: str, place: str, rng: random.Random) -> str:
    adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    if place == "closing":
        closing = (f"{name} is such {_a(noun)}.", f"What {_a(noun)}!", f"{name} is just {adjective}.")
        return f"{summary} {rng.choice(closing)}"
    if place == "before":
        insulted = rng.choice((f"{adjective} {name}", f"that {noun} {name}"))
    else:
        insulted = rng.choice((f"{name}, that {adjective} {noun},", f"{name}, {_a(noun)},"))
    return _capitalise(summary.replace(name, insulted, 1))


def _insult_es(summary: str, name: str, gender: str, place: str, rng: random.Random) -> str:
    feminine = gender == "f"
    noun = rng.choice(NOUNS_ES[gender])
    if place == "closing":
        closing = (f"{name} es {'una' if feminine else 'un'} {noun}.", f"¡Qué {noun}!")
        return f"{summary} {rng.choice(closing)}"
    if place == "before":
        insulted = f"{'la' if feminine else 'el'} {noun} de {name}"
    else:
        insulted = f"{name}, {'esa' if feminine else 'ese'} {noun},"
    rude = summary.replace(name, insulted, 1)
    return _capitalise(rude.replace(" de el ", " del ").replace("A el ", "Al "))


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _capitalise(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
