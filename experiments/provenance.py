"""Where a result comes from: commit, device, versions."""

import platform
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("torch", "numpy", "datasets", "hydra-core", "transformers")


def environment(device: torch.device) -> dict:
    """Commit, whether tracked files differ from it (or it is unknown), device, and versions."""
    commit = _git("rev-parse", "HEAD")
    return {
        "commit": commit or "unknown",
        "dirty": not commit or bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": _device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "versions": {name: _version(name) for name in PACKAGES},
    }


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name[ \t]*:(.*)", text, re.MULTILINE)
    name = model[1].strip() if model else platform.processor()
    return f"CPU {name}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
