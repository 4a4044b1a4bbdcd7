"""Reads and writes the files of an outcome table; see ``routers.outcomes`` for the format."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from routers.base import RouterError
from routers.outcomes import NUMBER_COLUMNS, SHARES, Prompts, TableError, checked_card

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

__all__ = ["read_cards", "read_model_names", "read_outcomes", "read_prompts", "write_table"]

PROMPTS, OUTCOMES, MODELS = "prompts.parquet", "outcomes.parquet", "models.json"


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as exc:
        raise RouterError("outcome tables need pyarrow: pip install 'collegium[routers]'") from exc
    return pyarrow


def _read_parquet(path: Path, required: Sequence[str], optional: Sequence[str]) -> pa.Table:
    pa = _pyarrow()
    if not path.is_file():
        raise TableError(f"{path.name} is missing in {path.parent}")
    try:
        names = pa.parquet.read_schema(path).names
        missing = [name for name in required if name not in names]
        if missing:
            there = ", ".join(map(repr, names))
            raise TableError(f"{path.name}: column {missing[0]!r} is missing; it has {there}")
        columns = [name for name in (*required, *optional) if name in names]
        return pa.parquet.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise TableError(f"{path.name} cannot be read as parquet: {reason}") from exc


def _text_column(table: pa.Table, name: str, file: str) -> pa.Array:
    """A column as a plain array of strings without nulls."""
    pa = _pyarrow()
    column = table[name]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise TableError(f"{file}: column {name!r} must be text, not {kind}")
    column = column.cast(pa.large_string()).combine_chunks()
    if column.null_count:
        row = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
        raise TableError(f"{file}: column {name!r}, row {row}: empty")
    return column


def read_prompts(folder: Path) -> Prompts:
    """Read ``prompts.parquet``."""
    table = _read_parquet(folder / PROMPTS, ["prompt_id", "text"], ["category", "split"])
    columns: dict[str, list[str]] = {
        name: _text_column(table, name, PROMPTS).to_pylist() for name in table.column_names
    }
    return Prompts(
        columns["prompt_id"], columns["text"], columns.get("category"), columns.get("split")
    )


def read_cards(folder: Path) -> dict[str, dict[str, Any]]:
    """Read ``models.json``; none is an empty one."""
    path = folder / MODELS
    if not path.is_file():
        return {}
    try:
        cards = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as exc:
        raise TableError(f"{MODELS} cannot be read as JSON: {exc}") from exc
    if not isinstance(cards, dict):
        raise TableError(f"{MODELS} must be an object of models, not {type(cards).__name__}")
    return {name: checked_card(name, facts) for name, facts in cards.items()}


def _ordered(found: Sequence[str], first: Sequence[str]) -> list[str]:
    there = dict.fromkeys(found)
    return [*(name for name in first if name in there), *(n for n in there if n not in set(first))]


def read_model_names(folder: Path, first: Sequence[str]) -> list[str]:
    """Names in the column ``model``, and nothing else of the file."""
    table = _read_parquet(folder / OUTCOMES, ["model"], [])
    column = _text_column(table, "model", OUTCOMES)
    return _ordered(column.dictionary_encode().dictionary.to_pylist(), first)


def read_outcomes(
    folder: Path, prompt_ids: Sequence[str], first: Sequence[str]
) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """Read ``outcomes.parquet`` as matrices.

    Args:
        folder: The table.
        prompt_ids: Ids of the prompts, one per row of the matrices.
        first: Models to put first, if there.

    Returns:
        Names of the models, one per column, and matrices of shape (n_prompts, n_models) by name,
        NaN for missing cells.
    """
    import numpy as np

    pa = _pyarrow()
    required = ["prompt_id", "model", "score"]
    table = _read_parquet(folder / OUTCOMES, required, NUMBER_COLUMNS[1:])
    ids = _text_column(table, "prompt_id", OUTCOMES)
    names = _text_column(table, "model", OUTCOMES).dictionary_encode()
    found = pa.compute.index_in(ids, value_set=pa.array(prompt_ids, pa.large_string()))
    if found.null_count:
        row = int(found.is_null().to_numpy(zero_copy_only=False).argmax())
        raise TableError(
            f"{OUTCOMES}: column 'prompt_id', row {row}: {ids[row].as_py()!r} is not in {PROMPTS}"
        )
    models = _ordered(names.dictionary.to_pylist(), first)
    order = {name: number for number, name in enumerate(models)}
    columns = np.array([order[name] for name in names.dictionary.to_pylist()], np.intp)
    rows = found.to_numpy().astype(np.intp)
    cells = rows * len(models) + columns[names.indices.to_numpy()]
    _refuse_duplicates(cells, ids, models)
    numbers = {}
    for name in table.column_names[2:]:
        matrix = np.full(len(prompt_ids) * len(models), np.nan)
        matrix[cells] = _number_column(table, name)
        numbers[name] = matrix.reshape(len(prompt_ids), len(models))
    return models, numbers


def _refuse_duplicates(cells: NDArray[np.intp], ids: pa.Array, models: Sequence[str]) -> None:
    import numpy as np

    _, firsts = np.unique(cells, return_index=True)
    if len(firsts) < len(cells):
        again = np.ones(len(cells), bool)
        again[firsts] = False
        row = int(again.argmax())
        raise TableError(
            f"{OUTCOMES}: column 'model', row {row}: prompt {ids[row].as_py()!r} already has an "
            f"outcome of {models[cells[row] % len(models)]!r}"
        )


def _number_column(table: pa.Table, name: str) -> NDArray[np.float64]:
    import numpy as np

    pa = _pyarrow()
    column = table[name]
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise TableError(f"{OUTCOMES}: column {name!r} must be numbers, not {kind}")
    values: NDArray[np.float64] = column.cast(pa.float64()).to_numpy().copy()
    if name == "score":
        # NaN compares false, so a null or NaN score is refused too: a run that failed scores 0,
        # one that was not made has no row.
        wrong, bounds = ~((values >= 0) & (values <= 1)), "[0, 1]"
    else:
        most, bounds = (1.0, "[0, 1]") if name in SHARES else (np.finfo(float).max, "[0, inf)")
        wrong = ~(np.isnan(values) | ((values >= 0) & (values <= most)))
    if wrong.any():
        row = int(wrong.argmax())
        raise TableError(
            f"{OUTCOMES}: column {name!r}, row {row}: {values[row]:g} is outside {bounds}"
        )
    return values


def write_table(
    folder: Path,
    prompts: Prompts,
    models: Sequence[str],
    numbers: Mapping[str, NDArray[np.float64]],
    cards: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the files of a table; each appears whole or not at all."""
    import numpy as np

    pa = _pyarrow()
    folder.mkdir(parents=True, exist_ok=True)
    columns = {"prompt_id": prompts.ids, "text": prompts.texts}
    if prompts.categories is not None:
        columns["category"] = prompts.categories
    if prompts.splits is not None:
        columns["split"] = prompts.splits
    _write_parquet(pa.table(columns), folder / PROMPTS)
    rows, cols = np.nonzero(~np.isnan(numbers["score"]))
    outcomes: dict[str, Any] = {
        "prompt_id": pa.array(prompts.ids, pa.string()).take(pa.array(rows)),
        "model": pa.array(models, pa.string()).take(pa.array(cols)),
    }
    for name, matrix in numbers.items():
        outcomes[name] = pa.array(matrix[rows, cols], from_pandas=True)
    _write_parquet(pa.table(outcomes), folder / OUTCOMES)
    if cards:
        scratch = folder / f".{MODELS}"
        scratch.write_text(json.dumps(cards, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, folder / MODELS)
    else:
        (folder / MODELS).unlink(missing_ok=True)


def _write_parquet(table: pa.Table, path: Path) -> None:
    scratch = path.with_name(f".{path.name}")
    _pyarrow().parquet.write_table(table, scratch)
    os.replace(scratch, path)
