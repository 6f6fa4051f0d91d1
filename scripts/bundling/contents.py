"""What a bundle says of itself: checksums, manifest, README.txt, unpack.sh."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TEMPLATE = Path(__file__).parents[1] / "bundle_unpack.sh"
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"


@dataclass(frozen=True)
class Entry:
    name: str
    bytes: int
    sha256: str


def entry(file: Path) -> Entry:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Entry(file.name, file.stat().st_size, digest)


def training(datasets: Mapping[str, Path], with_wheels: bool) -> str:
    """The second line: a training on what is there."""
    python = ".venv/bin/python" if with_wheels else "python"
    data = "HIGHWAY_BP_DATA=../data " if datasets else ""
    experiment = "resnet32_cifar10" if "uoft-cs/cifar10" in datasets else "digits"
    return f"{data}{python} train.py experiment={experiment} grad=highway k=3"


def readme(about: Mapping, command: str) -> str:
    wheels = f"{about['platform']}, Python {about['python']}" if about["wheels"] else "none"
    steps = "checks all files, unpacks them and sets .venv up"
    if not about["wheels"]:
        steps = "checks all files and unpacks them"
    return (
        f"Commit: {about['commit']}\nWheels: {wheels}\n"
        f"Data:   {', '.join(about['datasets']) or 'none'}\n\n"
        f"On the other machine, in this folder:\n\n"
        f"    sh unpack.sh ~/highway-bp\n"
        f"    cd ~/highway-bp/repository && {command}\n\n"
        f"The first line {steps}, the second one trains.\n"
        f"Neither needs a network. {MANIFEST} lists every file. More: docs/offline.md of the\n"
        f"repository.\n"
    )


def unpack_script(about: Mapping, command: str, sums: Path) -> str:
    """The template with this bundle's values, SHA256SUMS' own checksum among them."""
    values = {
        "PYTHON_VERSION": about["python"] if about["wheels"] else "",
        "PLATFORM": about["platform"],
        "SUMS": entry(sums).sha256,
        "TRAINING": command,
    }
    text = TEMPLATE.read_text()
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def describe(folder: Path, about: Mapping, command: str, pieces: Sequence[Path]) -> list[Path]:
    """Write README.txt, SHA256SUMS, unpack.sh and the manifest; all files of the bundle."""
    files = {name: folder / name for name in ("README.txt", SUMS, "unpack.sh", MANIFEST)}
    files["README.txt"].write_text(readme(about, command))
    entries = [entry(file) for file in [files["README.txt"], *pieces]]
    files[SUMS].write_text("".join(f"{each.sha256}  {each.name}\n" for each in entries))
    files["unpack.sh"].write_text(unpack_script(about, command, files[SUMS]))
    entries += [entry(files[SUMS]), entry(files["unpack.sh"])]
    manifest = {**about, "files": [asdict(each) for each in entries]}
    files[MANIFEST].write_text(json.dumps(manifest, indent=1) + "\n")
    return [*files.values(), *pieces]
