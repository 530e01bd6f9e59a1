"""What a data file holds, in tokens: lengths per field, what a limit would cut, classes, duplicates, templates."""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from yunque.data.arguments import SourceArguments
from yunque.data.encoding import encode
from yunque.data.loading import RawSplit, open_source, require_column, text_of
from yunque.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

LIMITS = (512, 1024, 2048)
_ID_COLUMNS = ("id", "fname")
_MAX_CLASSES = 50
_SHINGLE_WORDS = 5
_BATCH_ROWS = 1000


@dataclass(frozen=True)
class Cut:
    """What a limit of ``limit_tokens`` would take away."""

    limit_tokens: int
    rows: int
    share_rows: float
    tokens_lost: int
    share_tokens: float


@dataclass(frozen=True)
class Lengths:
    """Tokens of one field or template, special tokens included, over the rows that have it."""

    rows: int
    missing: int
    tokens: int
    mean: float
    median: float
    p95: float
    max: int
    cuts: list[Cut]


@dataclass(frozen=True)
class Overlap:
    """Rows of ``split`` whose text of ``field`` is also in ``other``, by itself and nearly; shares of the texts there.

    exact: the same but for case and white space. Where both name one split, it is rows that repeat an earlier one.
    """

    split: str
    other: str
    field: str
    texts: int
    exact: int
    near: int | None
    share: float


@dataclass(frozen=True)
class SplitStatistics:
    """Everything about one split."""

    name: str
    split: str
    rows: int
    sha256: str
    fields: dict[str, Lengths]
    classes: dict[str, dict[str, Lengths]]
    templates: dict[str, Lengths]


@dataclass(frozen=True)
class DataStatistics:
    """The splits of one source, and what they share."""

    tokenizer: str
    splits: list[SplitStatistics]
    overlaps: list[Overlap]


@dataclass(frozen=True)
class StatisticsOptions:
    """What to look at.

    fields: columns to count; by default every column of texts but ids and the label. near_threshold: share of common
    shingles (5 words) from which two texts are near-duplicates; 0 switches that off. plot: PNG file for histograms.

    Raises:
        InputError: a limit below 1, a threshold outside [0, 1], a plot in a folder that is not there.
    """

    fields: Sequence[str] = ()
    label: str | None = None
    limits: Sequence[int] = LIMITS
    templates: Sequence[str] = ()
    near_threshold: float = 0.8
    plot: Path | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        if any(limit < 1 for limit in self.limits):
            raise InputError(f"--limit: {min(self.limits)} is no number of tokens; give 1 or more")
        if not 0 <= self.near_threshold <= 1:
            raise InputError(f"--near: {self.near_threshold} is not a share; give 0 (off) to 1")
        if self.plot is not None and not self.plot.parent.is_dir():  # now rather than after minutes of counting
            raise InputError(f"--plot: no such folder: {self.plot.parent}")


def open_splits(names: Sequence[str], config: str | None = None) -> list[RawSplit]:
    """Read all splits of files, folders or hub ids; two files are two splits, called by their names.

    Raises:
        InputError: as ``open_source``; two splits of the same name.
    """
    splits: dict[str, RawSplit] = {}
    for name in names:
        for split, reader in open_source(SourceArguments(dataset_name=name, dataset_config=config)).items():
            raw = reader()
            label = Path(name).name.partition(".")[0] if Path(name).is_file() else split
            if label in splits:
                label = f"{name}:{split}"
            if label in splits:
                raise InputError(f"{name}: given twice")
            splits[label] = RawSplit(raw.name, label, raw.columns, raw.rows, raw.sha256)
    return list(splits.values())


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer by folder or hub id.

    Raises:
        InputError: there is none.
    """
    from transformers import AutoTokenizer

    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise InputError(f"--tokenizer: no such folder: {name}")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub, its client and the parsers raise many unrelated types
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise InputError(f"--tokenizer: cannot load one from {name}: {reason}") from error


def statistics(
    raws: Sequence[RawSplit], tokenizer: PreTrainedTokenizerBase, options: StatisticsOptions
) -> tuple[DataStatistics, dict[str, dict[str, np.ndarray]]]:
    """Statistics of all splits, and by split and field the token counts they rest on (for plots).

    Raises:
        InputError: a column or a template's column that is not there, a column of lists, too many classes.
    """
    splits, counts = [], {}
    texts: dict[str, dict[str, list[str]]] = {}
    for raw in raws:
        fields = _fields(raw, options)
        columns = {name: _texts(raw, name) for name in fields}
        tokens = {name: _count(column, tokenizer) for name, column in columns.items()}
        counts[raw.split] = {name: values[values >= 0] for name, values in tokens.items()}
        texts[raw.split] = {name: [_normalised(text) for text in column if text] for name, column in columns.items()}
        prompts = {template: _prompts(raw, template, fields) for template in options.templates}
        splits.append(
            SplitStatistics(
                name=raw.name,
                split=raw.split,
                rows=len(raw.rows),
                sha256=raw.sha256,
                fields={name: lengths(values, options.limits) for name, values in tokens.items()},
                classes=_classes(raw, tokens, options),
                templates={
                    template: lengths(_count(filled, tokenizer), options.limits) for template, filled in prompts.items()
                },
            )
        )
    overlaps = _overlaps(texts, options.near_threshold)
    return DataStatistics(tokenizer.name_or_path, splits, overlaps), counts


def lengths(tokens: np.ndarray, limits: Sequence[int]) -> Lengths:
    """Summarise token counts; -1 stands for a row without a text."""
    present = tokens[tokens >= 0]
    total = int(present.sum())
    cuts = []
    for limit in limits:
        over = present[present > limit]
        lost = int((over - limit).sum())
        cuts.append(Cut(limit, len(over), len(over) / max(len(present), 1), lost, lost / max(total, 1)))
    if not len(present):
        return Lengths(0, len(tokens), 0, 0.0, 0.0, 0.0, 0, cuts)
    median, p95 = (float(np.quantile(present, share)) for share in (0.5, 0.95))
    missing = len(tokens) - len(present)
    return Lengths(len(present), missing, total, float(present.mean()), median, p95, int(present.max()), cuts)


# --- columns ----------------------------------------------------------------------------------------------------------


def _fields(raw: RawSplit, options: StatisticsOptions) -> list[str]:
    if options.fields:
        names = [name for field in options.fields for name in require_column(raw, field, "--field", numbered=True)]
        return list(dict.fromkeys(names))
    skipped = {*_ID_COLUMNS, options.label}
    found = [name for name in raw.columns if name not in skipped and _is_text(raw, name)]
    if not found:
        raise InputError(f"--field: '{raw.name}' has no column of texts among {', '.join(raw.columns)}; name one")
    return found


def _is_text(raw: RawSplit, column: str) -> bool:
    values = [value for row in raw.rows if (value := row.get(column)) not in (None, "")]
    return bool(values) and all(isinstance(value, str) for value in values) and not all(map(_is_number, values))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _texts(raw: RawSplit, column: str) -> list[str | None]:
    return [text_of(row.get(column), f"--field: '{column}' of '{raw.name}'") for row in raw.rows]


def _prompts(raw: RawSplit, template: str, fields: Sequence[str]) -> list[str | None]:
    """The template filled for every row; ``{text}`` stands for the first field where no column has that name."""
    try:
        parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
    except ValueError as error:
        raise InputError(f"--template: {template!r}: {error}; write a lone brace twice") from error
    columns: dict[str, list[str | None]] = {}
    for _, name in parts:
        if name is not None:
            column = fields[0] if name == "text" and "text" not in raw.columns else name
            columns[name] = _texts(raw, require_column(raw, column, "--template")[0])
    if not columns:
        raise InputError(f"--template: {template!r} names no column; put {{text}} or a column's name in braces")
    filled: list[str | None] = []
    for row in range(len(raw.rows)):
        values = {name: column[row] or "" for name, column in columns.items()}
        text = "".join(literal + ("" if name is None else values[name]) for literal, name in parts)
        filled.append(text if any(values.values()) else None)
    return filled


def _count(texts: Sequence[str | None], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tokens of each text as the tokenizer encodes it, special tokens included; -1 where there is none."""
    counts = np.full(len(texts), -1)
    present = [row for row, text in enumerate(texts) if text is not None]
    for start in range(0, len(present), _BATCH_ROWS):
        rows = present[start : start + _BATCH_ROWS]
        encoded = encode(tokenizer, [texts[row] or "" for row in rows])
        counts[rows] = [len(ids) for ids in encoded]
    return counts


def _classes(raw: RawSplit, tokens: dict[str, np.ndarray], options: StatisticsOptions) -> dict[str, dict[str, Lengths]]:
    if options.label is None:
        return {}
    require_column(raw, options.label, "--label")
    rows_of: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(raw.rows):
        rows_of[text_of(row.get(options.label), f"--label: '{options.label}'") or "(missing)"].append(number)
    if len(rows_of) > _MAX_CLASSES:
        raise InputError(f"--label: '{options.label}' has {len(rows_of):,} values, which is no column of classes")
    return {
        label: {name: lengths(counts[rows_of[label]], options.limits) for name, counts in tokens.items()}
        for label in sorted(rows_of, key=lambda label: -len(rows_of[label]))
    }


# --- duplicates -------------------------------------------------------------------------------------------------------


def _normalised(text: str) -> str:
    """The text in one case, with single blanks between words."""
    return " ".join(text.casefold().split())


def _overlaps(splits: dict[str, dict[str, list[str]]], near_threshold: float) -> list[Overlap]:
    """By field: repetitions within each split, and texts of a split that are in the train or an earlier split."""
    overlaps = []
    for split, fields in splits.items():
        for field, texts in fields.items():
            repeats = len(texts) - len(set(texts))
            overlaps.append(Overlap(split, split, field, len(texts), repeats, None, repeats / max(len(texts), 1)))
    names = sorted(splits, key=lambda name: name != "train")
    pairs = [(split, other) for place, split in enumerate(names) for other in names[:place]]
    for split, other in pairs:
        for field, texts in splits[split].items():
            if field not in splits[other]:
                continue
            known = set(splits[other][field])
            rest = [text for text in texts if text not in known]
            exact = len(texts) - len(rest)
            near = _near(rest, known, near_threshold) if near_threshold else None
            share = (exact + (near or 0)) / max(len(texts), 1)
            overlaps.append(Overlap(split, other, field, len(texts), exact, near, share))
    return overlaps


def _near(texts: Sequence[str], others: Iterable[str], threshold: float) -> int:
    """How many ``texts`` have, with one of ``others``, a Jaccard index of 5-word shingles of at least ``threshold``.

    Exact, by an inverted index over ``texts``; texts of fewer words than a shingle are not compared.
    """
    shingles = [_shingles(text) for text in texts]
    holders: dict[int, list[int]] = defaultdict(list)
    for row, own in enumerate(shingles):
        for shingle in own:
            holders[shingle].append(row)
    found: set[int] = set()
    for other in others:
        theirs = _shingles(other)
        common = Counter(row for shingle in theirs for row in holders.get(shingle, ()))
        for row, count in common.items():
            if count / (len(shingles[row]) + len(theirs) - count) >= threshold:
                found.add(row)
    return len(found)


def _shingles(text: str) -> set[int]:
    words = text.split()
    return {hash(tuple(words[first : first + _SHINGLE_WORDS])) for first in range(len(words) - _SHINGLE_WORDS + 1)}


# --- showing ----------------------------------------------------------------------------------------------------------


def describe(result: DataStatistics) -> str:
    """The statistics as text: one table per split, then templates and duplicates."""
    lines = [f"tokenizer {result.tokenizer}; tokens include its special tokens"]
    for split in result.splits:
        lines += ["", f"{split.split} ({split.name}): {split.rows:,} rows"]
        rows = [(name, values) for name, values in split.fields.items()]
        for label, fields in split.classes.items():
            rows += [(f"{label}: {name}", values) for name, values in fields.items()]
        lines += _table("field", rows)
        if split.templates:
            lines += _table("template", [(repr(name), values) for name, values in split.templates.items()])
    lines += ["", "duplicates (same texts but for case and white space)"]
    for overlap in result.overlaps:
        near = "" if overlap.near is None else f", {overlap.near:,} nearly the same"
        place = "repeat an earlier one" if overlap.split == overlap.other else f"are in {overlap.other}"
        lines.append(f"  {overlap.split}, {overlap.field}: {overlap.exact:,} {place}{near} ({overlap.share:.1%})")
    return "\n".join(lines)


def _table(title: str, rows: Sequence[tuple[str, Lengths]]) -> list[str]:
    limits = [cut.limit_tokens for cut in rows[0][1].cuts]
    head = [title, "rows", "mean", "median", "p95", "max", *(f">{limit} (tokens lost)" for limit in limits)]
    cells = [head]
    for name, values in rows:
        shown = name if len(name) <= 40 else f"{name[:37]}..."
        cuts = [f"{cut.share_rows:.1%} ({cut.share_tokens:.1%})" for cut in values.cuts]
        numbers = [f"{values.rows:,}", f"{values.mean:.1f}", f"{values.median:.0f}", f"{values.p95:.0f}"]
        cells.append([shown, *numbers, f"{values.max:,}", *cuts])
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return [
        "  "
        + row[0].ljust(widths[0])
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in cells
    ]


def plot(counts: dict[str, dict[str, np.ndarray]], limits: Sequence[int], path: Path) -> None:
    """Draw a histogram of token counts per field, one line per split, with the limits as vertical lines.

    Raises:
        InputError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    fields = list(dict.fromkeys(name for columns in counts.values() for name in columns))
    figure: Figure = Figure(figsize=(7, 2.6 * len(fields)), layout="constrained")
    for place, field in enumerate(fields):
        axes = figure.add_subplot(len(fields), 1, place + 1)
        longest = max(int(columns[field].max(initial=1)) for columns in counts.values() if field in columns)
        bins = np.linspace(0, longest + 1, 61).tolist()
        for split, columns in counts.items():
            if field in columns and len(columns[field]):
                weights = np.full(len(columns[field]), 1 / len(columns[field]))
                axes.hist(columns[field], bins=bins, weights=weights, histtype="step", label=split)
        for limit in limits:
            if limit <= longest:
                axes.axvline(limit, color="gray", linestyle=":")
        axes.set(xlabel=f"tokens of {field}", ylabel="share of rows")
        axes.legend()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise InputError(f"--plot: {path} cannot be written: {error.strerror}") from error


def as_json(result: DataStatistics) -> dict[str, Any]:
    """The statistics as plain values."""
    from dataclasses import asdict

    return asdict(result)
