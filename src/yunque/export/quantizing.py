"""From a model folder to a quantized one, with the report of what it cost."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from yunque import artifacts
from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.compression.ranges import Inputs, find_range, observe
from yunque.compression.schemes import FLOAT32, TORCH_SCHEMES, LayerScheme, PrecisionPlan, read_plan
from yunque.errors import CheckFailed, InputError
from yunque.export.fidelity import Fidelity, folder_logits, measure_fidelity, run_over, write_texts
from yunque.export.folder import write_folder
from yunque.export.parity import find_prompts
from yunque.export.quantized import (
    Layer,
    Written,
    expected_bytes,
    layer_module,
    quantizable_layers,
    reason_to_leave,
)
from yunque.export.source import Source, load_source

STAGE = "quantize"
_PROBES = 64
_SPARE_BYTES = 16 << 20
"""Graphs, tokenizer and manifest."""


@dataclass
class Calibration:
    """What was seen of the layers' inputs, and on how much text."""

    source: str
    rows: int
    too_long: int
    tokens: int
    method: str
    inputs: dict[str, Inputs]

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {name: getattr(self, name) for name in ("source", "rows", "too_long", "tokens", "method")}


@dataclass
class Outcome:
    """What was written: per layer what became of it, and the bytes of everything else."""

    written: list[Written]
    other_before: int
    other_after: int
    schemes: dict[str, str] = field(default_factory=dict)  # for torch, whose layers have no LayerScheme

    def scheme_of(self, item: Written) -> str:
        """Its scheme in words."""
        return self.schemes.get(item.layer.name, str(item.scheme))

    def is_quantized(self, item: Written) -> bool:
        """Whether it is not what it was."""
        return item.layer.name in self.schemes or item.scheme.is_quantized


def quantize(args: QuantizationArguments) -> artifacts.Manifest:
    """Quantize ``args.model_name_or_path`` into ``args.output_dir``.

    Raises:
        InputError: a model that cannot be exported or is quantized already, no calibration data where there must be
            some, an output folder that cannot be used or a disk without room for it.
        CheckFailed: nothing was quantized; nothing is left behind.
    """
    name, folder = str(args.model_name_or_path), str(args.output_dir)
    artifacts.check_output_dir(folder, overwrite=args.overwrite_output_dir, resume=args.resume, inputs=[name])
    is_torch = args.scheme in TORCH_SCHEMES
    source = load_source(name, args.model_revision, args.trust_remote_code, to_export=not is_torch)
    job: _TorchJob | _OnnxJob = _TorchJob(args, source) if is_torch else _OnnxJob(args, source)
    _check_room(folder, job.expected_bytes())
    prompts, origin = find_prompts(
        source, args.parity_dataset, args.parity_split, args.parity_text_column, args.parity_prompts
    )
    texts, _ = write_texts(source, prompts, "parity_dataset", new_tokens=args.parity_tokens)
    calibration = calibrate(args, source, job.modules())
    metrics: dict[str, Any] = {"calibration": calibration.as_dict() if calibration else None}

    def write(staging: Path) -> None:
        outcome = job.write(staging, calibration)
        fidelity = measure_fidelity(source, folder_logits(staging, source.kind), texts, origin)
        metrics.update(_report(outcome, staging, fidelity, on_inputs=calibration is not None))
        metrics["plan"] = job.plan_dict()

    parent = artifacts.read_manifest(name) if (Path(name) / artifacts.MANIFEST).is_file() else None
    return artifacts.save_model_folder(
        folder,
        write,
        stage=STAGE,
        parents=[name, *([source.base_name] if source.base_name else [])],
        data=parent.data if parent else (),
        prompt_template=parent.prompt_template if parent else None,
        seed=args.seed,
        config=asdict(args),
        metrics=metrics,
        base_model=parent.base_model if parent else source.base_name or name,
    )


# --- calibration ------------------------------------------------------------------------------------------------------


def calibrate(
    args: QuantizationArguments, source: Source, modules: Mapping[str, torch.nn.Module]
) -> Calibration | None:
    """Watch ``modules`` on the calibration prompts and the model's own answers; None where no prompts are given."""
    if args.calibration_dataset is None:
        return None
    prompts, _ = find_prompts(
        source, args.calibration_dataset, args.calibration_split, args.calibration_text_column, args.calibration_samples
    )
    texts, too_long = write_texts(
        source,
        prompts,
        "calibration_dataset",
        new_tokens=args.calibration_new_tokens,
        max_tokens=args.calibration_max_tokens,
    )
    inputs = observe(modules, lambda: run_over(source, texts), with_histograms=args.calibration_method != "minmax")
    tokens = sum(len(text.prompt) + len(text.answer) for text in texts)
    return Calibration(args.calibration_dataset, len(texts), too_long, tokens, args.calibration_method, inputs)


def _check_room(folder: str, needed: int) -> None:
    existing = next(path for path in (Path(folder), *Path(folder).absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed + _SPARE_BYTES > free:
        raise InputError(
            f"--output_dir {folder}: the result needs about {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f}; "
            "free space there, or give a folder on another disk"
        )


def _state_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters, shared ones once."""
    found = {parameter.data_ptr(): parameter.numel() * parameter.element_size() for parameter in model.parameters()}
    return sum(found.values())


# --- ONNX folders -----------------------------------------------------------------------------------------------------


class _OnnxJob:
    """Graphs with quantized layers."""

    def __init__(self, args: QuantizationArguments, source: Source) -> None:
        self.args, self.source = args, source
        self.layers = quantizable_layers(source)
        self.plan = self._make_plan()

    def _make_plan(self) -> PrecisionPlan:
        args = self.args
        plan = read_plan(args.plan) if args.plan else PrecisionPlan(args.default_layer)
        names = {layer.name for layer in self.layers}
        if unknown := set(plan.layers) - names:
            raise InputError(f"plan: {self.source.name} has no layer {min(unknown)}; it has {', '.join(sorted(names))}")
        if args.skip_layers is not None:
            skipped = [name for name in names if re.search(args.skip_layers, name)]
            if not skipped:
                raise InputError(f"skip_layers: {args.skip_layers!r} is in the name of no layer, such as {min(names)}")
            plan = plan.with_layers(dict.fromkeys(skipped, FLOAT32))
        if self._without_range(plan) and args.calibration_dataset is None:
            raise InputError("calibration_dataset: int8_static measures its ranges on prompts; give some")
        self._check_anything(plan)
        return plan

    def _check_anything(self, plan: PrecisionPlan) -> None:
        wanted = [(layer, plan.scheme(layer.name)) for layer in self.layers if plan.scheme(layer.name).is_quantized]
        reasons = Counter(_reason(layer, scheme) for layer, scheme in wanted)
        if "" not in reasons:
            reason = max(reasons, key=lambda text: reasons[text]) if wanted else "they stay float32 by the plan"
            raise CheckFailed(f"nothing to quantize: none of {len(self.layers)} layers changes; of most: {reason}")

    def _without_range(self, plan: PrecisionPlan) -> list[Layer]:
        return [
            layer
            for layer in self.layers
            if (scheme := plan.scheme(layer.name)).kind == "int8_static"
            and scheme.input_range is None
            and layer.role != "embedding"
            and not _reason(layer, scheme)
        ]

    def expected_bytes(self) -> int:
        """Of the folder, about."""
        changed = sum(
            expected_bytes(layer, self.plan.scheme(layer.name)) - expected_bytes(layer, FLOAT32)
            for layer in self.layers
            if not _reason(layer, self.plan.scheme(layer.name))
        )
        return _state_bytes(self.source.model) + changed

    def modules(self) -> dict[str, torch.nn.Module]:
        """What is watched in calibration."""
        return {layer.name: layer_module(self.source, layer) for layer in self.layers if layer.role != "embedding"}

    def write(self, staging: Path, calibration: Calibration | None) -> Outcome:
        """Write the folder."""
        args = self.args
        if calibration is not None:
            inputs = calibration.inputs
            if missing := [layer.name for layer in self._without_range(self.plan) if layer.name not in inputs]:
                raise CheckFailed(f"calibration: no text reached {missing[0]}; leave it out with --skip_layers")
            ranges = {
                layer.name: find_range(inputs[layer.name], args.calibration_method, args.calibration_percentile)
                for layer in self._without_range(self.plan)
            }
            self.plan = self.plan.with_layers(
                {name: replace(self.plan.scheme(name), input_range=ends) for name, ends in ranges.items()}
            )
        written = write_folder(self.source, staging, self.plan, calibration.inputs if calibration else None)
        other = _state_bytes(self.source.model) - sum(item.float32_bytes for item in written)
        return Outcome(written, other, other)

    def plan_dict(self) -> dict[str, Any]:
        """The plan as it was carried out."""
        return self.plan.as_dict()


def _reason(layer: Layer, scheme: LayerScheme) -> str:
    """As ``reason_to_leave``, of a layer whose range may yet be measured."""
    return reason_to_leave(layer, replace(scheme, input_range=scheme.input_range or (0.0, 1.0)))


# --- torch folders ----------------------------------------------------------------------------------------------------


class _TorchJob:
    """A folder for transformers and bitsandbytes."""

    def __init__(self, args: QuantizationArguments, source: Source) -> None:
        from yunque.compression import torch_schemes

        self.args, self.source, self.schemes = args, source, torch_schemes
        self.linear = torch_schemes.linear_modules(source.model)
        self.kept = torch_schemes.kept_modules(source.model, source.kind, args.skip_layers)
        if args.skip_layers is not None and not any(reason.startswith("skip") for reason in self.kept.values()):
            raise InputError(
                f"skip_layers: {args.skip_layers!r} is in the name of no linear layer, such as {min(self.linear)}"
            )
        if set(self.kept) == set(self.linear):
            raise CheckFailed(f"nothing to quantize: none of {len(self.linear)} linear layers changes")

    def expected_bytes(self) -> int:
        """Of the folder, about; the rest is bfloat16."""
        share = 0.55 if self.args.scheme == "bnb_nf4" else 1.05
        packed = sum(module.weight.numel() for name, module in self.linear.items() if name not in self.kept)
        return int(share * packed + 2 * (_state_bytes(self.source.model) / 4 - packed))

    def modules(self) -> dict[str, torch.nn.Module]:
        """What is watched in calibration."""
        return {name: module for name, module in self.linear.items() if name not in self.kept}

    def write(self, staging: Path, calibration: Calibration | None) -> Outcome:
        """Quantize from the float folder (of an adapter, from a merged copy that goes again), and write."""
        args, source = self.args, self.source
        with tempfile.TemporaryDirectory() as merged:
            name = source.name
            if source.base_name is not None:
                source.model.save_pretrained(merged)
                name = merged
            model = self.schemes.load_quantized(
                name, args.model_revision, args.trust_remote_code, source.kind, str(args.scheme), list(self.kept)
            )
        if not list(self.schemes.quantized_modules(model)):
            raise CheckFailed(f"nothing was quantized: bitsandbytes changed none of {len(self.linear)} layers")
        model.config._name_or_path = source.config._name_or_path
        model.save_pretrained(staging)
        source.tokenizer.save_pretrained(staging)
        return self._outcome(model, calibration)

    def _outcome(self, model: Any, calibration: Calibration | None) -> Outcome:
        quantized = set(self.schemes.quantized_modules(model))
        modules = self.schemes.linear_modules(model)
        head = None if self.source.kind == "classifier" else self.source.model.get_output_embeddings()
        generator = torch.Generator().manual_seed(0)
        written = []
        for name, module in self.linear.items():
            inputs = self.schemes.inputs_of(module)
            layer = Layer(
                name, (f"{name}.weight",), (inputs, module.weight.numel() // inputs),
                "head" if module is head else "linear",
            )  # fmt: skip
            error = 0.0
            if name in quantized:
                rows = torch.randn(_PROBES, inputs, generator=generator)
                if calibration is not None and name in calibration.inputs:
                    rows = torch.from_numpy(calibration.inputs[name].sample)
                error = self.schemes.output_error(modules[name], module, rows)
            size = self.schemes.module_bytes(modules[name])
            reason = self.kept.get(name, "" if name in quantized else "bitsandbytes left it")
            written.append(Written(layer, FLOAT32, reason, size, error))
        before = _state_bytes(self.source.model) - sum(item.float32_bytes for item in written)
        after = sum({parameter.data_ptr(): self._bytes(parameter) for parameter in model.parameters()}.values())
        listed = sum(self._bytes(modules[name].weight) for name in self.linear)
        return Outcome(written, before, after - listed, dict.fromkeys(quantized, str(self.args.scheme)))

    def _bytes(self, parameter: Any) -> int:
        from yunque.models.quantized import parameter_bytes

        return parameter_bytes(parameter)

    def plan_dict(self) -> dict[str, Any]:
        """Which layers were kept."""
        return {"scheme": self.args.scheme, "kept": self.kept}


# --- report -----------------------------------------------------------------------------------------------------------


def _report(outcome: Outcome, folder: Path, fidelity: Fidelity, *, on_inputs: bool) -> dict[str, Any]:
    """Bytes, layers, errors and fidelity, as the manifest keeps them."""
    changed = [item for item in outcome.written if outcome.is_quantized(item)]
    before, after = Counter(other=outcome.other_before), Counter(other=outcome.other_after)
    for item in outcome.written:
        before[item.layer.role] += item.float32_bytes
        after[item.layer.role] += item.num_bytes
    worst = max(changed, key=lambda item: item.error)
    return {
        "bytes": {
            "before": {**before, "total": sum(before.values())},
            "after": {**after, "total": sum(after.values())},
            "files": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        },
        "layers": {
            "quantized": len(changed),
            "schemes": dict(Counter(outcome.scheme_of(item) for item in changed)),
            "left": {
                item.layer.name: item.reason or "float32 by the plan"
                for item in outcome.written
                if not outcome.is_quantized(item)
            },
        },
        "errors": {
            "of": "outputs on calibration inputs" if on_inputs else "weights",
            "worst_layer": worst.layer.name,
            "worst": worst.error,
            "mean": float(np.mean([item.error for item in changed])),
            "layers": {item.layer.name: item.error for item in changed},
        },
        "fidelity": asdict(fidelity),
    }


def summary(metrics: Mapping[str, Any]) -> Sequence[str]:
    """The report in a few lines."""
    sizes, layers, errors = metrics["bytes"], metrics["layers"], metrics["errors"]
    before, after = sizes["before"], sizes["after"]
    kinds = [f"{name} {before[name]:,} -> {after[name]:,}" for name in before if name != "total" and before[name]]
    lines = [
        f"weights {before['total']:,} -> {after['total']:,} bytes ({after['total'] / before['total']:.1%}): "
        + ", ".join(kinds),
        f"{layers['quantized']} layers quantized ("
        + ", ".join(f"{count} {name}" for name, count in layers["schemes"].items())
        + f"), {len(layers['left'])} left",
        *(f"  left {count}: {reason}" for reason, count in Counter(layers["left"].values()).most_common()),
        f"error of {errors['of']}: mean {errors['mean']:.1%}, worst {errors['worst']:.1%} in {errors['worst_layer']}",
    ]
    if calibration := metrics["calibration"]:
        too_long = f", {calibration['too_long']} too long and left out" if calibration["too_long"] else ""
        lines.append(
            f"calibrated on {calibration['rows']} prompts and answers, {calibration['tokens']:,} tokens, of "
            f"{calibration['source']}{too_long}"
        )
    return [*lines, str(Fidelity(**metrics["fidelity"]))]
