"""A model folder as an ONNX folder: graphs, one weights file, what the runtime reads, the proof."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from yunque import artifacts
from yunque.compression.ranges import Inputs
from yunque.compression.schemes import PrecisionPlan
from yunque.errors import InputError
from yunque.export.arguments import ExportArguments
from yunque.export.graph import Graph
from yunque.export.optimum_parity import check_optimum_parity
from yunque.export.parity import check_parity, find_prompts
from yunque.export.quantized import Precision, Written
from yunque.export.source import Source, load_source
from yunque.export.texts import check_texts
from yunque.export.weights import WeightFile
from yunque.models.adapter import end_token_ids, record_end_tokens
from yunque.models.positions import fixed_rotary_limit
from yunque.runtime.spec import ModelSpec, label_indices

STAGE = "onnx"


def export(args: ExportArguments) -> artifacts.Manifest:
    """Export ``args.model_name_or_path`` into ``args.output_dir`` and prove that it is the same model.

    Raises:
        InputError: a model that cannot be exported, an output folder that cannot be used.
        CheckFailed: the exported model answers differently; nothing is left behind.
    """
    name, folder = str(args.model_name_or_path), str(args.output_dir)
    artifacts.check_output_dir(folder, overwrite=args.overwrite_output_dir, resume=args.resume, inputs=[name])
    source = load_source(name, args.model_revision, args.trust_remote_code)
    prompts, origin = find_prompts(
        source, args.parity_dataset, args.parity_split, args.parity_text_column, args.parity_prompts
    )
    metrics: dict[str, Any] = {"parity": None}

    def write(staging: Path) -> None:
        options: dict[str, Any] = {"tokens": args.parity_tokens, "tolerance": args.parity_tolerance}
        if args.optimum_layout:
            write_optimum_folder(source, staging)
            spec = specification(source, {})
            parity = check_optimum_parity(source, staging, spec, prompts, origin, **options)
        else:
            write_folder(source, staging)
            parity = check_parity(source, staging, prompts, origin, **options)
        metrics["parity"] = asdict(parity)

    parent = _manifest(name)
    return artifacts.save_model_folder(
        folder,
        write,
        stage=STAGE,
        parents=[name, *([source.base_name] if source.base_name else [])],
        data=parent.data if parent else (),
        prompt_template=parent.prompt_template if parent else None,
        seed=parent.seed if parent else None,
        config=asdict(args),
        metrics=metrics,
        base_model=parent.base_model if parent else source.base_name or name,
    )


def write_folder(
    source: Source,
    folder: Path,
    precision: PrecisionPlan | None = None,
    inputs: Mapping[str, Inputs] | None = None,
) -> list[Written]:
    """Write graphs, weights, ``runtime.json``, configuration and tokenizer of ``source`` into ``folder``.

    Layers are float32 unless ``precision`` says otherwise; ``inputs`` is what was seen of their inputs. Returns what
    became of each.
    """
    progress = Precision(precision or PrecisionPlan(), inputs or {})
    with WeightFile(folder) as weights:
        files = _save_graphs(source.graphs(weights, progress), folder)
    specification(source, files).save(folder)
    _save_configuration(source, folder)
    return list(progress.written.values())


def write_optimum_folder(source: Source, folder: Path) -> None:
    """Write the files that optimum-onnx loads, whose transformers 4 knows no tokenizer class of transformers 5."""
    with WeightFile(folder) as weights:
        _save_graphs(source.graphs(weights, for_optimum=True), folder)
    _save_configuration(source, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_graphs(graphs: dict[str, Graph], folder: Path) -> dict[str, str]:
    """The file names by the graphs' names."""
    files = {name: f"{name}.onnx" for name in graphs}
    for name, graph in graphs.items():
        onnx.save_model(graph.model(), folder / files[name])
    return files


def _save_configuration(source: Source, folder: Path) -> None:
    source.config.save_pretrained(folder)
    if source.kind != "classifier":
        record_end_tokens(source.model, source.tokenizer)
        source.model.generation_config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    check_texts(source.tokenizer, folder, chats=source.kind != "classifier")


def specification(source: Source, files: dict[str, str]) -> ModelSpec:
    """What the runtime has to know about ``source`` beside its graphs."""
    config: Any = source.config
    pad = config.pad_token_id if config.pad_token_id is not None else source.tokenizer.pad_token_id
    common: dict[str, Any] = {
        "kind": source.kind,
        "architecture": config.model_type,
        "graphs": files,
        "max_positions": _max_positions(config),
        "pad_token_id": pad or 0,
    }
    if source.kind == "classifier":
        labels = tuple(label_indices(config.id2label))
        independent = config.problem_type == "multi_label_classification" or len(labels) == 1
        return ModelSpec(vocab_size=config.vocab_size, labels=labels, independent_labels=independent, **common)
    generation = source.model.generation_config
    rows = source.model.get_output_embeddings().weight.shape[0]
    starts = (
        generation.decoder_start_token_id,
        getattr(config, "decoder_start_token_id", None),
        generation.bos_token_id,
    )
    start = next((token for token in starts if token is not None), None)
    if start is None and source.kind == "seq2seq":
        raise InputError("model_name_or_path: its configuration names no decoder_start_token_id; add it there")
    return ModelSpec(
        vocab_size=rows,
        eos_token_ids=tuple(end_token_ids(source.model, source.tokenizer)),
        decoder_start_token_id=start,
        forced_bos_token_id=generation.forced_bos_token_id,
        forced_eos_token_id=generation.forced_eos_token_id,
        **common,
    )


def _max_positions(config: Any) -> int | None:
    if config.model_type == "t5":
        return None
    most = fixed_rotary_limit(config)
    return most - config.pad_token_id - 1 if config.model_type == "roberta" else most


def _manifest(name: str) -> artifacts.Manifest | None:
    return artifacts.read_manifest(name) if (Path(name) / artifacts.MANIFEST).is_file() else None
