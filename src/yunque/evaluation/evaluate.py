"""Generate-and-score of one model folder: answers to held-out prompts, on any number of ranks, and their scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.console import Console
from tqdm.auto import tqdm

from yunque.distributed.checkpoint import StopSignal
from yunque.errors import InputError, Stopped
from yunque.evaluation.answers import FIRST_SAMPLE
from yunque.evaluation.arguments import (
    DecodingArguments,
    EvaluatedModelArguments,
    EvaluationArguments,
    HeldOutArguments,
)
from yunque.evaluation.divergence import AlignedPolicy
from yunque.evaluation.evaluation_files import EvaluationFolder, fingerprint, finish, show, write_sweep
from yunque.evaluation.generators import Generator
from yunque.evaluation.judging import embed, judge_of
from yunque.evaluation.loading import load_generator
from yunque.evaluation.progress import Progress
from yunque.evaluation.prompting import prepare, row_share
from yunque.evaluation.scoring import AnsweredRow
from yunque.evaluation.settings import Setting, expand
from yunque.evaluation.speed import measure_speed
from yunque.evaluation.work import Work
from yunque.metrics.formats import Check, compile_pattern, json_schema, pattern
from yunque.metrics.voting import majority, vote_key

Record = dict[str, Any]


def evaluate(
    model: EvaluatedModelArguments,
    data: HeldOutArguments,
    decoding: DecodingArguments,
    args: EvaluationArguments,
    *,
    argv: Sequence[str],
    quiet: bool = False,
) -> None:
    """Evaluate ``model`` under every setting of ``decoding``; each leaves evaluation.json and generations.jsonl.

    ``quiet`` prints nothing.

    Raises:
        InputError: anything that was asked for and cannot be; nothing half-written remains.
        Stopped: a signal came; finished batches are kept.
    """
    settings = expand(decoding)
    checks = _checks(decoding, args)
    folders = _folders(settings, args)
    for folder in folders:
        folder.check(args, str(model.model_name_or_path))
    on_gpu = torch.accelerator.is_available()
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="no")  # the weights' own precision is what is deployed
    console = Console(quiet=quiet or not accelerator.is_main_process, soft_wrap=True)
    embed(model, data, args)
    judge, aligned = judge_of(args), _aligned(model, args)
    generator = load_generator(model.loading(), accelerator.device)
    for setting in settings:
        generator.check(setting)
    prompts = prepare(generator, data, str(model.model_name_or_path), decoding.max_new_tokens)
    batches = prompts.batches(args.per_device_eval_batch_size)
    described = generator.describe()
    work = Work(model, data, args, argv, accelerator, console, prompts, batches, checks, judge, aligned, described)
    for setting, folder in zip(settings, folders, strict=True):
        folder.identify(work, setting)
    accelerator.wait_for_everyone()
    todo = [pair for pair in zip(settings, folders, strict=True) if not pair[1].finished]
    for folder in folders:
        if folder.finished:
            console.print(f"{folder.path}: evaluated already")
    console.print(f"{len(prompts):,} prompts in {len(batches):,} batches; {work.described['kind']} model", markup=False)
    with StopSignal() as signal:
        speeds = [_answer(work, setting, folder, generator, signal) for setting, folder in todo]
        for setting, folder in todo:
            _diverge(work, setting, folder, generator, signal)
        del generator
        if todo:
            fresh = _fresh_process(work, decoding.max_new_tokens)
            speeds = [speed | {"fresh_process": fresh} for speed in speeds]
        for _, folder in todo:
            _judge(work, folder, signal)
    _finish(work, todo, speeds, settings, folders)
    accelerator.end_training()


def _finish(
    work: Work,
    todo: Sequence[tuple[Setting, EvaluationFolder]],
    speeds: Sequence[dict[str, Any]],
    settings: Sequence[Setting],
    folders: Sequence[EvaluationFolder],
) -> None:
    """Score and write on the main process.

    Raises:
        InputError: what it met, on every rank.
    """
    problem = None
    if work.accelerator.is_main_process:
        try:
            results = [
                finish(work, setting, folder, _rows(work, folder), speed)
                for (setting, folder), speed in zip(todo, speeds, strict=True)
            ]
            if len(folders) > 1:
                write_sweep(Path(work.args.output_dir), settings, folders)
            for (_, folder), result in zip(todo, results, strict=True):
                show(work.console, folder.path, result)
        except InputError as error:
            problem = str(error)
    met = [text for text in gather_object([problem]) if text is not None]
    if met:
        raise InputError(met[0])


def _checks(decoding: DecodingArguments, args: EvaluationArguments) -> list[Check]:
    if decoding.vote_pattern is not None:
        compile_pattern(decoding.vote_pattern, "vote_pattern")
    checks = [] if args.format_schema is None else [json_schema(args.format_schema)]
    return checks if args.format_pattern is None else [*checks, pattern(args.format_pattern)]


def _aligned(model: EvaluatedModelArguments, args: EvaluationArguments) -> AlignedPolicy | None:
    name = args.kl_model_name_or_path
    if name is None:
        return None
    return AlignedPolicy(name, fingerprint(name) == fingerprint(str(model.model_name_or_path)))


def _folders(settings: Sequence[Setting], args: EvaluationArguments) -> list[EvaluationFolder]:
    root = Path(args.output_dir)
    return [EvaluationFolder(root if len(settings) == 1 else root / setting.name) for setting in settings]


# --- answers ----------------------------------------------------------------------------------------------------------


def _answer(
    work: Work, setting: Setting, folder: EvaluationFolder, generator: Generator, signal: StopSignal
) -> dict[str, Any]:
    """Answer the batches that are still to do, and time the first token; what speed and memory came to."""

    def record(number: int) -> Record:
        return _answered_batch(work, setting, generator, work.batches[number])

    _run_batches(work, folder.answers, record, f"answers {setting.name}", signal)
    peak = max(gather_object([generator.peak_memory_bytes()]))
    latencies = _latencies(work, setting, generator) if work.accelerator.is_main_process else []
    return {"peak_memory_bytes": peak, "first_token_s": latencies}


def _answered_batch(work: Work, setting: Setting, generator: Generator, rows: Sequence[int]) -> Record:
    count, args, prompts = setting.num_samples, work.args, work.prompts
    expression = None if setting.vote_pattern is None else compile_pattern(setting.vote_pattern, "vote_pattern")
    queries = [prompts.input_ids[row] for row in rows]
    samples = [_samples(work, setting, rows, number) for number in range(count)]
    begin, cpu_begin = time.perf_counter(), time.process_time()
    drawn = [generator.answers(queries, setting, seed=args.seed, samples=numbers) for numbers in samples]
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    texts = [_decoded(generator, [answer.tokens for answer in answers]) for answers in drawn]
    found: list[Record] = []
    for place, row in enumerate(rows):
        told = [answers[place] for answers in texts]
        vote = majority([vote_key(text, expression) for text in told]) if count > 1 else None
        winner = drawn[0 if vote is None else vote.winner][place]
        answered: Record = {
            "row": row,
            "answer": told[0 if vote is None else vote.winner],
            "tokens": len(winner.tokens),
            "finished": winner.finished,
        }
        if vote is not None:
            answered |= {"samples": told, "agreement": vote.agreement}
        found.append(answered)
    losses = _losses(work, generator, rows) if args.reference_loss else {}
    for record in found:
        record |= losses.get(record["row"], {})
    tokens = sum(len(answer.tokens) + answer.finished for answers in drawn for answer in answers)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "new_tokens": tokens, "rows": found}


def _samples(work: Work, setting: Setting, rows: Sequence[int], number: int) -> list[int]:
    """Numbers, over the whole evaluation, of the rows' samples ``number``: what their random numbers follow from."""
    return [FIRST_SAMPLE + work.prompts.rows.positions[row] * setting.num_samples + number for row in rows]


def _losses(work: Work, generator: Generator, rows: Sequence[int]) -> dict[int, Record]:
    known = [row for row in rows if work.prompts.rows.references[row]]
    if not known:
        return {}
    references = [work.prompts.rows.references[row][0] for row in known]
    losses = generator.reference_losses([work.prompts.input_ids[row] for row in known], references)
    if losses is None:
        return {}
    return {
        row: {"nats": loss.nats, "reference_tokens": loss.num_tokens, "reference_cut": loss.num_cut}
        for row, loss in zip(known, losses, strict=True)
        if loss is not None
    }


def _decoded(generator: Generator, tokens: Sequence[Sequence[int]]) -> list[str]:
    return [text.strip() for text in generator.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _latencies(work: Work, setting: Setting, generator: Generator) -> list[float]:
    """Seconds from a prompt to its first token, one prompt at a time, after one to warm up."""
    count = min(work.args.latency_prompts, len(work.prompts))
    if not count:
        return []
    first = setting.with_one_token()
    seconds = []
    for row in [0, *range(count)]:
        begin = time.perf_counter()
        generator.answers([work.prompts.input_ids[row]], first, seed=work.args.seed, samples=[FIRST_SAMPLE + row])
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


# --- distance to the aligned model, speed -----------------------------------------------------------------------------


def _diverge(work: Work, setting: Setting, folder: EvaluationFolder, generator: Generator, signal: StopSignal) -> None:
    """Measure how far the model is from the aligned one, each batch on the rank whose turn it is."""
    aligned = work.aligned
    if aligned is None:
        return
    aligned.load(generator, work.accelerator.device)

    def record(number: int) -> Record:
        rows = work.batches[number]
        queries, samples = [work.prompts.input_ids[row] for row in rows], _samples(work, setting, rows, 0)
        values = aligned.divergences(generator, queries, setting, seed=work.args.seed, samples=samples)
        return {"rows": [{"row": row, "kl": value} for row, value in zip(rows, values, strict=True)]}

    _run_batches(work, folder.kl, record, f"KL {setting.name}", signal)


def _fresh_process(work: Work, max_new_tokens: int) -> dict[str, Any] | None:
    """What the main process measured, on every rank.

    Raises:
        InputError: the measuring process failed, on every rank.
    """
    found: list[Any] = [None, None]
    if work.args.measure_speed and work.accelerator.is_main_process:
        try:
            found[0] = measure_speed(work.model, work.args, work.prompts.input_ids, max_new_tokens)
        except InputError as error:
            found[1] = str(error)
    measured, problem = gather_object([found])[0]
    if problem is not None:
        raise InputError(problem)
    return dict(measured) if measured else None


# --- toxicity ---------------------------------------------------------------------------------------------------------


def _judge(work: Work, folder: EvaluationFolder, signal: StopSignal) -> None:
    """Judge the toxicity of all answers, each batch on the rank whose turn it is."""
    judge = work.judge
    if judge is None:
        return
    judge.load(work.accelerator.device)
    answered = folder.answers.records()

    def record(number: int) -> Record:
        rows = answered[number]["rows"]
        values = judge.toxicity([row["answer"] for row in rows])
        return {"rows": [{"row": row["row"], "toxicity": value} for row, value in zip(rows, values, strict=True)]}

    _run_batches(work, folder.toxicity, record, "toxicity", signal)


def _run_batches(
    work: Work, progress: Progress, record: Callable[[int], Record], name: str, signal: StopSignal
) -> None:
    """Let every rank do its share of the batches that are not on the disk yet.

    Raises:
        Stopped: any rank was asked to.
    """
    accelerator = work.accelerator
    if accelerator.is_main_process:
        progress.begin()
    accelerator.wait_for_everyone()
    done = set(progress.records())
    accelerator.wait_for_everyone()  # before any rank writes what another would take for done
    share = row_share(work.batches, done, accelerator.process_index, accelerator.num_processes)
    with progress.writer(accelerator.process_index) as file:
        for number in _shown(share, name, len(done), not work.console.quiet):
            if signal.noted:
                break
            file.append({"batch": number, **record(number)})
    if signal.agreed(accelerator):
        count = len(progress.records())
        raise Stopped(f"{count} of {len(work.batches)} batches are kept in {progress.folder}; go on with --resume")


def _shown(share: Sequence[int], name: str, done: int, visible: bool) -> Iterator[int]:
    return iter(tqdm(share, desc=name, unit="batch", leave=False, disable=not visible, postfix={"done": done}))


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(work: Work, folder: EvaluationFolder) -> list[AnsweredRow]:
    """The rows with everything that all ranks found, in the order of the data."""
    found: dict[int, Record] = {}
    parts = [(folder.answers, True), (folder.toxicity, work.judge is not None), (folder.kl, work.aligned is not None)]
    for progress in (part for part, is_there in parts if is_there):
        for record in progress.records().values():
            for row in record["rows"]:
                found.setdefault(row["row"], {}).update(row)
    held_out = work.prompts.rows
    if missing := len(work.prompts) - len(found):
        raise InputError(f"output_dir: {folder.path} lacks {missing} answers; is it the same folder on every node?")
    return [
        AnsweredRow(
            position=held_out.positions[row],
            id=held_out.ids[row],
            prompt=work.prompts.queries[row],
            references=held_out.references[row],
            **{name: value for name, value in found[row].items() if name != "row"},
        )
        for row in range(len(work.prompts))
    ]
