"""The cheapest precision of every layer with which the gates still pass, proved on prompts that no choice has seen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from yunque import artifacts
from yunque.compression.mixed_arguments import KeepGateArguments, candidate_schemes
from yunque.compression.mixed_precision import Choice, Choices, Search, Unit, as_schemes, cheapest_passing
from yunque.compression.quantization_arguments import QuantizationArguments
from yunque.compression.schemes import FLOAT32, LayerScheme, PrecisionPlan
from yunque.compression.sensitivity import Damage, Measured, Meter, measure
from yunque.compression.substitution import Target
from yunque.errors import CheckFailed, InputError
from yunque.evaluation.gated_plans import GatedPlans, Judgement, check_measured, plan_key
from yunque.evaluation.gates import Gate, parse_gate
from yunque.evaluation.judging import ToxicityJudge
from yunque.evaluation.progress import Progress, write_atomically
from yunque.evaluation.prompting import prepare
from yunque.evaluation.sensitivity import MeterSettings, build_meter, targets, torch_generator
from yunque.evaluation.sensitivity_report import plot_sensitivity, sensitivity_table
from yunque.export.folder import write_folder
from yunque.export.quantized import Layer, applied, quantizable_layers
from yunque.export.source import Source, load_source
from yunque.models.embedded import EMBEDDED, ensure_embedded

SEARCH = ".search"
"""Folder of a search that is not finished, inside the output folder."""
RESULT, PLAN, PLOT = "sensitivity.json", "plan.json", "sensitivity.png"
_SCHEMA = 1
_TABLE_CHARS = 150  # names of layers are long, and a log has no width


@dataclass
class Work:
    """What the steps share."""

    order: QuantizationArguments
    args: KeepGateArguments
    gates: list[Gate]
    source: Source
    plans: GatedPlans
    folder: Path
    console: Console
    schemes: dict[str, dict[str, LayerScheme]]  # layer -> candidate -> what it gives the layer
    targets: dict[str, Target]


def keep_gate(order: QuantizationArguments, args: KeepGateArguments) -> artifacts.Manifest:
    """Measure the layers, search the cheapest plan that keeps ``args.keep_gate``, prove it, write it.

    Raises:
        InputError: anything that was asked for and cannot be; nothing half-written remains.
        CheckFailed: no plan keeps the gates, or none of those found keeps them on the verdict split.
    """
    work = prepare_work(order, args)
    measured = measure_layers(work)
    units, search = search_plan(work, measured)
    judged = [plan_of(work, units, one.choices) for one in search.trace if one.passed]
    if not judged:
        _report(work, measured, units, search, None, [])
        raise CheckFailed(_no_plan(work, units, search))
    verdicts = _verdicts(work, units, search)
    chosen = verdicts[-1] if verdicts[-1][1].passed else None
    report = _report(work, measured, units, search, chosen and chosen[0], [one for _, one in verdicts])
    if chosen is None:
        lines = "; ".join(verdicts[-1][1].lines())
        raise CheckFailed(
            f"keep_gate: plans that pass on {args.search_split} do not on {args.verdict_split}: {lines}; give more"
            " prompts or a higher search_confidence"
        )
    return _save(work, measured, chosen[0], report)


# --- preparation ------------------------------------------------------------------------------------------------------


def prepare_work(order: QuantizationArguments, args: KeepGateArguments) -> Work:
    """Check everything that can be before anything slow, and load the model.

    Raises:
        InputError: no or bad gates, no data, a folder that cannot be used, a classifier.
    """
    if not args.keep_gate:
        raise InputError("keep_gate: scheme mixed needs at least one gate, as toxicity<=+0.01")
    gates = [_parsed(text) for text in args.keep_gate]
    model = _embedded(order, args)
    folder = _search_folder(order, model)
    source = load_source(model, order.model_revision, order.trust_remote_code)
    if source.kind == "classifier":
        raise InputError(f"model_name_or_path: {model} is a classifier, which gives no answers to gate")
    layers = quantizable_layers(source)
    plans = GatedPlans(source, args, gates, folder, order.seed, _dataset(source, args))
    console = Console(soft_wrap=True)
    schemes = _schemes(order, args, layers)
    return Work(order, args, gates, source, plans, folder, console, schemes, targets(source, layers))


def _schemes(
    order: QuantizationArguments, args: KeepGateArguments, layers: Sequence[Layer]
) -> dict[str, dict[str, LayerScheme]]:
    """What each candidate gives each layer, without those that its kernel cannot compute.

    Raises:
        InputError: skipped layers that there are not.
    """
    candidates = candidate_schemes(args.candidates, weights_only=order.activations == "weights_only")
    skipped = [] if order.skip_layers is None else [one for one in layers if re.search(order.skip_layers, one.name)]
    if order.skip_layers is not None and not skipped:
        raise InputError(f"skip_layers: {order.skip_layers!r} is found in no layer's name")
    found = {}
    for layer in layers:
        given = {name: applied(PrecisionPlan(default=scheme), layer) for name, scheme in candidates.items()}
        possible = {name: scheme for name, scheme in given.items() if scheme == candidates[name]}
        found[layer.name] = {"float32": FLOAT32} if layer in skipped or not possible else possible
    return found


def _parsed(text: str) -> Gate:
    try:
        return parse_gate(text)
    except InputError as error:
        raise InputError(str(error).replace("--gate", "keep_gate:", 1)) from error


def _embedded(order: QuantizationArguments, args: KeepGateArguments) -> str:
    """The model's path, with the embedded default in place of its name everywhere."""
    model = str(order.model_name_or_path)
    named = (model, args.gate_dataset_name, args.toxicity_model_name_or_path)
    if EMBEDDED not in (*named, args.unaligned_name_or_path):
        return model
    embedded = ensure_embedded()
    if args.gate_dataset_name == EMBEDDED:
        args.gate_dataset_name = str(embedded.dataset)
    if args.toxicity_model_name_or_path == EMBEDDED:
        args.toxicity_model_name_or_path = str(embedded.reward_model)
    if args.unaligned_name_or_path == EMBEDDED:
        args.unaligned_name_or_path = str(embedded.policy)
    return str(embedded.policy) if model == EMBEDDED else model


def _search_folder(order: QuantizationArguments, model: str) -> Path:
    """Where the search keeps what is finished.

    Raises:
        InputError: as ``artifacts.check_output_dir``; an unfinished search that is neither continued nor replaced.
    """
    output = Path(str(order.output_dir))
    artifacts.check_output_dir(output, overwrite=order.overwrite_output_dir, resume=order.resume, inputs=[model])
    folder = output / SEARCH
    if folder.exists() and not (order.resume or order.overwrite_output_dir):
        raise InputError(
            f"output_dir: {output} holds an unfinished search; continue it with --resume or start again with"
            " --overwrite_output_dir"
        )
    if folder.exists() and not order.resume:
        shutil.rmtree(folder)
    return folder


def _dataset(source: Source, args: KeepGateArguments) -> str:
    if args.gate_dataset_name is not None:
        return args.gate_dataset_name
    known = artifacts.manifest_of(source.name)
    for data in known.data if known else []:
        if Path(str(data.get("name"))).exists():
            return str(data["name"])
    raise InputError("gate_dataset_name: the model names no data that is here; give prompts to judge the answers to")


# --- sensitivity ------------------------------------------------------------------------------------------------------


def measure_layers(work: Work) -> list[Measured]:
    """The damage of every layer in every candidate that changes it; each is on the disk before the next begins.

    Raises:
        InputError: ``resume``, but what lies there was measured otherwise; a gate that nothing measures.
    """
    args = work.args
    progress = Progress(work.folder / "sensitivity", _identity(work))
    if differences := progress.differences():
        raise InputError(f"resume: the search in {work.folder} differs in {', '.join(differences)}; start again")
    progress.begin()
    check_measured(work.gates, work.plans.aligned(args.search_split), args.unaligned_name_or_path)
    done = [_measured(record) for record in progress.records().values()]
    layers = {
        name: (work.targets[name], {key: scheme for key, scheme in schemes.items() if scheme.is_quantized})
        for name, schemes in work.schemes.items()
    }
    total = sum(len(schemes) for _, schemes in layers.values())
    if len(done) == total:
        return done
    meter = meter_of(work)
    numbers = iter(range(len(done), total))

    with progress.writer(0) as file, tqdm(total=total, initial=len(done), desc="layers", unit="layer") as bar:

        def save(one: Measured) -> None:
            damage = one.damage.as_dict()
            file.append({"batch": next(numbers), "layer": one.layer, "scheme": one.scheme, "damage": damage})
            bar.update()

        return list(measure(meter, layers, done=done, save=save))


def meter_of(work: Work) -> Meter:
    """The meter on the first prompts of the search split."""
    args = work.args
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = work.source
    if device.type != "cpu":  # the exporter goes on reading the weights of the other
        source = load_source(source.name, work.order.model_revision, work.order.trust_remote_code)
    held_out = work.plans.held_out(args.search_split)
    held_out.max_test_samples = min(args.sensitivity_prompts, held_out.max_test_samples or args.sensitivity_prompts)
    prompts = prepare(torch_generator(source, device), held_out, source.name, args.gate_max_new_tokens)
    judge = None
    if args.toxicity_model_name_or_path is not None:
        judge = ToxicityJudge(args.toxicity_model_name_or_path, args.toxicity_label)
    metrics = dict.fromkeys("toxicity" if gate.kind == "recovery" else gate.metric for gate in work.gates)
    settings = MeterSettings(
        metrics=[metric for metric in metrics if metric != "nll"],
        num_answers=args.sensitivity_answers,
        temperature=args.sensitivity_temperature,
        max_new_tokens=args.gate_max_new_tokens,
        seed=work.order.seed,
    )
    return build_meter(source, prompts, judge, settings, device)


def _identity(work: Work) -> dict[str, Any]:
    manifest = Path(work.source.name) / artifacts.MANIFEST
    given = asdict(work.args)
    names = ("search_confidence", "most_plans", "verdict_plans", "keep_gate")
    return {
        "model": artifacts.sha256_file(manifest) if manifest.is_file() else work.source.name,
        "seed": work.order.seed,
        "metrics": sorted({gate.metric for gate in work.gates}),
        **{name: value for name, value in given.items() if name not in names},
    }


def _measured(record: Mapping[str, Any]) -> Measured:
    return Measured(record["layer"], record["scheme"], Damage.from_dict(record["damage"]))


# --- search -----------------------------------------------------------------------------------------------------------


def search_plan(work: Work, measured: Sequence[Measured]) -> tuple[list[Unit], Search]:
    """Search on the search split; the units in the order of the plans' choices, and all that was tried."""
    units = units_of(work, measured)
    args, names = work.args, [unit.name for unit in units]
    meter: list[Meter] = []

    def check(choices: Choices) -> tuple[bool, float]:
        plan = plan_of(work, units, choices)
        judgement = work.plans.judge(plan, args.search_split, args.search_confidence)
        size = sum(unit.choices[number].num_bytes for unit, number in zip(units, choices, strict=True))
        work.console.print(
            f"plan {plan_key(plan)}: {size:,} bytes: {'passes' if judgement.passed else 'does not pass'} on"
            f" {args.search_split}: {'; '.join(judgement.lines())}",
            markup=False, highlight=False,
        )  # fmt: skip
        return judgement.passed, judgement.excess

    def joint(choices: Choices) -> float:
        if not meter:
            meter.append(meter_of(work))
        parts = {
            work.targets[name]: work.schemes[name][unit.choices[number].scheme]
            for name, unit, number in zip(names, units, choices, strict=True)
        }
        return harm(meter[0].damage({target: scheme for target, scheme in parts.items() if scheme.is_quantized}))

    return units, cheapest_passing(units, check, joint_damage=joint, most_checks=args.most_plans)


def units_of(work: Work, measured: Sequence[Measured]) -> list[Unit]:
    """Layers with the bytes and the damage of their schemes."""
    found = {(one.layer, one.scheme): one.damage for one in measured}
    sizes = {layer.name: 4 * layer.shape[0] * layer.shape[1] for layer in quantizable_layers(work.source)}
    units = []
    for name, schemes in work.schemes.items():
        choices = []
        for key, scheme in schemes.items():
            damage = found.get((name, key))
            if damage is None:
                choices.append(Choice(key, sizes[name], 0.0))
            elif scheme.is_quantized:
                choices.append(Choice(key, damage.num_bytes, harm(damage)))
        units.append(Unit(name, tuple(choices)))
    return units


def harm(damage: Damage) -> float:
    """The one number that the search adds up: the KL from the aligned policy, in nats per answer.

    Of all that is measured it foretells best how many answers change, and with them how wide a gate's interval is and
    where it ends; docs/sensitivity.md has the rank correlations.
    """
    return max(damage.kl.mean, 0.0)


def plan_of(work: Work, units: Sequence[Unit], choices: Choices) -> PrecisionPlan:
    """The choices as a plan of the exporter."""
    return PrecisionPlan(
        layers={name: work.schemes[name][scheme] for name, scheme in as_schemes(units, choices).items()}
    )


def _verdicts(work: Work, units: Sequence[Unit], search: Search) -> list[tuple[PrecisionPlan, Judgement]]:
    """Judge the plans that passed on the verdict split, cheapest first, until one passes there too."""
    args = work.args
    passed = sorted((one for one in search.trace if one.passed), key=lambda one: one.num_bytes)[: args.verdict_plans]
    confidence = 1 - 0.05 / args.verdict_plans
    found = []
    for one in passed:
        plan = plan_of(work, units, one.choices)
        judgement = work.plans.judge(plan, args.verdict_split, confidence)
        found.append((plan, judgement))
        for line in judgement.lines():
            work.console.print(f"{args.verdict_split}: plan {plan_key(plan)}: {line}", markup=False, highlight=False)
        if judgement.passed:
            break
    return found


def _no_plan(work: Work, units: Sequence[Unit], search: Search) -> str:
    nearest = min(search.trace, key=lambda one: one.excess)
    plan = plan_of(work, units, nearest.choices)
    lines = work.plans.judge(plan, work.args.search_split, work.args.search_confidence).lines()
    return (
        f"keep_gate: no plan of {', '.join(work.args.candidates)} passes on {work.args.search_split}, not even the"
        f" least damaging; the nearest of {len(search.trace)}: {'; '.join(lines)}"
    )


# --- results ----------------------------------------------------------------------------------------------------------


def _report(
    work: Work,
    measured: Sequence[Measured],
    units: Sequence[Unit],
    search: Search,
    plan: PrecisionPlan | None,
    verdicts: Sequence[Judgement],
) -> dict[str, Any]:
    """Print the table, write sensitivity.json and the plot, and return what the former holds.

    Without a plan they lie in the output folder, where there is nothing else.
    """
    args = work.args
    chosen = {} if plan is None else _names(work, plan)
    work.console.print(sensitivity_table(measured, chosen), width=max(work.console.width, _TABLE_CHARS), crop=False)
    trace = []
    for one in search.trace:
        tried = plan_of(work, units, one.choices)
        judgement = work.plans.judge(tried, args.search_split, args.search_confidence)
        trace.append({"num_bytes": one.num_bytes, "plan": as_schemes(units, one.choices), **judgement.as_dict()})
    report = {
        "schema": _SCHEMA,
        "model": work.source.name,
        "gates": [gate.text for gate in work.gates],
        "arguments": asdict(args) | {"seed": work.order.seed},
        "layers": [{"layer": one.layer, "scheme": one.scheme, **one.damage.as_dict()} for one in measured],
        "search": {"complete": search.complete, "plans": trace},
        "plan": chosen or None,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
    }
    for folder in (work.folder, *([] if plan is not None else [Path(str(work.order.output_dir))])):
        write_atomically(folder / RESULT, json.dumps(artifacts.jsonable(report), indent=2) + "\n")
        plot_sensitivity(measured, chosen, folder / PLOT)
    return report


def _names(work: Work, plan: PrecisionPlan) -> dict[str, str]:
    return {
        name: next(key for key, scheme in work.schemes[name].items() if scheme == given)
        for name, given in plan.layers.items()
    }


def _save(work: Work, measured: Sequence[Measured], plan: PrecisionPlan, report: dict[str, Any]) -> artifacts.Manifest:
    """Write the ONNX folder with the plan beside it, and remove what the search kept."""
    parent = work.source.name
    known = artifacts.manifest_of(parent)
    output = Path(str(work.order.output_dir))
    num_bytes: list[int] = []

    def write(staging: Path) -> None:
        num_bytes.append(sum(one.num_bytes for one in write_folder(work.source, staging, plan)))
        plan.save(staging / PLAN)
        for name in (RESULT, PLOT):
            shutil.copy(work.folder / name, staging / name)
        metrics["layer_bytes"] = num_bytes[0]

    metrics: dict[str, Any] = {"verdict": report["verdicts"][-1]}
    manifest = artifacts.save_model_folder(
        output,
        write,
        stage="quantize",
        parents=[parent, *([work.source.base_name] if work.source.base_name else [])],
        data=known.data if known else (),
        prompt_template=known.prompt_template if known else None,
        seed=work.order.seed,
        config={"scheme": "mixed", "plan": plan.as_dict(), **asdict(work.args)},
        metrics=metrics,
        base_model=known.base_model if known else work.source.base_name or parent,
    )
    shutil.rmtree(work.folder)
    return manifest
