"""``yunque generate`` and ``yunque chat``: what a model folder says, be it of torch or of ONNX."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from yunque import artifacts
from yunque.errors import InputError

if TYPE_CHECKING:
    from yunque.runtime.options import GenerationOptions

Stream = Callable[[str, bool], Iterator[str]]
"""Pieces of the answer to a prompt; whether it gets the special tokens that the tokenizer puts around texts."""

_Folder = Annotated[str, typer.Argument(help="Model folder of any kind (full, adapter, quantized, ONNX) or hub id.")]
_Tokens = Annotated[int, typer.Option("--max_new_tokens", help="Longest answer, in tokens.")]
_Temperature = Annotated[float, typer.Option("--temperature", help="Softmax temperature; 0 is greedy search.")]
_TopP = Annotated[float, typer.Option("--top_p", help="Sample among the likeliest tokens of this total mass.")]
_TopK = Annotated[int, typer.Option("--top_k", help="Sample among the k likeliest tokens; 0 keeps all.")]
_Seed = Annotated[int, typer.Option("--seed", help="Seed of sampling.")]


def generate(
    folder: _Folder,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts; by default the lines of standard input.")] = None,
    max_new_tokens: _Tokens = 128,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    top_k: _TopK = 0,
    seed: _Seed = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Take the texts as whole prompts, without the model's prompt template.")
    ] = False,
) -> None:
    """Print a model's answers, each as it is made; texts go into the prompt that the model was trained on."""
    options = _options(max_new_tokens, temperature, top_p, top_k, seed)
    given = prompts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not given:
        raise InputError("prompts: give a text, or lines on standard input")
    wrap = _wrap(folder, raw)
    answer = _open(folder, options)
    for text in given:
        _print(answer(*wrap(text)))


def chat(
    folder: _Folder,
    system: Annotated[str | None, typer.Option("--system_prompt", help="What the system says first.")] = None,
    max_new_tokens: _Tokens = 512,
    temperature: _Temperature = 0.0,
    top_p: _TopP = 1.0,
    top_k: _TopK = 0,
    seed: _Seed = 0,
) -> None:
    """Talk with a model that has a chat template; an empty line begins anew, Ctrl-D ends."""
    options = _options(max_new_tokens, temperature, top_p, top_k, seed)
    render = _renderer(folder)
    answer = _open(folder, options)
    opening = [] if system is None else [{"role": "system", "content": system}]
    turns = list(opening)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not text.strip():
            turns = list(opening)
            continue
        turns.append({"role": "user", "content": text})
        said = _print(answer(render(turns), False))
        turns.append({"role": "assistant", "content": said})


def _options(max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int) -> GenerationOptions:
    from yunque.runtime.options import GenerationOptions

    sampled = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    return GenerationOptions(max_new_tokens=max_new_tokens, seed=seed, **sampled)  # type: ignore[arg-type]


def _print(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        shown = piece if text else piece.lstrip()
        text += shown
        print(shown, end="", flush=True)
    print(flush=True)
    return text


# --- prompts ----------------------------------------------------------------------------------------------------------


def _wrap(folder: str, raw: bool) -> Callable[[str], tuple[str, bool]]:
    """How a text becomes a prompt: as it is, or in the template of the model's training, which may be a chat's."""
    known, config = (None, {}) if raw else artifacts.trained_prompt(folder)
    template = known if known and known.count("{text}") == 1 else "{text}"
    if not config.get("chat_template"):
        return lambda text: (template.replace("{text}", text), True)
    render = _renderer(folder)
    opening = [{"role": "system", "content": config["system_prompt"]}] if config.get("system_prompt") else []
    return lambda text: (render([*opening, {"role": "user", "content": template.replace("{text}", text)}]), False)


def _renderer(folder: str) -> Callable[[Sequence[dict[str, str]]], str]:
    """The tokenizer's chat template.

    Raises:
        InputError: it has none, or does not take the messages.
    """
    from yunque.runtime.chat_template import TemplateFailed, read_chat_template

    try:
        template = read_chat_template(_tokenizer_folder(folder))
    except TemplateFailed as error:
        raise InputError(f"{folder}: {error}") from error
    if template is None:
        raise InputError(f"{folder}: its tokenizer has no chat template; use yunque generate")

    def render(turns: Sequence[dict[str, str]]) -> str:
        try:
            return template.render(turns)
        except TemplateFailed as error:
            raise InputError(f"{folder}: {error}") from error

    return render


def _tokenizer_folder(folder: str) -> Path:
    """Where the tokenizer's files are: the folder, or the hub's files in the cache."""
    if Path(folder).is_dir():
        return Path(folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(folder, allow_patterns=["tokenizer*", "chat_template*", "special_tokens*"]))


# --- models -----------------------------------------------------------------------------------------------------------


def _open(folder: str, options: GenerationOptions) -> Stream:
    """Load a model of any kind.

    Raises:
        InputError: there is none, it makes no text, or its engine is not installed.
    """
    from yunque.runtime.spec import is_onnx

    return _open_onnx(folder, options) if is_onnx(folder) else _open_torch(folder, options)


def _open_onnx(folder: str, options: GenerationOptions) -> Stream:
    from yunque import runtime
    from yunque.serving.text import Detokenizer

    model: Any = runtime.load(folder)
    if not hasattr(model, "stream"):
        raise InputError(f"{folder}: a classifier makes no text; give a language model")

    def answer(prompt: str, special_tokens: bool) -> Iterator[str]:
        ids = model.tokenizer.encode([prompt], special_tokens=special_tokens)
        text = Detokenizer(model.tokenizer)
        for step in model.stream(ids, [options]):
            for token in step.tokens.tolist():
                yield text.add(token)
        yield text.finish()

    return answer


def _open_torch(folder: str, options: GenerationOptions) -> Stream:
    try:
        import torch
        from transformers import TextIteratorStreamer
    except ModuleNotFoundError as error:
        raise InputError(f"{folder}: is no ONNX folder; other models need pip install 'yunque[train]'") from error
    from threading import Thread

    from yunque.data.encoding import encode
    from yunque.models.adapter import adapter_for
    from yunque.models.arguments import ModelArguments
    from yunque.models.inference import load_for_inference

    loaded = load_for_inference(ModelArguments(model_name_or_path=folder))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model, tokenizer = loaded.model.to(device), loaded.tokenizer
    adapter, is_encoder_decoder = adapter_for(model, tokenizer), model.config.is_encoder_decoder
    sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k or None}

    def answer(prompt: str, special_tokens: bool) -> Iterator[str]:
        ids = encode(tokenizer, [prompt], add_special_tokens=special_tokens)
        if not is_encoder_decoder and ids[0][-1:] == [tokenizer.eos_token_id]:
            ids[0].pop()  # no prompt of a decoder ends with it, nor did one in training
        torch.manual_seed(options.seed)
        streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=not is_encoder_decoder, skip_special_tokens=True)
        arguments = {
            **adapter.generation_inputs(ids, device), "streamer": streamer, "do_sample": options.do_sample,
            "max_new_tokens": options.max_new_tokens, "eos_token_id": adapter.eos_ids, "pad_token_id": adapter.pad_id,
            **(sampling if options.do_sample else {}),
        }  # fmt: skip
        failed: list[Exception] = []

        def generate_in_background() -> None:
            try:
                model.generate(**arguments)
            except Exception as error:
                failed.append(error)
                streamer.end()

        thread = Thread(target=generate_in_background, daemon=True)
        thread.start()
        yield from streamer
        thread.join()
        if failed:
            raise failed[0]

    return answer
