"""The common model tests of transformers, from the source distribution of the installed version.

They are not part of the installed package and not copied into this repository: the distribution is
downloaded once into the virtual environment.
"""

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from models.pretrained import quiet_transformers

quiet_transformers()
PACKAGE = "transformers_common_tests"
STUBS = {  # what the distribution leaves out
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}


def common_tests() -> ModuleType:
    """Its module test_modeling_common, which has `ModelTesterMixin`."""
    home = Path(sys.prefix) / "peers" / version("transformers")
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):  # tests may run side by side
        if not (home / PACKAGE).exists():
            _download(home)
    if str(home) not in sys.path:
        sys.path.append(str(home))
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


def _download(home: Path) -> None:
    name = f"transformers=={version('transformers')}"
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-binary", "transformers", "-d", folder, name], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as distribution:
            inside = archive.name.removesuffix(".tar.gz") + "/tests/"
            members = [m for m in distribution if m.name.startswith(inside) and m.isfile()]
            distribution.extractall(folder, members, filter="data")
        made = shutil.copytree(Path(folder) / inside, home / "unfinished", dirs_exist_ok=True)
        for file, text in STUBS.items():
            (made / file).parent.mkdir(exist_ok=True)
            (made / file).write_text(text)
        made.rename(home / PACKAGE)
