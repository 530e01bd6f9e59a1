"""Opens the models that write and judge: local folders and hub ids through our own decoders, or endpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from yunque.artifacts import sha256_file
from yunque.data.encoding import encode
from yunque.errors import InputError, Stopped
from yunque.models.adapter import adapter_for
from yunque.models.adapter_folders import adapter_config
from yunque.models.arguments import GenerationArguments, ModelArguments
from yunque.models.loading import load_model, load_tokenizer
from yunque.models.policy import score_tokens
from yunque.rl.endpoint import Endpoint
from yunque.rl.feedback_arguments import WriterArguments
from yunque.rl.rollout import generate
from yunque.rl.writing import Request, Writer

_LETTERS = ("A", "B")


class LocalModel:
    """A model folder or hub id, encoder-decoder or decoder-only; prompts go through its chat template if it has one.

    Raises:
        InputError: as ``load_tokenizer`` and ``load_model``; ``option`` is the argument to blame.
    """

    def __init__(self, args: WriterArguments, name: str, option: str, stopped: Callable[[], bool]) -> None:
        chosen = ModelArguments(
            model_name_or_path=name,
            model_revision=args.model_revision,
            pad_token=args.pad_token,
            dtype=args.dtype,
            trust_remote_code=args.trust_remote_code,
        )
        try:
            self.tokenizer: Any = load_tokenizer(chosen)
            model: Any = load_model(chosen, self.tokenizer)
        except InputError as error:
            raise InputError(str(error).replace("model_name_or_path", option, 1)) from error
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.model: Any = model.to(self.device).eval().requires_grad_(False)
        self.adapter = adapter_for(model, self.tokenizer)
        self.batch_size = args.batch_size
        self.identity = _identity(name, args)
        self.source = name
        self.stopped = stopped

    def write(self, requests: Sequence[Request], options: GenerationArguments) -> Iterator[tuple[int, str | None]]:
        """Sample in batches of ``batch_size``; a text depends on its prompt and stream, not on its batch."""
        limit = self.adapter.prompt_limit(options.max_new_tokens)
        queries = [self.encode(request.prompt) for request in requests]
        fitting = [place for place, query in enumerate(queries) if len(query) <= limit]
        yield from ((place, None) for place, query in enumerate(queries) if len(query) > limit)
        for start in range(0, len(fitting), self.batch_size):
            if self.stopped():
                raise Stopped("what is done is saved; go on with --resume")
            places = fitting[start : start + self.batch_size]
            responses = generate(
                self.model,
                self.adapter,
                [queries[place] for place in places],
                options,
                seed=0,  # the streams carry the run's seed
                samples=[requests[place].stream for place in places],
                device=self.device,
            )
            for place, response in zip(places, responses, strict=True):
                text = self.tokenizer.decode(response.tokens, skip_special_tokens=True)
                yield place, text.encode("utf-8", "replace").decode("utf-8").strip()

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, in the chat template of the model where it has one."""
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
            )
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self._plain(prompt)

    def log_odds(self, prompts: Sequence[str], max_new_tokens: int) -> list[float | None]:
        """Nats by which A is likelier than B as the answer; None where a prompt is longer than the model reads.

        Raises:
            InputError: the tokenizer has no tokens for the letters A and B.
        """
        size = max(self.batch_size // len(_LETTERS), 1)
        return [odds for first in range(0, len(prompts), size) for odds in self._odds(prompts[first : first + size])]

    @torch.no_grad()
    def _odds(self, prompts: Sequence[str]) -> list[float | None]:
        limit = self.adapter.prompt_limit(2)
        split = [self._with_letters(prompt) for prompt in prompts]
        fitting = [place for place, (query, _) in enumerate(split) if 0 < len(query) <= limit]
        odds: list[float | None] = [None] * len(prompts)
        if not fitting:
            return odds
        queries = [split[place][0] for place in fitting for _ in _LETTERS]
        letters = [letter for place in fitting for letter in split[place][1]]
        batch = self.adapter.scoring_batch(queries, letters, self.device)
        scores, _ = score_tokens(self.model, self.adapter, batch, temperature=1.0, lean=False)
        totals = (scores.logprobs_BR * batch.mask_BR).sum(dim=1).tolist()
        for index, place in enumerate(fitting):
            odds[place] = totals[2 * index] - totals[2 * index + 1]
        return odds

    def _with_letters(self, prompt: str) -> tuple[list[int], list[list[int]]]:
        """Ids of the prompt, and of each letter as it goes on from there (in the decoder, where there is one)."""
        if self.adapter.config.is_encoder_decoder:
            query = self.encode(prompt)
            whole = [self._without_end(self.tokenizer(text_target=letter)["input_ids"]) for letter in _LETTERS]
            shared = 0
        elif self.tokenizer.chat_template:
            query = self.encode(prompt)
            whole = [self.tokenizer(letter, add_special_tokens=False)["input_ids"] for letter in _LETTERS]
            shared = 0
        else:  # tokenized together, since " A" after the prompt may be one token or two
            whole = [self._plain(f"{prompt} {letter}") for letter in _LETTERS]
            pairs = zip(*whole, strict=False)
            shared = next((place for place, (one, other) in enumerate(pairs) if one != other), min(map(len, whole)))
            query = whole[0][:shared]
        letters = [ids[shared:] for ids in whole]
        if letters[0] == letters[1] or not all(letters):
            raise InputError(
                f"judge_model_name_or_path: the tokenizer of {self.source} cannot tell the letters A and B apart; "
                "give another judge"
            )
        return query, letters

    def _plain(self, text: str) -> list[int]:
        (ids,) = encode(self.tokenizer, [text])
        return ids if self.adapter.config.is_encoder_decoder else self._without_end(ids)

    def _without_end(self, ids: list[int]) -> list[int]:
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids


def open_models(
    args: WriterArguments, generation: GenerationArguments, stopped: Callable[[], bool]
) -> tuple[Writer, Writer]:
    """Generator and judge, the same one where no judge is named; ``stopped`` says whether a signal came.

    Raises:
        InputError: as ``LocalModel``; answers of ``generation.max_new_tokens`` do not fit the generator.
    """
    name = args.model_name_or_path or ""
    generator: Writer
    if args.generator_url is None:
        generator = LocalModel(args, name, "model_name_or_path", stopped)
        generator.adapter.prompt_limit(generation.max_new_tokens)
    else:
        generator = Endpoint(args, "generator_url", args.generator_url, name, args.generator_key_env, stopped)
    judge_name = args.judge_model_name_or_path
    if judge_name is None:
        return generator, generator
    if args.judge_url is not None:
        return generator, Endpoint(args, "judge_url", args.judge_url, judge_name, args.judge_key_env, stopped)
    return generator, LocalModel(args, judge_name, "judge_model_name_or_path", stopped)


def _identity(name: str, args: WriterArguments) -> str:
    """Hash of a local folder's weights and tokenizer, wherever it lies; a hub id is known by its revision."""
    folder = Path(name)
    if not folder.is_dir():
        return f"hub {name}@{args.model_revision} {args.dtype}"
    files = sorted(
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".json") and path.name != "yunque.json"
    )
    hashes = [f"{path.name} {sha256_file(path)}" for path in files]
    if (adapter := adapter_config(name)) is not None:
        hashes.append(adapter["base_model_name_or_path"])
    return f"folder {hashlib.sha256(' '.join(hashes).encode()).hexdigest()[:16]} {args.dtype}"
