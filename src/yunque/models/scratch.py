"""Models that begin from nothing: a tokenizer trained on the training texts and random weights, the same for a seed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from yunque.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, RobertaConfig, T5Config

    AnyConfig = TypeVar("AnyConfig", bound=PretrainedConfig)

PAD, EOS, UNK, BOS, MASK = "<pad>", "</s>", "<unk>", "<s>", "<mask>"

# GPT-2's word pattern, except that tags such as DialogSum's #Person1# stay one word: they are everywhere in its texts
# and take four tokens otherwise.
_WORDS = r" ?#\w+#|'(?:[sdmt]|ll|ve|re)\b| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass
class ScratchArguments:
    """Whether to start without a pretrained model, and with what architecture."""

    from_scratch: bool = field(
        default=False, metadata={"help": "Train a tokenizer and a model from random weights on the train split."}
    )
    model_type: Literal["t5", "roberta"] | None = field(
        default=None, metadata={"help": "Architecture of a model from scratch; by default the recipe's own."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "Changes to the architecture's default sizes, for example d_model=256,num_layers=4"},
    )
    vocab_size: int = field(default=8000, metadata={"help": "Entries of the tokenizer trained from scratch."})

    def __post_init__(self) -> None:
        """Check the vocabulary's size and that no option is set in vain."""
        if self.vocab_size < 300:
            raise InputError(f"vocab_size: {self.vocab_size} is too small for all bytes; give 300 or more")
        for name in ("model_type", "config_overrides"):
            if getattr(self, name) is not None and not self.from_scratch:
                raise InputError(f"{name}: is for new models only; add from_scratch or leave it out")


def train_tokenizer(
    texts: Iterable[str], model_type: str, vocab_size: int, *, max_length_tokens: int = 512, spaced: bool = False
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (no text is unknown to it) that frames texts as ``model_type`` expects.

    ``spaced`` makes of every stretch of white space one space and puts one before the text, as T5's own tokenizer does:
    a word is then the same token wherever it stands, which a small model needs to copy names. Line breaks are lost.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    if spaced:
        one_space = [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Prepend(" ")]
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), *one_space])
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    special = [PAD, EOS, UNK] if model_type == "t5" else [BOS, PAD, EOS, UNK, MASK]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in special]
    if model_type == "t5":
        frame = processors.TemplateProcessing(single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=ids)
        named = {}
    else:
        pair = f"{BOS} $A {EOS} {EOS} $B {EOS}"
        frame = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", pair=pair, special_tokens=ids)
        named = {"bos_token": BOS, "cls_token": BOS, "sep_token": EOS, "mask_token": MASK}
    tokenizer.post_processor = frame
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=max_length_tokens,
        model_input_names=["input_ids", "attention_mask"],
        **named,
    )


def new_model(
    args: ScratchArguments,
    model_type: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    label_names: Sequence[str] = (),
) -> PreTrainedModel:
    """Build a T5 with FLAN-T5's gates and untied head, or a RoBERTa classifier of ``label_names``, weights by ``seed``.

    Raises:
        InputError: an unknown or impossible value in ``config_overrides``.
    """
    import torch
    from transformers import RobertaForSequenceClassification, T5ForConditionalGeneration

    from yunque.models.loading import keep_head_untied

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if model_type == "roberta":
            classifier = RobertaForSequenceClassification(_roberta_config(args, tokenizer, label_names))
            # Positions that no training text reaches stay neutral instead of random.
            torch.nn.init.zeros_(classifier.roberta.embeddings.position_embeddings.weight)
            return classifier
        # Built tied, since an untied T5 of transformers 5 would not share one embedding between encoder and decoder.
        model = T5ForConditionalGeneration(_t5_config(args, tokenizer))
        # T5 gives an untied head std 1.0, which starts from a loss far above that of guessing.
        head = torch.empty_like(model.lm_head.weight).normal_(std=model.config.d_model**-0.5)
        model.lm_head.weight = torch.nn.Parameter(head)
    keep_head_untied(model)
    return model


def _t5_config(args: ScratchArguments, tokenizer: PreTrainedTokenizerFast) -> T5Config:
    from transformers import T5Config

    fixed = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,  # the constructor takes it for "do not scale the decoder's output"
    }
    config = _configured(T5Config, fixed, args)
    if (config.num_decoder_layers or 0) > config.num_layers:
        raise InputError(
            f"config_overrides: num_decoder_layers={config.num_decoder_layers} is more than "
            f"num_layers={config.num_layers}, and transformers' T5 cannot generate so; raise num_layers"
        )
    return config


def _roberta_config(
    args: ScratchArguments, tokenizer: PreTrainedTokenizerFast, label_names: Sequence[str]
) -> RobertaConfig:
    from transformers import RobertaConfig

    fixed = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # RoBERTa counts positions from behind the id of the padding
        "max_position_embeddings": tokenizer.model_max_length + tokenizer.pad_token_id + 1,
        "type_vocab_size": 1,
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: number for number, name in enumerate(label_names)},
    }
    config = _configured(RobertaConfig, fixed, args)
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"config_overrides: hidden_size={config.hidden_size} is not a multiple of "
            f"num_attention_heads={config.num_attention_heads}"
        )
    return config


def _configured(kind: type[AnyConfig], fixed: dict[str, Any], args: ScratchArguments) -> AnyConfig:
    names = {option.name for option in dataclasses.fields(kind)}  # to_dict holds what is derived from them as well
    known = {name: value for name, value in kind().to_dict().items() if name in names}
    overrides = parse_overrides(args.config_overrides, known, fixed)
    try:
        return kind(**fixed, **overrides)
    except (ValueError, TypeError) as error:
        raise InputError(f"config_overrides: {error}") from error


def parse_overrides(text: str | None, known: Mapping[str, Any], fixed: Iterable[str] = ()) -> dict[str, Any]:
    """Parse "name=value,name=value" into values of the types of ``known``; names in ``fixed`` are not to be changed.

    Raises:
        InputError: not of that form, an unknown or fixed name, a value of another type.
    """
    values: dict[str, Any] = {}
    for part in filter(None, (text or "").replace(" ", "").split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"config_overrides: '{part}' is not of the form name=value")
        if name in set(fixed):
            raise InputError(f"config_overrides: {name} follows from the tokenizer and the recipe; leave it out")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"config_overrides: unknown name {name}" + (f"; did you mean {close[0]}?" if close else "")
            )
        values[name] = _like(known[name], name, value)
    return values


def _like(default: Any, name: str, value: str) -> Any:
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise InputError(f"config_overrides: {name}={value} is not true or false")
        return value.lower() == "true"
    if not isinstance(default, int | float):
        return value
    try:
        return type(default)(value)
    except ValueError as error:
        raise InputError(
            f"config_overrides: {name}={value} is not {type(default).__name__}, as {default} is"
        ) from error
