"""The guided tour in notebooks/: stored without outputs, and it runs from beginning to end."""

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


@every_notebook
def test_is_valid_and_stored_without_outputs(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.nbformat == 4
    for number, cell in enumerate(code_cells(notebook)):
        assert cell.outputs == [], f"code cell {number}"
        assert cell.execution_count is None, f"code cell {number}"


@every_notebook
def test_runs_to_the_end_and_draws(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # neither the user's start-up files nor history
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # ipykernel then draws into the notebook
    notebook = read(name)
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=ThisPython,
        timeout=SECONDS_PER_CELL,
        resources={"metadata": {"path": str(FOLDER)}},  # where Jupyter runs a notebook
    )
    client.execute()  # raises with the cell and its traceback
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES[name]
