"""Pack this commit, its wheels and prepared data for machines without a network.

    python scripts/bundle.py --out build/bundle --data /path/to/data --datasets uoft-cs/cifar10

No file of the bundle exceeds --piece-mb; ``sh unpack.sh TARGET`` inside it puts everything together
on the other machine. docs/offline.md tells the rest.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

sys.path.insert(0, str(Path(__file__).parent.parent))

from experiments.errors import UserError

REPOSITORY = Path(__file__).parent.parent
TEMPLATE = Path(__file__).with_name("bundle_unpack.sh")
MANIFEST, SUMS = "manifest.json", "SHA256SUMS"
PARTIAL = ".partial"  # inside the out folder, which may be the root of a stick
MB = 1_000_000  # bytes
MOST_PIECES = 10_000  # four digits, so that the shell's order of names is the pieces' order
EXTRAS = ("experiments", "dev")
SOURCE_ONLY = ("antlr4-python3-runtime",)  # of hydra-core: pure Python, but published as source
NOT_DATA = (".git", ".cache")  # what a clone or a download of the hub leaves beside the files
PLATFORM = re.compile(r"(?P<system>manylinux|musllinux|macosx)[\d_]*_(?P<processor>[a-z]\w*)")
MANYLINUX = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
THIS_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# pip takes --platform for the names of wheels alone. Conditions such as python_version >= "3.12"
# in requirements it decides by its own Python; here they are decided by the other machine's values.
PIP_AS_THERE = """
import json, sys
from pip._internal.cli.main import main
from pip._vendor.packaging import markers
here, there = markers.default_environment, json.loads(sys.argv[1])
markers.default_environment = lambda: {**here(), **there}
sys.exit(main(sys.argv[2:]))
"""


# The command line


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("build/bundle"),
                        help="folder of the bundle; an older bundle there is replaced")
    parser.add_argument("--platform", help="of the other machine, such as manylinux_2_28_aarch64; "
                                           "by default this machine's")
    parser.add_argument("--python-version", help=f"of the other machine; default {THIS_PYTHON}")
    parser.add_argument("--data", default=os.environ.get("HIGHWAY_BP_DATA"),
                        help="folder in the hub's layout, by default $HIGHWAY_BP_DATA")
    parser.add_argument("--datasets", nargs="*", default=[], metavar="NAME",
                        help="folders below --data, such as uoft-cs/cifar10; by default all")
    parser.add_argument("--piece-mb", default="60", help="largest file, in 10^6 bytes; default 60")
    parser.add_argument("--no-wheels", action="store_true", help="leave the packages out")
    parser.add_argument("--torch-pip-args", default="", help="for pip, for torch alone")
    parser.add_argument("--allow-dirty", action="store_true",
                        help="pack the commit although the working tree differs from it")
    parser.add_argument("--repository", type=Path, default=REPOSITORY, help="by default this one")
    return parser.parse_args(argv)


def piece_bytes(given: str) -> int:
    """Bytes of the largest file, from megabytes."""
    with contextlib.suppress(ValueError):
        if 1 <= float(given) * MB < math.inf:
            return int(float(given) * MB)
    raise UserError(f"--piece-mb: {given}; give a number above 0")


# The repository


def git(repository: Path, *arguments: str) -> str:
    """What git prints; UserError with its last line if it fails."""
    done = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"git {arguments[0]} in {repository}: {reason}")
    return done.stdout.strip()


def checked_commit(repository: Path, allow_dirty: bool) -> str:
    """HEAD, whose whole history is at hand and, unless allowed, from which no file differs."""
    if not repository.is_dir():
        raise UserError(f"--repository: {repository} is not a folder; give a clone of the project")
    commit = git(repository, "rev-parse", "HEAD")
    if git(repository, "rev-parse", "--is-shallow-repository") == "true":
        raise UserError(f"{repository}: a shallow clone; run git fetch --unshallow first")
    changed = [line[2:].strip() for line in git(repository, "status", "--porcelain").splitlines()]
    if changed and not allow_dirty:
        names = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise UserError(
            f"working tree: {len(changed)} files not as in {commit[:12]} ({names}); commit or "
            f"remove them, or give --allow-dirty to pack the commit without them"
        )
    return commit


def write_history(repository: Path, file: Path) -> None:
    """A git bundle of HEAD and, if there is one, the branch it is on."""
    branch = git(repository, "rev-parse", "--abbrev-ref", "HEAD")
    refs = ["HEAD"] if branch == "HEAD" else ["HEAD", branch]
    git(repository, "bundle", "create", "--quiet", str(file.resolve()), *refs)


# The packages


@dataclass(frozen=True)
class Machine:
    """The other machine; None means: as this one."""

    platform: str | None
    python: str | None

    @property
    def here(self) -> bool:
        return self.platform is None and self.python is None

    @property
    def description(self) -> dict[str, str]:
        own = re.sub(r"[-.]", "_", sysconfig.get_platform())
        return {"platform": self.platform or own, "python": self.python or THIS_PYTHON}

    def pip_options(self) -> list[str]:
        platforms = pip_platforms(self.platform) if self.platform else []
        return [
            "--only-binary=:all:", f"--python-version={self.description['python']}",
            *(f"--platform={name}" for name in platforms),
        ]  # fmt: skip

    def markers(self) -> dict[str, str]:
        """What the conditions in requirements ask, as far as it differs from here."""
        found = {}
        if self.python:
            full = {"python_full_version", "implementation_version"}
            found = {"python_version": self.python, **dict.fromkeys(full, f"{self.python}.0")}
        if self.platform:
            match = PLATFORM.fullmatch(self.platform)
            system = "Darwin" if match["system"] == "macosx" else "Linux"
            found |= {"platform_system": system, "sys_platform": system.lower(),
                      "os_name": "posix", "platform_machine": match["processor"]}  # fmt: skip
        return found


def checked_machine(args: argparse.Namespace, project: Mapping) -> Machine:
    """Raises UserError for names that pip would not know and a Python that is too old."""
    version, platform = args.python_version or None, args.platform or None
    if version is not None and not re.fullmatch(r"3\.\d+", version):
        raise UserError(f"--python-version: {version}; give two numbers, such as {THIS_PYTHON}")
    wanted = project["project"].get("requires-python", "")
    if not SpecifierSet(wanted).contains(version or THIS_PYTHON):
        raise UserError(f"--python-version: {version or THIS_PYTHON}; pyproject.toml asks {wanted}")
    if platform is not None and not PLATFORM.fullmatch(platform):
        raise UserError(
            f"--platform: {platform}; give one as in the names of wheels, such as "
            f"manylinux_2_28_x86_64, manylinux_2_28_aarch64 or macosx_14_0_arm64"
        )
    return Machine(platform, version)


def pip_platforms(name: str) -> list[str]:
    """pip takes a platform literally; on a manylinux the wheels of all older ones run, too."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", name)
    if match is None:
        return [name]
    names = []
    for minor in range(int(match[1]), 4, -1):
        names.append(f"manylinux_2_{minor}_{match[2]}")
        if minor in MANYLINUX:
            names.append(f"{MANYLINUX[minor]}_{match[2]}")
    return names


def requirements(project: Mapping) -> list[str]:
    """What an editable installation with all extras asks for, the build backend included."""
    metadata = project["project"]
    extras = metadata.get("optional-dependencies", {})
    return [
        *project["build-system"]["requires"],
        *metadata.get("dependencies", []),
        *(line for extra in EXTRAS for line in extras.get(extra, [])),
    ]


def collect_wheels(
    folder: Path, machine: Machine, wanted: list[str], constraints: str, torch_args: str
) -> None:
    """Fill ``folder`` with wheels of ``wanted`` and of all they need."""
    folder.mkdir()
    constraints_file = folder.with_name("constraints.txt")
    constraints_file.write_text(constraints)
    common = ["--constraint", str(constraints_file), "--find-links", str(folder)]
    build = ["wheel", "--wheel-dir", str(folder), *common]
    fetch = build if machine.here else [
        "download", "--dest", str(folder), *common, *machine.pip_options()
    ]  # fmt: skip
    if not machine.here:
        build_pure(build, folder, constraints)
    if torch_args:
        pip(*fetch, *shlex.split(torch_args), "torch", markers=machine.markers())
    pip(*fetch, *wanted, markers=machine.markers())


def build_pure(build: list[str], folder: Path, constraints: str) -> None:
    """For another machine only wheels can be downloaded: make those of packages that have none."""
    for name in SOURCE_ONLY:
        if re.search(rf"^{name}\b", constraints, re.MULTILINE):
            pip(*build, "--no-deps", name)
    compiled = [file.name for file in folder.iterdir() if not file.name.endswith("-none-any.whl")]
    if compiled:
        raise UserError(f"{compiled[0]}: runs on this machine alone; make the bundle on one "
                        f"like the other")  # fmt: skip


def pip(*arguments: str, markers: Mapping[str, str] | None = None) -> None:
    """Run this Python's pip; if it fails, show its last lines and raise UserError.

    markers: the other machine's values for conditions in requirements.
    """
    start = ["-c", PIP_AS_THERE, json.dumps(markers)] if markers else ["-m", "pip"]
    done = subprocess.run([sys.executable, *start, *arguments], capture_output=True, text=True)
    if done.returncode:
        print(*(done.stdout + done.stderr).strip().splitlines()[-12:], sep="\n", file=sys.stderr)
        raise UserError(
            f"pip {arguments[0]}: exit code {done.returncode}, its last lines are above; give pip "
            f"an index that has these wheels, or leave them out with --no-wheels"
        )


# The data


def chosen_datasets(root: str | None, names: Sequence[str]) -> dict[str, Path]:
    """Folder of every data set; all there are if no names are given, none without a root."""
    if not root:
        if names:
            raise UserError(f"--datasets: {' '.join(names)}, but no data; give --data (or "
                            f"HIGHWAY_BP_DATA)")  # fmt: skip
        return {}
    if not Path(root).is_dir():
        raise UserError(f"--data (or HIGHWAY_BP_DATA): {root} is not a folder; give the one that "
                        f"holds the data sets")  # fmt: skip
    there = datasets_below(Path(root))
    if not there:
        raise UserError(f"--data (or HIGHWAY_BP_DATA): {root} holds no folder with files; give the "
                        f"one that holds the data sets")  # fmt: skip
    for name in names:
        if name not in there:
            raise UserError(f"--datasets: {name} is not in {root}; give of {', '.join(there)}")
    return {name: there[name] for name in names or there}


def datasets_below(root: Path) -> dict[str, Path]:
    """The hub's ``owner/name`` and ``name``: a folder that holds files is a data set as a whole."""
    found = {}
    for folder in folders(root):
        holds_files = any(entry.is_file() for entry in folder.iterdir())
        for each in [folder] if holds_files else folders(folder):
            found[each.relative_to(root).as_posix()] = each
    return found


def folders(folder: Path) -> list[Path]:
    return sorted(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))


# Pieces


class Pieces:
    """A stream that is written into ``<stem>.0000``, ``<stem>.0001``, ... of ``limit`` bytes."""

    def __init__(self, folder: Path, stem: str, limit: int) -> None:
        self.folder, self.stem, self.limit = folder, stem, limit
        self.files: list[Path] = []
        self._file = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            room = self.limit - self._file.tell() if self._file else 0
            if room == 0:
                self._next()
                continue
            self._file.write(rest[:room])
            rest = rest[room:]
        return len(data)

    def close(self) -> None:
        if self._file:
            self._file.close()

    def _next(self) -> None:
        self.close()
        if len(self.files) == MOST_PIECES:
            raise UserError(f"--piece-mb: {self.limit / MB:g}, more than {MOST_PIECES} pieces of "
                            f"{self.stem}; give a larger one")  # fmt: skip
        file = self.folder / f"{self.stem}.{len(self.files):04d}"
        self._file = file.open("xb")  # x: two data sets must not share a name
        self.files.append(file)


def pack(source: Path, name: str, pieces: Pieces) -> list[Path]:
    """A file or folder as an uncompressed tar in which it is called ``name``.

    Parquet, wheels and git's packs are compressed already.
    """
    with contextlib.closing(pieces), tarfile.open(
        mode="w|", fileobj=pieces, format=tarfile.GNU_FORMAT, dereference=True, bufsize=MB
    ) as tar:  # fmt: skip
        tar.add(source, name, filter=plain)
    report(name, pieces.files)
    return pieces.files


def plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Readable, and without owners: nobody on the other machine is who packed it here."""
    if Path(member.name).name in NOT_DATA:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    return member


def report(name: str, files: Sequence[Path]) -> None:
    size = sum(file.stat().st_size for file in files)
    print(f"{name}: {size / MB:.1f} MB in {len(files)} files", flush=True)


# The bundle


@dataclass(frozen=True)
class Entry:
    name: str
    bytes: int
    sha256: str


def entry(file: Path) -> Entry:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return Entry(file.name, file.stat().st_size, digest)


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
    about = {"commit": commit, **machine.description, "piece_bytes": limit,
             "datasets": list(datasets), "wheels": []}  # fmt: skip

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
    report(f"all in {time.perf_counter() - started:.0f} s",
           [args.out / file.name for file in files])  # fmt: skip
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
    print(f"wheels: pip looks for {len(wanted)} requirements and all they need, for "
          f"{', Python '.join(machine.description.values())}", flush=True)  # fmt: skip
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
