"""The packages: wheels for this machine or for another."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

from experiments.errors import UserError

EXTRAS = ("experiments", "dev")
SOURCE_ONLY = ("antlr4-python3-runtime",)  # of hydra-core: pure Python, but published as source
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
            "--only-binary=:all:",
            f"--python-version={self.description['python']}",
            *(f"--platform={name}" for name in platforms),
        ]

    def markers(self) -> dict[str, str]:
        """What the conditions in requirements ask, as far as it differs from here."""
        found = {}
        if self.python:
            full = {"python_full_version", "implementation_version"}
            found = {"python_version": self.python, **dict.fromkeys(full, f"{self.python}.0")}
        if self.platform:
            match = PLATFORM.fullmatch(self.platform)
            system = "Darwin" if match["system"] == "macosx" else "Linux"
            found |= {
                "platform_system": system,
                "sys_platform": system.lower(),
                "os_name": "posix",
                "platform_machine": match["processor"],
            }
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
    fetch = (
        build
        if machine.here
        else ["download", "--dest", str(folder), *common, *machine.pip_options()]
    )
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
        raise UserError(
            f"{compiled[0]}: runs on this machine alone; make the bundle on one like the other"
        )


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
