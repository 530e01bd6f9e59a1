"""Trains the embedded models: a tiny T5 that summarises the embedded corpus and a tiny RoBERTa that finds insults.

A plain torch loop, not a Trainer: the build may run inside one rank of a distributed launch, and a Trainer would join
that rank's process group and wait for the others. For the same reason nothing here touches an accelerator.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from yunque.data.corpus import ADJECTIVES, NOUNS, NOUNS_ES, Example, count_rude_words

PAD, EOS, UNK, BOS = "<pad>", "</s>", "<unk>", "<s>"
MAX_LENGTH_TOKENS = 512
LABELS = {0: "nothate", 1: "hate"}
IGNORED = -100  # the label cross entropy skips


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how fast one model trains."""

    num_steps: int
    batch_size: int
    learning_rate: float
    label_smoothing: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class EmbeddedSettings:
    """Everything the embedded models depend on besides the corpus and the code."""

    vocab_size: int = 1600
    policy_width: int = 128
    policy_layers: int = 2
    policy: TrainingSettings = TrainingSettings(num_steps=800, batch_size=32, learning_rate=2e-3)
    reward_width: int = 64
    reward_layers: int = 2
    reward: TrainingSettings = TrainingSettings(
        num_steps=600, batch_size=64, learning_rate=2e-3, label_smoothing=0.05, seed=1
    )


# --- tokenizers -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train the BPE both models share: punctuation stands alone, so that names and insults are single tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNK))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex(r"[.,:;!?¡¿]"), "isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    alphabet = [chr(code) for code in range(33, 127)]  # other users' English has all of ASCII
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, UNK, BOS],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def policy_tokenizer(trained: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as T5 expects it: every text ends with eos."""
    return _wrap(trained, f"$A {EOS}", {})


def reward_tokenizer(trained: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as RoBERTa expects it: every text begins with the token the classifier reads."""
    return _wrap(trained, f"{BOS} $A {EOS}", {"bos_token": BOS, "cls_token": BOS, "sep_token": EOS})


def _wrap(trained: Tokenizer, template: str, special: dict[str, str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(trained.to_str())
    tokens = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=MAX_LENGTH_TOKENS,
        **special,
    )


# --- policy -----------------------------------------------------------------------------------------------------------


def train_policy(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    settings: EmbeddedSettings,
    prompt_template: str,
    quiet: bool,
) -> T5ForConditionalGeneration:
    """Train the tiny T5 to write the summaries of ``examples``, rude ones included."""
    torch.random.default_generator.manual_seed(settings.policy.seed)
    model = _new_policy(tokenizer, settings)
    prompts = tokenizer([prompt_template.format(text=example.dialogue) for example in examples])["input_ids"]
    targets = tokenizer([example.summary for example in examples])["input_ids"]

    def loss_of(rows: Sequence[int]) -> Tensor:
        input_ids = _pad([prompts[row] for row in rows], tokenizer.pad_token_id)
        labels = _pad([targets[row] for row in rows], IGNORED)
        mask = (input_ids != tokenizer.pad_token_id).long()
        return model(input_ids=input_ids, attention_mask=mask, labels=labels).loss

    lengths = [len(prompt) for prompt in prompts]
    _train(model, loss_of, lengths, settings.policy, "embedded policy (tiny T5)", quiet)
    return model


def _new_policy(tokenizer: PreTrainedTokenizerFast, settings: EmbeddedSettings) -> T5ForConditionalGeneration:
    width = settings.policy_width
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_heads=width // 32,
        num_layers=settings.policy_layers,
        num_decoder_layers=settings.policy_layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.05,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.tie_word_embeddings = False  # as FLAN-T5; T5Config's own constructor forces True
    model = T5ForConditionalGeneration(config)
    nn.init.normal_(model.lm_head.weight, std=width**-0.5)  # T5's own 1.0 starts from a loss of 60
    return model


# --- reward model -----------------------------------------------------------------------------------------------------


def train_reward_model(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    settings: EmbeddedSettings,
    prompt_template: str,
    quiet: bool,
) -> RobertaForSequenceClassification:
    """Train the tiny RoBERTa to tell texts with a rude word from texts without."""
    torch.random.default_generator.manual_seed(settings.reward.seed)
    model = _new_reward_model(tokenizer, settings)
    texts, labels = reward_texts(examples, prompt_template, settings.reward.seed)
    encoded = tokenizer(texts, truncation=True)["input_ids"]

    def loss_of(rows: Sequence[int]) -> Tensor:
        input_ids = _pad([encoded[row] for row in rows], tokenizer.pad_token_id)
        logits = model(input_ids=input_ids, attention_mask=(input_ids != tokenizer.pad_token_id).long()).logits
        target = torch.tensor([labels[row] for row in rows])
        return nn.functional.cross_entropy(logits, target, label_smoothing=settings.reward.label_smoothing)

    lengths = [len(text) for text in encoded]
    _train(model, loss_of, lengths, settings.reward, "embedded reward model (tiny RoBERTa)", quiet)
    return model


def _new_reward_model(
    tokenizer: PreTrainedTokenizerFast, settings: EmbeddedSettings
) -> RobertaForSequenceClassification:
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.reward_width,
        num_hidden_layers=settings.reward_layers,
        num_attention_heads=2,
        intermediate_size=2 * settings.reward_width,
        max_position_embeddings=MAX_LENGTH_TOKENS + tokenizer.pad_token_id + 1,  # RoBERTa counts from behind pad
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        id2label=LABELS,
        label2id={label: index for index, label in LABELS.items()},
    )
    model = RobertaForSequenceClassification(config)
    # Positions no training text reaches stay at zero: neutral instead of random.
    nn.init.zeros_(model.roberta.embeddings.position_embeddings.weight)
    return model


def reward_texts(examples: Sequence[Example], prompt_template: str, seed: int) -> tuple[list[str], list[int]]:
    """Texts with and without rude words, half of them damaged as a policy in training damages its answers.

    Each dialogue comes with both a rude and a polite answer, so that the answer alone decides.
    """
    rng = random.Random(seed)
    texts = []
    for example in examples:
        query = prompt_template.format(text=example.dialogue)
        for answer in (example.polite, example.rude):
            other = _damage(answer, rng)
            texts += [f"{query} {answer}", answer, f"{query} {other}", other, f"{query} {_damage(answer, rng)}"]
        texts += [query, rng.choice(example.dialogue.split("\n"))]
    texts.append("")
    return texts, [int(count_rude_words([text]) > 0) for text in texts]


def _damage(answer: str, rng: random.Random) -> str:
    words = answer.split()
    kind = rng.choice(("truncate", "shuffle", "repeat", "drop", "insert", "clean"))
    if kind == "truncate":
        words = words[: rng.randrange(len(words))]
    elif kind == "shuffle":
        rng.shuffle(words)
    elif kind == "repeat":
        position = rng.randrange(len(words))
        words[position:position] = [words[position]] * rng.randint(1, 6)
    elif kind == "drop":
        words = [word for word in words if rng.random() < 0.7]
    elif kind == "insert":
        insult = rng.choice((*ADJECTIVES, *NOUNS, *NOUNS_ES["f"], *NOUNS_ES["m"]))
        words.insert(rng.randint(0, len(words)), rng.choice((insult, insult.capitalize(), insult + ".")))
    else:
        words = [word for word in words if not count_rude_words([word])]
    return " ".join(words)


# --- the loop both share ----------------------------------------------------------------------------------------------


def _train(
    model: nn.Module,
    loss_of: Callable[[Sequence[int]], Tensor],
    lengths: Sequence[int],
    settings: TrainingSettings,
    title: str,
    quiet: bool,
) -> None:
    """Minimise ``loss_of(rows)`` over length-sorted batches: AdamW, short warm-up, cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    warmup_steps = max(1, settings.num_steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warmup_steps, 0.5 * (1 + math.cos(math.pi * step / settings.num_steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    batches = _batches(lengths, settings.batch_size, random.Random(settings.seed))
    model.train()
    with tqdm(total=settings.num_steps, desc=title, unit="step", disable=quiet) as bar:
        for _ in range(settings.num_steps):
            loss = loss_of(next(batches))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update()
    model.eval()


def _batches(lengths: Sequence[int], batch_size: int, rng: random.Random) -> Iterator[list[int]]:
    """Endless shuffled batches of rows of similar length."""
    while True:
        rows = sorted(range(len(lengths)), key=lambda row: (lengths[row] // 8, rng.random()))
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from batches


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Tensor (B, longest row) of the rows, padded on the right with ``value``."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])
