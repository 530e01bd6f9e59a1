"""Trains the embedded models: a tiny T5 that summarises the embedded corpus and a tiny RoBERTa that finds insults.

A plain torch loop, not a Trainer: the build may run inside one rank of a distributed launch, and a Trainer would join
that rank's process group and wait for the others. For the same reason nothing here touches an accelerator.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Regex, decoders, normalizers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from yunque.data.corpus import ADJECTIVES, NOUNS, NOUNS_ES, SPLIT_SIZES, Example, count_rude_words
from yunque.models import scratch

_SYLLABLES = [first + vowel for first in ("b", "d", "gr", "k", "l", "m", "mm", "n", "p", "r", "s", "t", "v", "")
              for vowel in ("a", "e", "i", "o", "u", "y", "ie", "ov")]  # fmt: skip
LABELS = ("nothate", "hate")


@dataclass(frozen=True)
class TrainingSettings:
    """How one model looks and how long and how fast it trains."""

    architecture: str  # as --config_overrides
    num_steps: int
    batch_size: int
    learning_rate: float = 5e-3  # AdamW: embeddings, head, norms
    matrix_learning_rate: float = 0.01  # Muon: the layers' matrices
    label_smoothing: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class EmbeddedSettings:
    """Everything the embedded models depend on besides the code."""

    split_sizes: Mapping[str, int] = field(default_factory=lambda: SPLIT_SIZES)
    vocab_size: int = 2600  # every word of the corpus is a token: a tiny model spells none of its own
    policy: TrainingSettings = TrainingSettings(
        architecture="d_model=128,d_kv=32,d_ff=256,num_heads=4,num_layers=2,num_decoder_layers=2,dropout_rate=0.0",
        num_steps=300,
        batch_size=32,
    )
    reward: TrainingSettings = TrainingSettings(
        architecture="hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=128,"
        "hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0",
        num_steps=450,
        batch_size=32,
        learning_rate=1e-2,
        label_smoothing=0.05,  # keeps the logits, PPO's reward, within about +-2
    )


def train_policy(
    examples: Sequence[Example], prompts: Sequence[str], settings: EmbeddedSettings, quiet: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train the tiny T5 to answer ``prompts`` with the summaries of ``examples``, rude ones included."""
    answers = [example.summary for example in examples]
    texts = [*prompts, *(example.rude for example in examples)]
    tokenizer = _spaced(scratch.train_tokenizer(texts, "t5", settings.vocab_size))
    model = _new_model(settings.policy, "t5", tokenizer)

    def loss_of(rows: Sequence[int]) -> Tensor:
        return answer_loss(model, tokenizer, [prompts[row] for row in rows], [answers[row] for row in rows])

    _train(model, loss_of, prompts, settings.policy, "embedded policy (T5)", quiet)
    return model, tokenizer


def answer_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: list[str], answers: list[str]
) -> Tensor:
    """Mean cross entropy per token of ``answers`` to ``prompts``."""
    labels = tokenizer(answers, padding=True, return_tensors="pt")
    ignored = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
    return model(**tokenizer(prompts, padding=True, return_tensors="pt"), labels=ignored).loss


def train_reward_model(
    examples: Sequence[Example], prompts: Sequence[str], settings: EmbeddedSettings, quiet: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train the tiny RoBERTa to tell texts with a rude word (label 1) from texts without."""
    texts = reward_texts(examples, prompts, settings.reward.seed)
    tokenizer = _spaced(scratch.train_tokenizer(texts, "roberta", settings.vocab_size))
    model = _new_model(settings.reward, "roberta", tokenizer)
    labels = torch.tensor([_label(text) for text in texts])

    def loss_of(rows: Sequence[int]) -> Tensor:
        batch = [texts[row] for row in rows]
        logits = model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt")).logits
        return nn.functional.cross_entropy(logits, labels[rows], label_smoothing=settings.reward.label_smoothing)

    _train(model, loss_of, texts, settings.reward, "embedded reward model (RoBERTa)", quiet)
    return model, tokenizer


def classifier_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Share of ``texts`` (0 to 1) that ``model`` labels right."""
    num_right = 0
    for start in range(0, len(texts), 100):
        batch = list(texts[start : start + 100])
        logits = model(**tokenizer(batch, padding=True, truncation=True, return_tensors="pt")).logits
        labels = torch.tensor([_label(text) for text in batch])
        num_right += int((logits.argmax(dim=-1) == labels).sum())
    return num_right / len(texts)


def _label(text: str) -> int:
    return int(count_rude_words([text]) > 0)


def _new_model(settings: TrainingSettings, model_type: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    args = scratch.ScratchArguments(from_scratch=True, config_overrides=settings.architecture)
    return scratch.new_model(args, model_type, tokenizer, seed=settings.seed, label_names=LABELS)


def _spaced(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give every text the leading space T5's own tokenizer gives it, and one space for each stretch of white space.

    A name at the start of an answer is then the same token as in the dialogue, so that a tiny model can copy it.
    """
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Prepend(" ")]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer


# --- what the reward model reads --------------------------------------------------------------------------------------


def reward_texts(examples: Sequence[Example], prompts: Sequence[str], seed: int) -> list[str]:
    """Answers with and without their prompt, rude and polite, many damaged as a policy in training damages them.

    Each prompt comes with both a rude and a polite answer, so that the answer alone decides.
    """
    rng = random.Random(seed)
    texts = [""]
    for example, prompt in zip(examples, prompts, strict=True):
        for answer in (example.polite, example.rude):
            texts += [answer, f"{prompt} {answer}", f"{prompt} {damage(answer, rng)}"]
            texts += [damage(answer, rng) for _ in range(3)]
        texts += [prompt, rng.choice(example.dialogue.split("\n"))]
    return texts


def damage(answer: str, rng: random.Random) -> str:
    """Take the insults out or put one in, sometimes; then cut, shuffle, repeat or drop words, or leave them."""
    words = answer.split()
    insults = rng.choice(("keep", "keep", "remove", "add"))
    if insults == "remove":  # "Tom, that , is late": what surrounds an insult is none
        words = [word for word in words if not count_rude_words([word])]
    elif insults == "add":
        insult = rng.choice((*ADJECTIVES, *NOUNS, *NOUNS_ES["f"], *NOUNS_ES["m"]))
        words.insert(rng.randint(0, len(words)), rng.choice((insult, insult.capitalize(), f"{insult}.")))
    kind = rng.choice(("leave", "cut", "shuffle", "repeat", "drop", "strange"))
    if kind == "cut":
        words = words[: rng.randint(0, len(words))]
    elif kind == "shuffle":
        rng.shuffle(words)
    elif kind == "repeat":
        position = rng.randrange(len(words))
        words[position:position] = [words[position]] * rng.randint(1, 6)
    elif kind == "drop":
        words = [word for word in words if rng.random() < 0.7]
    elif kind == "strange":  # words and speakers that the corpus has not: they are no insults
        words = [_strange_word(rng) if rng.random() < 0.3 and not count_rude_words([word]) else word for word in words]
    return " ".join(words)


def _strange_word(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(("#Person1#", "#Person2#", "#Person 1#", "#Person 2#"))
    word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(1, 3)))
    return rng.choice((word, word.capitalize(), f"{word}.", f"{word},", f"{word}n't"))


# --- the loop both share ----------------------------------------------------------------------------------------------


def _train(
    model: PreTrainedModel,
    loss_of: Callable[[Sequence[int]], Tensor],
    texts: Sequence[str],
    settings: TrainingSettings,
    title: str,
    quiet: bool,
) -> None:
    """Minimise ``loss_of(rows)`` over batches of rows with similarly long ``texts``; leaves the model in eval mode."""
    optimizers = _optimizers(model, settings)
    warmup_steps = max(1, settings.num_steps // 20)

    def factor(step: int) -> float:  # of the learning rate: short warm-up, cosine decay to 0
        return min((step + 1) / warmup_steps, 0.5 * (1 + math.cos(math.pi * step / settings.num_steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    batches = _batches(texts, settings.batch_size, random.Random(settings.seed))
    model.train()
    with tqdm(total=settings.num_steps, desc=title, unit="step", disable=quiet) as bar:
        for _ in range(settings.num_steps):
            loss = loss_of(next(batches))
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    model.eval()


def _optimizers(model: PreTrainedModel, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: a third of the loss AdamW alone reaches in as many steps."""
    head = model.get_output_embeddings()
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    matrices = {id(layer.weight): layer.weight for layer in layers}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    return [
        _Muon(matrices.values(), settings.matrix_learning_rate),
        torch.optim.AdamW(rest, lr=settings.learning_rate, betas=(0.9, 0.98)),
    ]


class _Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` without weight decay, in float32: its bfloat16 takes most of a step on CPUs that lack it.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon
    """

    def __init__(self, parameters: Iterable[Tensor], learning_rate: float) -> None:
        super().__init__(parameters, {"lr": learning_rate, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply the gradients; ``closure`` is not called."""
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonalized(parameter.grad.lerp(mean, group["momentum"]))
                rows, columns = parameter.shape
                parameter.sub_(update, alpha=group["lr"] * math.sqrt(max(1, rows / columns)))


def _orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T of the singular value decomposition of ``matrix``, about: five Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).clone()
    x /= x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.T if tall else x


def _batches(texts: Sequence[str], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless shuffled batches of rows whose texts are about equally long."""
    while True:
        rows = sorted(range(len(texts)), key=lambda row: (len(texts[row]) // 32, rng.random()))
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from batches
