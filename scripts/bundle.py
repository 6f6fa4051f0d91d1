"""Pack this commit, its wheels and prepared data for machines without a network.

    python scripts/bundle.py --out build/bundle --data /path/to/data --datasets uoft-cs/cifar10

No file of the bundle exceeds --piece-mb; ``sh unpack.sh TARGET`` inside it puts everything together
on the other machine. docs/offline.md tells the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError
from scripts.bundling.contents import MANIFEST, describe, training
from scripts.bundling.datasets import chosen_datasets
from scripts.bundling.history import checked_commit, git, write_history
from scripts.bundling.packages import (
    THIS_PYTHON,
    Machine,
    checked_machine,
    collect_wheels,
    requirements,
)
from scripts.bundling.pieces import MB, Pieces, pack, report

REPOSITORY = Path(__file__).parent.parent
PARTIAL = ".partial"  # inside the out folder, which may be the root of a stick


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/bundle"),
        help="folder of the bundle; an older bundle there is replaced",
    )
    parser.add_argument(
        "--platform",
        help="of the other machine, such as manylinux_2_28_aarch64; by default this machine's",
    )
    parser.add_argument("--python-version", help=f"of the other machine; default {THIS_PYTHON}")
    parser.add_argument(
        "--data",
        default=os.environ.get("HIGHWAY_BP_DATA"),
        help="folder in the hub's layout, by default $HIGHWAY_BP_DATA",
    )
    parser.add_argument(
        "--datasets",
        nargs="*",
        default=[],
        metavar="NAME",
        help="folders below --data, such as uoft-cs/cifar10; by default all",
    )
    parser.add_argument("--piece-mb", default="60", help="largest file, in 10^6 bytes; default 60")
    parser.add_argument("--no-wheels", action="store_true", help="leave the packages out")
    parser.add_argument("--torch-pip-args", default="", help="for pip, for torch alone")
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="pack the commit although the working tree differs from it",
    )
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="by default this one")
    return parser.parse_args(argv)


def piece_bytes(given: str) -> int:
    """Bytes of the largest file, from megabytes."""
    with contextlib.suppress(ValueError):
        if 1 <= float(given) * MB < math.inf:
            return int(float(given) * MB)
    raise UserError(f"--piece-mb: {given}; give a number above 0")


def older_bundle(out: Path) -> list[Path]:
    """Files of the bundle that ``out`` holds already; UserError if it holds anything else."""
    found = {file.name: file for file in out.iterdir() if file.name != PARTIAL}
    known = {MANIFEST}
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        known |= {file["name"] for file in json.loads((out / MANIFEST).read_text())["files"]}
    strange = sorted(found.keys() - known)
    if strange:
        raise UserError(
            f"--out: {out} is not empty (it holds {strange[0]}); give a new folder, or one with an "
            f"older bundle alone, which is replaced"
        )
    return list(found.values())


@contextlib.contextmanager
def workplace(out: Path) -> Iterator[Path]:
    """A fresh folder inside ``out``, gone at the end; UserError if it cannot be made."""
    partial = out / PARTIAL
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        partial.mkdir()
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written ({error.strerror}); give a folder that can"
        ) from error
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_in(files: Sequence[Path], out: Path, older: Sequence[Path]) -> None:
    """The manifest comes first: what a broken-off move leaves is an older bundle by then."""
    if older:
        print(f"replacing the older bundle in {out}")
    for file in older:
        file.unlink()
    for file in sorted(files, key=lambda file: file.name != MANIFEST):
        file.rename(out / file.name)


def make(args: argparse.Namespace) -> None:
    """Check everything that can be checked first, then pack."""
    started = time.perf_counter()
    limit = piece_bytes(args.piece_mb)
    commit = checked_commit(args.repository, args.allow_dirty)
    # HEAD's files, not the working tree's: HEAD is what the other machine gets
    project = tomllib.loads(git(args.repository, "show", "HEAD:pyproject.toml"))
    machine = checked_machine(args, project)
    datasets = chosen_datasets(args.data, args.datasets)
    command = training(datasets, not args.no_wheels)
    about = {
        "commit": commit,
        **machine.description,
        "piece_bytes": limit,
        "datasets": list(datasets),
        "wheels": [],
    }

    with workplace(args.out) as partial:
        older = older_bundle(args.out)
        print(f"bundle of commit {commit[:12]} in {args.out}", flush=True)
        files = pack_history(args.repository, partial, limit)
        if not args.no_wheels:
            about["wheels"], pieces = pack_wheels(args, project, machine, partial, limit)
            files += pieces
        for name, folder in datasets.items():
            stem = f"data-{name.replace('/', '--')}.tar"
            files += pack(folder, f"data/{name}", Pieces(partial, stem, limit))
        files = describe(partial, about, command, files)
        move_in(files, args.out, older)
    report(
        f"all in {time.perf_counter() - started:.0f} s", [args.out / file.name for file in files]
    )
    print(f"on the other machine:\n    sh unpack.sh TARGET\n    cd TARGET/repository && {command}")


def pack_history(repository: Path, folder: Path, limit: int) -> list[Path]:
    history = folder / "repository.bundle"
    write_history(repository, history)
    return pack(history, history.name, Pieces(folder, "repository.tar", limit))


def pack_wheels(
    args: argparse.Namespace, project: Mapping, machine: Machine, folder: Path, limit: int
) -> tuple[list[str], list[Path]]:
    """(names of the wheels, pieces)."""
    wheels, wanted = folder / "wheels", requirements(project)
    print(
        f"wheels: pip looks for {len(wanted)} requirements and all they need, for "
        f"{', Python '.join(machine.description.values())}",
        flush=True,
    )
    constraints = git(args.repository, "show", "HEAD:constraints.txt")
    collect_wheels(wheels, machine, wanted, constraints, args.torch_pip_args)
    names = sorted(file.name for file in wheels.iterdir())
    pieces = pack(wheels, "wheels", Pieces(folder, "wheels.tar", limit))
    shutil.rmtree(wheels)  # room for the data
    return names, pieces


def main(argv: Sequence[str]) -> None:
    try:
        make(parse(argv))
    except OSError as error:
        raise UserError(
            f"{error.filename or 'a file'}: {error.strerror or error}; is it readable, the disk "
            f"full or read-only?"
        ) from error


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
