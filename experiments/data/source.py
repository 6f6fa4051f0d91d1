"""Where the rows come from: a local folder laid out like the hub's repository, or the hub.

Both go through the same `datasets.load_dataset(path, config)`. A local folder is checked first,
file by file, so that a broken download is named instead of ending in a stack trace.
"""

import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow
import pyarrow.parquet

from experiments.errors import UserError

if TYPE_CHECKING:  # importing datasets takes seconds, and a cached data set does not need it
    from datasets import Dataset, DatasetDict

SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.parquet")
PROBE_SECONDS = 5


def local_folder(root: str | None, name: str) -> Path | None:
    """The folder `<root>/<name>`, or None where it does not exist and the hub is to be asked.

    Raises UserError if `root` is given and is not a folder.
    """
    if root is None:
        return None
    if not Path(root).is_dir():
        raise UserError(
            f"data.root (or HIGHWAY_BP_DATA): {str(root)!r} is not a folder; give the folder "
            f"that holds {name}/, or leave it empty to use the hub"
        )
    folder = Path(root) / name
    return folder if folder.is_dir() else None


def checked_files(folder: Path, config: str | None, splits: Sequence[str]) -> list[Path]:
    """The parquet files of `splits` in a local folder, sorted, each one readable and none missing.

    Raises UserError that names the file which is missing, half-written or damaged.
    """
    place = folder / config if config and (folder / config).is_dir() else folder
    files = []
    for split in splits:
        found = sorted(place.rglob(f"{split}-*.parquet"))
        if not found:
            raise UserError(
                f"{place}: no {split}-*.parquet for the split {split!r}; download it from the "
                f"hub's repository into this folder"
            )
        _check_shards(found)
        for file in found:
            _check_footer(file)
        files += found
    return files


def _check_shards(files: list[Path]) -> None:
    names = {file.name for file in files}
    for file in files:
        shard = SHARD.fullmatch(file.name)
        if shard is None:
            continue
        for index in range(int(shard["count"])):
            wanted = f"{shard['stem']}-{index:05d}-of-{shard['count']}.parquet"
            if wanted not in names:
                raise UserError(
                    f"{file.parent / wanted}: missing, one of {int(shard['count'])} shards; "
                    f"download it again"
                )


def _check_footer(file: Path) -> None:
    """A parquet file ends with its index: one that was cut off has none."""
    try:
        pyarrow.parquet.ParquetFile(file).close()
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(file, error) from error


def _check_pages(files: Sequence[Path]) -> None:
    """Reads every file to its end, to name the one whose inside is damaged."""
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as parquet:
                for _ in parquet.iter_batches():
                    pass
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(file, error) from error


def _damaged(file: Path, error: BaseException) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    size = file.stat().st_size
    return UserError(
        f"{file}: half-written or damaged ({size} bytes, {reason}); delete it and download it again"
    )


def load_local(
    folder: Path, config: str | None, files: Sequence[Path], scratch: str
) -> "DatasetDict":
    """`datasets.load_dataset` of a folder whose `files` were checked; UserError if it fails.

    scratch: an empty folder for the copy that `datasets` makes. Its usual place would not do: a
    copy found there is taken even after a file in `folder` was replaced.
    """
    from datasets.exceptions import DatasetGenerationError, DatasetsError

    try:
        return _load(str(folder), config, scratch)
    except DatasetGenerationError as error:
        _check_pages(files)
        cause = error.__cause__ or error
        raise UserError(f"{folder}: loading failed ({_line(cause)})") from error
    except (DatasetsError, ValueError, OSError) as error:
        raise UserError(
            f"{folder}: cannot be read as the data set {config or 'default'!r} ({_line(error)}); "
            f"it must hold the hub's repository as it is, README.md included"
        ) from error


def load_files(files: Sequence[Path], scratch: str) -> "Dataset":
    """The rows of one split's ``files``, which were checked; UserError if a page is damaged."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=scratch)
    except DatasetGenerationError as error:
        _check_pages(files)
        cause = error.__cause__ or error
        raise UserError(f"{files[0].parent}: loading failed ({_line(cause)})") from error


def load_hub(name: str, config: str | None, root: str | None) -> "DatasetDict":
    """`datasets.load_dataset` by the hub's name; what the hub's own cache holds works offline.

    Raises UserError that says what to download and where to put it when there is no network.
    """
    from datasets.exceptions import DatasetsError

    offline_unless_reachable()
    place = Path(root) / name if root is not None else Path("$HIGHWAY_BP_DATA") / name
    try:
        return _load(name, config, None)
    except (DatasetsError, ValueError, OSError) as error:
        raise UserError(
            f"data set {name!r}: not in {place} and not to be had from the hub ({_line(error)}); "
            f"download the repository {name!r} (its parquet files and README.md) into {place}, or "
            f"set data.root (or HIGHWAY_BP_DATA) to the folder that holds {name}/"
        ) from error


def _load(path: str, config: str | None, cache_dir: str | None) -> "DatasetDict":
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_dataset(path, config, cache_dir=cache_dir)


def offline_unless_reachable() -> None:
    """One short request decides; `datasets` alone retries for half a minute before it gives up."""
    import datasets
    from huggingface_hub import constants

    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answered
    except OSError:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_rows(dataset: Mapping, splits: Sequence[str], rows: Mapping[str, int] | None) -> None:
    """Raises UserError unless every split is there and has `rows[split]` rows (None: any)."""
    for split in splits:
        if split not in dataset:
            raise UserError(f"split {split!r} is not in the data set; it has {sorted(dataset)}")
        wanted = len(dataset[split]) if rows is None else rows[split]
        if len(dataset[split]) != wanted:
            raise UserError(
                f"split {split!r}: {len(dataset[split])} rows, {wanted} expected (data.rows); "
                f"a file is missing or of another release: download the split again"
            )
