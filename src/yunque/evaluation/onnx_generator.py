"""ONNX folders in an evaluation: answered by the torch-free runtime that also serves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from yunque import runtime
from yunque.errors import InputError
from yunque.evaluation.generators import Answer, ReferenceLoss, encode_references
from yunque.evaluation.settings import Setting
from yunque.models.adapter import TokenIds
from yunque.models.arguments import ModelArguments
from yunque.models.inference import model_bytes
from yunque.models.loading import load_tokenizer
from yunque.rl.statistics import peak_memory_bytes

_GRAPHS = {".onnx", ".data", ".onnx_data"}


class OnnxGenerator:
    """A folder of ``compress/to_onnx.py`` or of a compress step after it."""

    def __init__(self, args: ModelArguments) -> None:
        self.folder = Path(str(args.model_name_or_path))
        if args.load_in_4bit:
            raise InputError("load_in_4bit: an ONNX folder runs as it is stored; leave it out")
        loaded = runtime.load(self.folder, threads=torch.get_num_threads())
        if isinstance(loaded, runtime.Classifier):
            raise InputError(f"model_name_or_path: {self.folder} is a classifier; give a language model")
        self.model: runtime.Seq2SeqModel | runtime.CausalModel = loaded
        self.tokenizer: Any = load_tokenizer(args)
        self.is_encoder_decoder = isinstance(loaded, runtime.Seq2SeqModel)
        self.eos_ids = loaded.spec.eos_token_ids

    def prompt_limit(self, max_new_tokens: int) -> int:
        """Prompt and answer share a decoder's positions; of an encoder-decoder each has all."""
        limit = self.tokenizer.model_max_length
        positions = min(self.model.spec.max_positions or limit, limit)
        room = positions if self.is_encoder_decoder else positions - max_new_tokens
        if max_new_tokens > positions or room < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} go beyond the {positions} positions of {self.folder}")
        return room

    def check(self, setting: Setting) -> None:
        """Graphs give the last layer's logits only."""
        if setting.dola_layers:
            raise InputError("dola_layers: an ONNX folder has no logits of inner layers; evaluate the torch folder")

    def answers(
        self, queries: Sequence[TokenIds], setting: Setting, *, seed: int, samples: Sequence[int]
    ) -> list[Answer]:
        """Answer in one batch; a sample's random numbers follow from seed and sample, though not as torch's do."""
        options = setting.options
        common: dict[str, Any] = {
            "max_new_tokens": options.max_new_tokens,
            "min_new_tokens": options.min_new_tokens,
            "eos_token_ids": self.eos_ids,
        }
        if options.temperature:
            common |= {"do_sample": True, "temperature": options.temperature}
            common |= {"top_k": options.top_k, "top_p": options.top_p}
        wanted = [runtime.GenerationOptions(seed=_sample_seed(seed, sample), **common) for sample in samples]
        found = self.model.generate([list(query) for query in queries], wanted, batch_size=len(queries))
        return [
            Answer(row.tokens[:-1] if row.finish_reason == "eos" else row.tokens, row.finish_reason == "eos")
            for row in found
        ]

    def reference_losses(
        self, queries: Sequence[TokenIds], references: Sequence[str]
    ) -> list[ReferenceLoss | None] | None:
        """Loss from the logits after every token, one reference at a time."""
        losses: list[ReferenceLoss | None] = []
        for query, whole in zip(queries, encode_references(self, references), strict=True):
            limit = self.prompt_limit(1)
            target = whole[: max(0, limit if self.is_encoder_decoder else limit + 1 - len(query))]
            if not target:
                losses.append(None)
                continue
            logits = torch.tensor(self.next_logits(query, target), dtype=torch.float64)
            nats = cross_entropy(logits, torch.tensor(target), reduction="sum").item()
            losses.append(ReferenceLoss(nats, len(target), len(whole) - len(target)))
        return losses

    @property
    def end_id(self) -> int:
        """The first that its export found."""
        return self.eos_ids[0]

    def next_logits(self, query: TokenIds, tokens: TokenIds) -> np.ndarray:
        """From one run over query and tokens."""
        if isinstance(self.model, runtime.Seq2SeqModel):
            return self.model.logits([query], [tokens[:-1]])[0]
        return self.model.logits([[*query, *tokens[:-1]]])[0][len(query) - 1 :]

    def describe(self) -> dict[str, Any]:
        """What was loaded."""
        graphs = [path for path in self.folder.iterdir() if path.suffix in _GRAPHS]
        return {
            "kind": "onnx",
            "bytes": model_bytes(str(self.folder)),
            "weights_bytes": sum(path.stat().st_size for path in graphs),
            "dtype": None,
        }

    def peak_memory_bytes(self) -> int:
        """Of the process, in which an evaluation has imported torch as well."""
        return peak_memory_bytes(torch.device("cpu"))


def _sample_seed(seed: int, sample: int) -> int:
    """A seed of 64 bits for one sample."""
    return int(np.random.SeedSequence([seed, sample]).generate_state(1, np.uint64)[0])
