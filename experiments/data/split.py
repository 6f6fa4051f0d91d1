"""One split of one repository: its files, and its columns when they are needed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.data import source
from experiments.errors import UserError


class Split:
    """Rows of a local folder or of the hub.

    Args:
        root: folder of the local copies, None for the hub.
        name, config, split: as the hub calls them.

    Raises:
        UserError: neither a local copy nor the hub is at hand, or a file is damaged.
    """

    def __init__(self, root: str | None, name: str, config: str | None, split: str):
        self._split = split
        folder = source.local_folder(root, name)
        if folder is None:
            found = source.load_hub(name, config, root)
            source.check_rows(found, [split], None)
            self._hub = found[split]
            self.files = [Path(file["filename"]) for file in self._hub.cache_files]
        else:
            self._hub = None
            self.files = source.checked_files(folder, config, [split])

    def columns(self, *names: str) -> tuple[list[list], dict]:
        """The columns, and the data set's features; UserError if a column is missing."""
        with TemporaryDirectory() as scratch:
            found = self._hub or source.load_files(self.files, scratch)
            for name in names:
                if name not in found.column_names:
                    raise UserError(
                        f"data.column: {name!r} is not a column of the split "
                        f"{self._split!r}; there are {found.column_names}"
                    )
            return [list(found[name]) for name in names], found.features
