"""Declare the operators that a CUDA build of torchvision lacks beside a torch without CUDA.

Importing such a torchvision fails with "operator torchvision::nms does not exist", and
transformers imports torchvision wherever it is installed. Import this module before either.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None  # declarations live as long as this object


def _declare_missing() -> None:
    global _library
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        torch.ops.load_library(Path(spec.origin).parent / "_C.so")
    except OSError:  # a shared library of CUDA is not there
        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(name + _NMS)


_declare_missing()
