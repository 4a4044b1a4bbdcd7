"""Outcome tables from what others have measured: CSV, JSONL, lm-eval's logs, AlpacaEval's votes.

Every reader yields rows that know where they come from; one builder checks them all, so a mistake
names its file and line whatever the format.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from routers.outcomes import SPLITS, OutcomeTable, Prompts, TableError

__all__ = ["FORMATS", "ImportOptions", "Row", "build_table", "read_rows"]

NUMBERS = ("input_tokens", "output_tokens", "latency_s", "cost_usd")
# The csv module's own limit, 128 KiB, is less than a long prompt.
MAX_CELL = 1 << 30
PLAIN_COLUMNS = ("prompt", "model", "score", "prompt_id", "category", "split", *NUMBERS)


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What files do not say themselves.

    Attributes:
        model: The model's name, where files hold one model's answers and do not name it.
        metric: lm-eval's metric to take for the score, or ``METRIC,FILTER``; none takes the only
            one there is, of the first filter.
        columns: Names of columns by what they stand for, as in ``{"prompt": "question"}``.
    """

    model: str | None = None
    metric: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One cell of a table, as it was read; nothing is checked yet.

    Attributes:
        where: File and line, for messages.
        values: By the names of ``PLAIN_COLUMNS``.
    """

    where: str
    values: Mapping[str, Any]


def read_csv(path: Path, options: ImportOptions) -> Iterator[Row]:
    """Rows of a CSV file with the columns ``prompt``, ``model``, ``score``; others by name."""
    csv.field_size_limit(MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        _check_columns(path, reader.fieldnames or [], options)
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if None in values or None in values.values():
                raise TableError(f"{where}: its number of cells is not that of the first line")
            yield Row(where, _renamed(values, options))


def read_jsonl(path: Path, options: ImportOptions) -> Iterator[Row]:
    """Objects, one per line, with the fields ``prompt``, ``model``, ``score``; others by name."""
    for where, values in _json_lines(path):
        _check_columns(path, list(values), options, where)
        yield Row(where, _renamed(values, options))


def read_lm_eval(path: Path, options: ImportOptions) -> Iterator[Row]:
    """Samples that lm-eval logged (``--log_samples``), one file per task and model.

    The prompt is what was sent, the category the task's name, and the model's name that of the
    folder lm-eval made for it, unless given. A log has every answer once per filter.
    """
    match = re.fullmatch(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT[\d.:-]+)?\.jsonl", path.name)
    if match is None:
        raise TableError(f"{path}: lm-eval calls its logs samples_TASK_TIME.jsonl; keep that name")
    wanted, _, kept = (options.metric or "").partition(",")
    filters: set[str] = set()
    for where, values in _json_lines(path):
        filters.add(found := str(values.get("filter", "")))
        kept = kept or found
        if found != kept:
            continue
        metric = wanted or _only_metric(where, values)
        if metric not in values:
            known = ", ".join(repr(name) for name in _metrics(values)) or "none"
            raise TableError(f"{where}: no metric {metric!r}; it has {known}: give --metric")
        yield Row(
            where,
            {
                "prompt": _lm_eval_prompt(where, values),
                "model": options.model or path.parent.name,
                "score": values[metric],
                "category": match[1],
            },
        )
    if filters and kept not in filters:
        known = ", ".join(map(repr, sorted(filters)))
        raise TableError(f"{path}: no filter {kept!r} for --metric; it has {known}")


def read_alpaca_eval(path: Path, options: ImportOptions) -> Iterator[Row]:
    """AlpacaEval's ``annotations.json``: the score is the second output's win, half for a tie."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TableError(f"{path}: no JSON: {error}") from error
    if not isinstance(entries, list):
        raise TableError(f"{path}: must be a list of annotations, as AlpacaEval writes it")
    for number, entry in enumerate(entries):
        where = f"{path}, entry {number}"
        if not isinstance(entry, dict):
            raise TableError(f"{where}: must be an object, not {type(entry).__name__}")
        missing = [n for n in ("instruction", "generator_2", "preference") if n not in entry]
        if missing:
            raise TableError(f"{where}: lacks {', '.join(map(repr, missing))}")
        preference = entry["preference"]
        if preference is None:  # the annotator's answer could not be read
            continue
        yield Row(
            where,
            {
                "prompt": entry["instruction"],
                "model": options.model or entry["generator_2"],
                # A tie is 1.5, in old files 0.
                "score": (_number(where, "preference", preference) or 1.5) - 1,
                **({"category": entry["dataset"]} if "dataset" in entry else {}),
            },
        )


FORMATS: dict[str, Callable[[Path, ImportOptions], Iterator[Row]]] = {
    "csv": read_csv,
    "jsonl": read_jsonl,
    "lm-eval": read_lm_eval,
    "alpaca-eval": read_alpaca_eval,
}


def read_rows(paths: Iterable[Path], layout: str | None, options: ImportOptions) -> Iterator[Row]:
    """Rows of several files.

    Args:
        paths: The files.
        layout: The format of all of them, one of ``FORMATS``; none takes each file's ending.
        options: What the files do not say themselves.

    Raises:
        TableError: A file's format is unknown, it cannot be read, or is not as its format must be.
    """
    for path in paths:
        found = layout or path.suffix.removeprefix(".")
        if found not in FORMATS:
            raise TableError(f"{path}: which format is it? Give --format")
        try:
            yield from FORMATS[found](path, options)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise TableError(f"{path}: cannot be read: {error}") from error


def build_table(rows: Iterable[Row]) -> OutcomeTable:
    """Check rows and put them together.

    Prompts without a ``prompt_id`` get one from their text, so that several models' answers to one
    prompt meet; for that, all rows of a text must have one, or none.

    Raises:
        TableError: A value is missing or out of range, or two rows contradict each other; it names
            both.
    """
    import numpy as np

    prompts: dict[str, tuple[str, Row]] = {}
    firsts_of_text: dict[tuple[str, bool], Row] = {}
    cells: dict[tuple[str, str], Row] = {}
    models: dict[str, int] = {}
    for row in rows:
        text, model = _text(row, "prompt"), _text(row, "model")
        for name in ("model", "prompt_id", "category"):
            value = row.values.get(name)
            if isinstance(value, str) and value != value.strip():
                raise TableError(f"{row.where}: {name} is {value!r}; take the blanks off its ends")
        given = row.values.get("prompt_id")
        named = given not in (None, "")
        prompt_id = str(given) if named else _prompt_id(text)
        firsts_of_text.setdefault((text, named), row)
        if (other := firsts_of_text.get((text, not named))) is not None:
            raise TableError(f"{row.where}: {'a' if named else 'no'} prompt_id, unlike the same "
                             f"prompt in {other.where}; give it to both or none")  # fmt: skip
        known = prompts.setdefault(prompt_id, (text, row))
        if known[0] != text:
            raise TableError(f"{row.where}: another prompt has the id {prompt_id!r} in "
                             f"{known[1].where}; give each prompt its own")  # fmt: skip
        for name in ("category", "split"):
            ours, theirs = row.values.get(name), known[1].values.get(name)
            if ours != theirs:
                raise TableError(f"{row.where}: {name} {ours!r}, but {theirs!r} for the same "
                                 f"prompt in {known[1].where}; make them equal")  # fmt: skip
        if (earlier := cells.get((prompt_id, model))) is not None:
            raise TableError(f"{row.where}: prompt and model are those of {earlier.where}; "
                             "keep one of the two")  # fmt: skip
        cells[prompt_id, model] = row
        models.setdefault(model, len(models))
    if not cells:
        raise TableError("there are no rows to import")
    places = {prompt_id: place for place, prompt_id in enumerate(prompts)}
    shape = (len(prompts), len(models))
    numbers = {name: np.full(shape, np.nan) for name in ("score", *NUMBERS)}
    for (prompt_id, model), row in cells.items():
        place = places[prompt_id], models[model]
        numbers["score"][place] = _score(row)
        for name in NUMBERS:
            if (value := row.values.get(name)) not in (None, ""):
                numbers[name][place] = _at_least_zero(row.where, name, value)
    used = {n: m for n, m in numbers.items() if n == "score" or not np.isnan(m).all()}
    firsts = [row for _, row in prompts.values()]
    return OutcomeTable(
        Prompts(
            ids=list(prompts),
            texts=[text for text, _ in prompts.values()],
            categories=_column(firsts, "category"),
            splits=_splits(firsts),
        ),
        models=list(models),
        numbers=used,
    )


def _check_columns(
    path: Path, found: Sequence[str], options: ImportOptions, where: str | None = None
) -> None:
    names = {options.columns.get(name, name): name for name in PLAIN_COLUMNS}
    needed = [name for name in ("prompt", "score") if options.columns.get(name, name) not in found]
    model_column = options.columns.get("model", "model")
    if model_column not in found and options.model is None:
        needed.append("model")
    if needed:
        there = ", ".join(map(repr, found)) or "none"
        raise TableError(
            f"{where or f'{path}, line 1'}: no {', '.join(map(repr, needed))}; it has {there}. "
            f"Say which is which with --column {needed[0]}=NAME"
            + (" or give --model" if needed == ["model"] else "")
        )
    if unknown := sorted(set(options.columns) - set(PLAIN_COLUMNS)):
        raise TableError(f"--column {unknown[0]}=...: unknown; known: {', '.join(names.values())}")


def _renamed(values: Mapping[str, Any], options: ImportOptions) -> dict[str, Any]:
    found = {name: values.get(options.columns.get(name, name)) for name in PLAIN_COLUMNS}
    return {**found, "model": options.model or found["model"]}


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TableError(f"{where}: no JSON: {error}") from error
            if not isinstance(values, dict):
                raise TableError(f"{where}: must be an object, not {type(values).__name__}")
            yield where, values


def _metrics(values: Mapping[str, Any]) -> list[str]:
    """Fields of an lm-eval sample that may be metrics: numbers that are not its own."""
    own = {"doc_id", "doc_hash", "prompt_hash", "target_hash", "target"}
    return [
        name for name, value in values.items() if name not in own and isinstance(value, int | float)
    ]


def _only_metric(where: str, values: Mapping[str, Any]) -> str:
    found = _metrics(values)
    if len(found) != 1:
        listed = ", ".join(map(repr, found)) or "none"
        raise TableError(f"{where}: its metrics are {listed}; choose one with --metric")
    return found[0]


def _lm_eval_prompt(where: str, values: Mapping[str, Any]) -> Any:
    """What was sent: newer versions log named arguments, older ones lists."""
    arguments = values.get("arguments")
    try:
        if isinstance(arguments, dict):
            return arguments["gen_args_0"]["arg_0"]
        return arguments[0][0]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        raise TableError(f"{where}: 'arguments' hold no prompt; log with --log_samples") from None


def _text(row: Row, name: str) -> str:
    value = row.values.get(name)
    if not isinstance(value, str) or not value.strip():
        raise TableError(f"{row.where}: {name} is {value!r}; it must be a text")
    return value


def _number(where: str, name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise TableError(f"{where}: {name} is {value!r}; it must be a number")
    return number


def _score(row: Row) -> float:
    value = row.values.get("score")
    if value is None or not str(value).strip():
        raise TableError(
            f"{row.where}: score is empty; leave the row out: a missing cell is one without a row"
        )
    score = _number(row.where, "score", value)
    if not 0 <= score <= 1:
        raise TableError(f"{row.where}: score is {score:g}; scale scores to lie in [0, 1]")
    return score


def _at_least_zero(where: str, name: str, value: Any) -> float:
    number = _number(where, name, value)
    if number < 0:
        raise TableError(f"{where}: {name} is {number:g}; it must not be negative")
    return number


def _prompt_id(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _column(rows: list[Row], name: str) -> list[str] | None:
    values = [row.values.get(name) for row in rows]
    if all(value in (None, "") for value in values):
        return None
    for row, value in zip(rows, values, strict=True):
        if not isinstance(value, str | int) or value == "":
            raise TableError(f"{row.where}: {name} is {value!r}; give every prompt one, or none")
    return [str(value) for value in values]


def _splits(rows: list[Row]) -> list[str] | None:
    splits = _column(rows, "split")
    for row, split in zip(rows, splits or (), strict=False):
        if split not in SPLITS:
            raise TableError(f"{row.where}: split is {split!r}; known: {', '.join(SPLITS)}")
    return splits
