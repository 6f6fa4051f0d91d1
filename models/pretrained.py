"""The transformers library, and where pretrained weights lie: folder, hub, installed package."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

import models.torchvision_ops  # noqa: F401, before transformers

PREFIX = "package:"


def quiet_transformers() -> ModuleType:
    """The library, without its progress bars and reports."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return transformers


def pretrained_path(name: str) -> str:
    """Return the folder that ``package:NAME/FOLDER`` names; return any other name as it is.

    Raises:
        ValueError: the package is not installed, or has no such folder.
    """
    if not name.startswith(PREFIX):
        return name
    package, _, inside = name.removeprefix(PREFIX).partition("/")
    try:
        spec = find_spec(package)
    except ImportError:  # of the package that it is in
        spec = None
    if spec is None or spec.origin is None:
        raise ValueError(f"{name!r}: the package {package} is not installed; pip install it")
    folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise ValueError(f"{name!r}: the package {package} has no folder {inside!r}")
    return str(folder)


def from_pretrained(auto: type, name: str, **settings: Any) -> Any:
    """Return what an Auto class of transformers makes of the model of this name.

    Raises:
        ValueError: there is no such model.
    """
    try:
        return auto.from_pretrained(pretrained_path(name), **settings)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pretrained={name!r} is no model at hand ({str(error).splitlines()[0][:120]}); "
            "expected a folder, hub name or package:NAME/FOLDER"
        ) from error


class HoldsHubModel(nn.Module):
    """A module around ``model``, a model of the transformers library."""

    model: nn.Module

    def save_pretrained(self, folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Save the model as transformers does, so that its Auto classes can read it.

        Args:
            weights: this module's whole ``state_dict``, if the module does not hold all weights.
        """
        inner = (
            None
            if weights is None
            else {name.removeprefix("model."): t for name, t in weights.items()}
        )
        self.model.save_pretrained(folder, state_dict=inner)
