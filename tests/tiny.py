"""Tiny models and tokenizers, built in code with fixed weights."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
)

VOCABULARY = 64
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def tokenizer(words=(), size=VOCABULARY, **special):
    """A word-level tokenizer of ``size`` ids: <pad> 0, </s> 1, <unk> 2, ``words``, then w-numbers."""
    tokens = ["<pad>", "</s>", "<unk>", *words]
    tokens += [f"w{index}" for index in range(len(tokens), size)]
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 512} | special
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)


def t5(**options):
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        **SPECIAL,
    )
    return _build(AutoModelForSeq2SeqLM, config, options)


def bart(**options):
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64,
        decoder_start_token_id=1, bos_token_id=2, forced_eos_token_id=1, **SPECIAL,
    )  # fmt: skip
    return _build(AutoModelForSeq2SeqLM, config, options)


def llama(**options):
    return _build(AutoModelForCausalLM, LlamaConfig(vocab_size=VOCABULARY, **SMALL, **SPECIAL), options)


def gpt2(**options):
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, **SPECIAL
    )
    return _build(AutoModelForCausalLM, config, options)


def roberta(labels=("nothate", "hate"), **options):
    config = RobertaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=66, bos_token_id=1, **SMALL, **SPECIAL,
        id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)},
    )  # fmt: skip
    return _build(AutoModelForSequenceClassification, config, options)


def bert(**options):
    return _build(
        AutoModelForSequenceClassification,
        BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **SMALL),
        options,
    )


def distilbert(**options):
    config = DistilBertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, dim=16, n_layers=2, n_heads=2, hidden_dim=32, pad_token_id=0
    )
    return _build(AutoModelForSequenceClassification, config, options)


FAMILIES = {"t5": t5, "bart": bart, "gpt2": gpt2, "llama": llama}


def _build(auto, config, options):
    for name, value in options.items():
        setattr(config, name, value)
    model = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return model
