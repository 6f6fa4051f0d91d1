"""The notebooks run from beginning to end, and give the outputs that are stored in them."""

import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from traitlets import default

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "notebooks"
FIGURES = {"1_sum_over_paths": 3, "2_iterations": 2, "3_real_run": 1}
SECONDS_PER_CELL = 120  # many times what one takes: the machine may be busy
LARGEST = 300_000  # bytes of a notebook
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")

every_notebook = pytest.mark.parametrize("name", FIGURES)


class ThisPython(AsyncKernelManager):
    """No installed kernel, which may be of another Python: ipykernel's own, of this one."""

    @default("kernel_spec_manager")
    def _none_installed(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=nbformat.NO_CONVERT)


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_every_notebook_is_known():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == FIGURES.keys()


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """What each code cell prints."""
    return [
        "".join(output.text for output in cell.outputs if output.output_type == "stream")
        for cell in code_cells(notebook)
    ]


def pictures(notebook: nbformat.NotebookNode) -> list[int]:
    """How many pictures each code cell draws."""
    return [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in code_cells(notebook)
    ]


@every_notebook
def test_is_valid_and_small(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    assert [cell.execution_count for cell in code_cells(notebook)] == [
        n + 1 for n in range(len(code_cells(notebook)))
    ]
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@every_notebook
def test_gives_the_stored_outputs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # neither the user's start-up files nor history
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # ipykernel then draws into the notebook
    notebook, stored = read(name), read(name)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=ThisPython,
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(FOLDER)}},  # where Jupyter runs a notebook
    )
    client.execute()  # raises with the cell and its traceback
    assert pictures(notebook) == pictures(stored) and sum(pictures(stored)) == FIGURES[name]
    for now, before in zip(texts(notebook), texts(stored), strict=True):
        assert NUMBER.sub("#", now).split() == NUMBER.sub("#", before).split()
        numbers = [[float(number) for number in NUMBER.findall(text)] for text in (now, before)]
        # Another machine rounds otherwise, and 120 steps of training enlarge that.
        rel = 0.05 if name == "2_iterations" else 1e-6
        assert numbers[0] == pytest.approx(numbers[1], rel=rel, abs=1e-5), now
