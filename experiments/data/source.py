"""Rows from a local folder laid out like the hub's repositories, or from the hub.

The `datasets` library reads both. It caches results computed from the rows in `data.cache_dir`, by
default `~/.cache/huggingface/datasets`. It identifies a local file by its path and the time of its
last change, so a replaced file is read again.
"""

from __future__ import annotations

import glob
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from experiments.errors import UserError, one_line

if TYPE_CHECKING:  # importing datasets takes seconds, and embedded data does not need it
    from datasets import Dataset

FORMAT = 1  # raise it when a function that `map_cached` runs changes: old results are then not used
PROBE_SECONDS = 5


def load_rows(
    name: str,
    config: str | None,
    split: str,
    columns: Sequence[str],
    root: str | None,
    cache_dir: str | None,
    rows: int | None = None,
) -> Dataset:
    """The rows of one split, from the folder ``root``/``name`` if there is one, else from the hub.

    rows: how many are expected, None for any. Raises UserError for what is missing, damaged or not
    as expected, and ValueError for a missing column.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    if root is not None and not Path(root).is_dir():
        raise UserError(
            f"data.root (or HIGHWAY_BP_DATA): {str(root)!r} is not a folder; give the folder "
            f"that holds {name}/, or leave it empty to use the hub"
        )
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we report errors in one line
    folder = Path(root or "$HIGHWAY_BP_DATA") / name  # without root, for messages only
    try:
        if folder.is_dir():  # name its files: with the folder alone, a replaced file is missed
            source, config, files = "parquet", None, {split: _files(folder, config, split)}
        else:
            offline_unless_reachable()
            source, files = name, None
        found = datasets.load_dataset(
            source, config, data_files=files, split=split, cache_dir=cache_dir
        )
    except (DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        why = one_line(cause)[:200]
        where = "incomplete in" if folder.is_dir() else "not on the hub, nor in"
        raise UserError(
            f"data set {name!r}, split {split!r}: {where} {folder} ({why}); download "
            f"{split}-*.parquet from the hub into that folder (data.root or HIGHWAY_BP_DATA)"
        ) from error
    if rows not in (None, len(found)):
        raise UserError(
            f"data: {name}, split {split!r} has {len(found)} rows, {rows} expected; a file is "
            "missing or of another release: download the split again, or set its rows to null"
        )
    kept = found.select_columns(list(columns))
    for column in columns:
        if nulls := kept.data.column(column).null_count:
            place = f"{name}, split {split!r}: {column}"
            raise UserError(f"data: {place} is null in {nulls} rows; expected a value in each")
    return kept


def _files(folder: Path, config: str | None, split: str) -> list[str]:
    """Return a split's parquet files as patterns; ValueError if one is missing."""
    pattern = f"{split}-*.parquet"
    if config and not (folder / config).is_dir():  # other folders are those of other configs
        files = sorted([*folder.glob(pattern), *folder.glob(f"data/{pattern}")])
    else:
        files = sorted((folder / (config or "")).rglob(pattern))
    count = files[0].stem.rpartition("-of-")[2] if files else "00001"
    if count.isdigit() and len(files) != int(count):
        wanted = f"{config}/{pattern}" if config else pattern
        raise ValueError(f"{len(files)} files {wanted}, {int(count)} expected")
    return [glob.escape(str(file)) for file in files]


def offline_unless_reachable() -> None:
    """Go offline if one short request fails: the libraries retry for half a minute and more."""
    import datasets
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def map_cached(
    rows: Dataset,
    make: Callable[..., dict],
    doing: str,
    batch_size: int | None = 1000,
    **settings: Any,
) -> Dataset:
    """Return ``make(batch, **settings)`` for all rows; the next call reads it from the cache.

    The cache key is made of rows, function name, batch_size, settings and FORMAT. batch_size: rows
    at a time, None for all at once. ``doing`` is printed if the cache does not have the result.
    Raises UserError if the cache is damaged or its disk is full.
    """
    from datasets.fingerprint import Hasher

    function = f"{make.__module__}.{make.__qualname__}"
    key = Hasher.hash([rows._fingerprint, function, batch_size, settings, FORMAT])
    if not Path(rows._get_cache_file_path(key)).exists():
        print(f"{doing} (once)", flush=True)
    try:
        return rows.map(
            make,
            batched=True,
            batch_size=batch_size,
            remove_columns=rows.column_names,
            fn_kwargs=settings,
            new_fingerprint=key,
        )
    except (ValueError, OSError, SyntaxError) as error:  # PIL raises all three
        why, place = one_line(error)[:200], Path(rows.cache_files[0]["filename"]).parent
        raise UserError(
            f"{doing}: {why}; the data are damaged, or {place} is or cannot be written: "
            "download the data again, delete that folder, or make room"
        ) from error


def concatenated(rows: Dataset, column: str) -> Tensor:
    """Return all numbers of a column of lists, concatenated and copied: (N,)."""
    chunks = rows.data.column(column).chunks
    return torch.from_numpy(np.concatenate([chunk.flatten().to_numpy() for chunk in chunks]))
