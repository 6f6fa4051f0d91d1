"""make bundle: pieces, checksums, and unpack.sh run for real, on a tiny project without network."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from experiments.errors import UserError
from scripts import bundle
from scripts.bundle import main
from scripts.bundling import pieces as cutting
from scripts.bundling.packages import THIS_PYTHON, pip_platforms

ROOT = Path(__file__).parents[2]
LIMIT = 20_000  # bytes
NAME = "uoft-cs/cifar10"
TRAIN = """
import os, dep
size = os.path.getsize(os.environ["HIGHWAY_BP_DATA"] + "/uoft-cs/cifar10/plain_text/train.parquet")
print("trained on", size, dep.__name__)
"""


def write_wheel(folder, name, tag="py3-none-any", more=""):
    """A wheel with one empty module. Without annotations: it is the tiny project's backend, too."""
    from pathlib import Path

    info = f"{name}-1.0.dist-info"
    file = Path(folder) / f"{name}-1.0-{tag}.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", "")
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{more}"
        archive.writestr(f"{info}/METADATA", metadata)
        wheel = f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
        archive.writestr(f"{info}/WHEEL", wheel)
        archive.writestr(f"{info}/RECORD", "")
    return file.name


BACKEND = f"""import zipfile

{inspect.getsource(write_wheel)}

def build_editable(folder, settings=None, metadata=None):
    return write_wheel(folder, "tiny", more="Requires-Dist: dep\\n")
"""


def sh(*command: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    done = sh("git", *who, *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A repository whose build backend lies in its tree, so that pip needs nothing else."""
    folder = tmp_path_factory.mktemp("project")
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\n'
        'backend-path = ["."]\n[project]\nname = "tiny"\nversion = "1.0"\n'
        'requires-python = ">=3.11"\ndependencies = ["dep"]\n',
        "constraints.txt": "dep==1.0\n",
        "backend.py": BACKEND,
        "train.py": TRAIN,
        ".gitignore": ".venv/\n__pycache__/\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two data sets in the hub's layout, one of them in more than two pieces."""
    folder = tmp_path_factory.mktemp("data")
    for name, text in {
        f"{NAME}/README.md": b"hello",
        f"{NAME}/.git/objects/pack": b"not data",
        f"{NAME}/plain_text/train.parquet": bytes(range(256)) * 200,
        "words/data/a b.parquet": b"spaces",
        "words/README.md": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    (folder / "blob").write_bytes(b"in the hub's cache, files are links")
    (folder / "words/data/link.parquet").symlink_to(folder / "blob")
    return folder


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    """The one place that pip looks for packages in; ``compiled`` is for another machine."""
    folder = tmp_path_factory.mktemp("index")
    write_wheel(folder, "dep")
    write_wheel(folder, "there")
    write_wheel(
        folder,
        "compiled",
        "cp399-cp399-manylinux_2_17_aarch64",
        (
            "Requires-Dist: there; python_version >= '3.99' and platform_machine == 'aarch64'\n"
            "Requires-Dist: here; python_version < '3.99' or platform_machine != 'aarch64'\n"
        ),
    )
    return folder


@pytest.fixture(autouse=True)
def no_network(wheels, monkeypatch) -> None:
    set_pip(monkeypatch, wheels)


def set_pip(monkeypatch: pytest.MonkeyPatch, wheels: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    monkeypatch.delenv("HIGHWAY_BP_DATA", raising=False)


def make(project: Path, out: Path, *arguments: object) -> dict:
    """The manifest of a new bundle."""
    options = ["--repository", project, "--out", out, "--piece-mb", LIMIT / bundle.MB, *arguments]
    main([str(option) for option in options])
    return json.loads((out / "manifest.json").read_text())


@pytest.fixture(scope="module")
def made(project, data, wheels, tmp_path_factory) -> Path:
    """A whole bundle; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("made") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        set_pip(patch, wheels)
        make(project, out, "--data", data)
    return out


@pytest.fixture
def copy(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def unpack(folder: Path, target: Path, **env: str) -> subprocess.CompletedProcess:
    """By the Python of these tests, with settings of pip's under which nothing would install."""
    hostile = {"PIP_CONSTRAINT": "/nowhere", "PIP_FIND_LINKS": "", "PYTHON": sys.executable}
    return sh("sh", folder / "unpack.sh", target, **hostile | env)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def script(file: Path, text: str) -> str:
    file.write_text("#!/bin/sh\n" + text)
    file.chmod(0o755)
    return str(file)


# The bundle


def test_no_piece_exceeds_the_limit_and_the_manifest_lists_every_file(made, project):
    manifest = json.loads((made / "manifest.json").read_text())
    there = {file.name: file.stat().st_size for file in made.iterdir()}
    pieces = {name: size for name, size in there.items() if ".tar." in name}
    assert len([name for name in pieces if name.startswith("data-uoft-cs--cifar10.tar.")]) == 4
    assert max(pieces.values()) == LIMIT
    del there["manifest.json"]
    assert {file["name"]: file["bytes"] for file in manifest["files"]} == there
    assert manifest["commit"] == git(project, "rev-parse", "HEAD")
    assert manifest["python"] == THIS_PYTHON
    assert manifest["wheels"] == ["dep-1.0-py3-none-any.whl"]
    assert manifest["datasets"] == [NAME, "words"]
    assert sh("sha256sum", "-c", "SHA256SUMS", cwd=made).returncode == 0


def test_cat_and_tar_restore_a_data_set_byte_for_byte(made, data, tmp_path):
    done = sh("sh", "-c", f"cat {made}/data-uoft-cs--cifar10.tar.* | tar x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    wanted = {name: text for name, text in contents(data / NAME).items() if ".git/" not in name}
    assert contents(tmp_path / "data" / NAME) == wanted
    assert len(wanted) == 2


def test_a_chosen_data_set_comes_alone(project, data, tmp_path):
    manifest = make(project, tmp_path / "b", "--no-wheels", "--data", data, "--datasets", "words")
    names = {file["name"] for file in manifest["files"]}
    assert manifest["datasets"] == ["words"]
    assert "data-words.tar.0000" in names
    assert not [name for name in names if "cifar10" in name]


def test_an_older_bundle_is_replaced(project, data, tmp_path):
    out = tmp_path / "bundle"
    make(project, out, "--no-wheels", "--data", data)
    (out / ".partial").mkdir()  # of a run that was killed
    manifest = make(project, out, "--no-wheels")
    assert {file.name for file in out.iterdir()} == {
        "README.txt",
        "SHA256SUMS",
        "unpack.sh",
        "manifest.json",
        "repository.tar.0000",
    }
    assert manifest["datasets"] == []


def test_wheels_of_another_machine(project, tmp_path):
    pyproject = project / "pyproject.toml"
    before = pyproject.read_text()
    pyproject.write_text(before.replace('["dep"]', '["dep", "compiled"]'))
    git(project, "commit", "-q", "-a", "-m", "compiled")
    try:
        manifest = make(
            project,
            tmp_path / "b",
            "--platform",
            "manylinux_2_28_aarch64",
            "--python-version",
            "3.99",
        )
    finally:
        git(project, "reset", "-q", "--hard", "HEAD~1")
    assert manifest["wheels"] == [
        "compiled-1.0-cp399-cp399-manylinux_2_17_aarch64.whl",
        "dep-1.0-py3-none-any.whl",
        "there-1.0-py3-none-any.whl",
    ]
    assert (manifest["platform"], manifest["python"]) == ("manylinux_2_28_aarch64", "3.99")
    done = unpack(tmp_path / "b", tmp_path / "there", PYTHON=script(tmp_path / "py", "echo 3.11"))
    assert "py is 3.11, the wheels of this bundle need 3.99" in done.stderr


def test_a_manylinux_stands_for_the_older_ones():
    names = pip_platforms("manylinux_2_18_x86_64")
    assert names[:3] == ["manylinux_2_18_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
    assert names[-1] == "manylinux1_x86_64"
    assert pip_platforms("macosx_14_0_arm64") == ["macosx_14_0_arm64"]


# On the other machine


def test_two_lines_unpack_and_train(made, data, project, tmp_path):
    target = tmp_path / "a folder"
    done = unpack(made, target)
    assert done.returncode == 0, done.stdout + done.stderr
    repository = target / "repository"
    assert git(repository, "rev-parse", "HEAD") == git(project, "rev-parse", "HEAD")
    assert git(repository, "status", "--porcelain") == ""
    assert contents(target / "data/words") == contents(data / "words")
    assert not (target / "data/words/data/link.parquet").is_symlink()
    assert sorted(os.listdir(target)) == ["data", "repository"]
    second = done.stdout.strip().splitlines()[-1]
    assert second.strip().partition(" && ")[2] in (made / "README.txt").read_text()
    trained = sh("sh", "-c", second)
    assert (trained.stdout, trained.stderr) == ("trained on 51200 dep\n", "")
    again = unpack(made, target)
    assert again.stderr == f"error: {target}: not empty; give a new or an empty folder\n"


@pytest.mark.parametrize("name", ["data-uoft-cs--cifar10.tar.0002", "SHA256SUMS", "README.txt"])
def test_a_damaged_file_is_named(copy, tmp_path, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    done = unpack(copy, tmp_path / "there")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {name}: damaged, sha256 ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "there").exists()


def test_all_missing_pieces_are_named(copy, tmp_path):
    for name in ("repository.tar.0000", "data-uoft-cs--cifar10.tar.0001"):
        (copy / name).unlink()
    done = unpack(copy, tmp_path / "there")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"error: {name}: missing; copy it into {copy} again"
        for name in ("repository.tar.0000", "data-uoft-cs--cifar10.tar.0001")
    ]


def test_pieces_that_are_left_from_an_older_bundle_are_not_used(project, data, tmp_path):
    make(project, tmp_path / "b", "--no-wheels", "--data", data)
    (tmp_path / "b/data-uoft-cs--cifar10.tar.0004").write_bytes(b"older")
    (tmp_path / "b/data-old.tar.0000").write_bytes(b"no tar at all")
    done = unpack(tmp_path / "b", tmp_path / "there")
    assert (done.returncode, done.stderr) == (0, "")
    assert "HIGHWAY_BP_DATA=../data python train.py" in done.stdout
    restored = contents(tmp_path / "there/data/uoft-cs")
    assert restored["cifar10/plain_text/train.parquet"] == bytes(range(256)) * 200


def test_another_python_is_told_which_is_needed(made, tmp_path):
    done = unpack(made, tmp_path / "there", PYTHON=script(tmp_path / "py", "echo 3.9"))
    assert done.returncode == 1
    assert done.stderr == (
        f"error: Python: {tmp_path}/py is 3.9, the wheels of this bundle need {THIS_PYTHON}; "
        f"PYTHON=/path/to/python{THIS_PYTHON} sh unpack.sh TARGET\n"
    )
    assert not (tmp_path / "there").exists()


def test_what_pip_says_at_last_is_shown(made, tmp_path):
    fake = script(
        tmp_path / "py",
        f'[ "$1" = -m ] || exec {sys.executable} "$@"\nmkdir -p .venv/bin\n'
        f"printf '#!/bin/sh\\necho ERROR: no wheel of dep\\nexit 1\\n' >.venv/bin/python\n"
        f"chmod +x .venv/bin/python\n",
    )
    done = unpack(made, tmp_path / "there", PYTHON=fake)
    assert done.returncode == 1
    shown, error = done.stderr.splitlines()
    assert shown == "ERROR: no wheel of dep"
    assert error.startswith("error: pip: failed, its last lines are above")
    assert error.endswith(f"and Python {THIS_PYTHON}")


def test_a_target_that_cannot_be_made(made, tmp_path):
    (tmp_path / "file").write_text("")
    done = unpack(made, tmp_path / "file")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last == f"error: {tmp_path}/file: cannot be made; give a folder that can be written"


# Bad input of the maker


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--data", "DIR", "--datasets", "uoft-cs/cifar100"],
            f"--datasets: uoft-cs/cifar100 is not in DIR; give of {NAME}, words",
        ),
        (
            ["--data", "DIR", "--datasets", "../data"],
            f"--datasets: ../data is not in DIR; give of {NAME}, words",
        ),
        (
            ["--datasets", "words"],
            "--datasets: words, but no data; give --data (or HIGHWAY_BP_DATA)",
        ),
        (
            ["--data", "/nowhere"],
            "--data (or HIGHWAY_BP_DATA): /nowhere is not a folder; give the one that holds the "
            "data sets",
        ),
        (["--piece-mb", "0"], "--piece-mb: 0; give a number above 0"),
        (["--piece-mb", "much"], "--piece-mb: much; give a number above 0"),
        (
            ["--python-version", "312"],
            f"--python-version: 312; give two numbers, such as {THIS_PYTHON}",
        ),
        (["--python-version", "3.10"], "--python-version: 3.10; pyproject.toml asks >=3.11"),
        (
            ["--platform", "win_amd64"],
            "--platform: win_amd64; give one as in the names of wheels, such as "
            "manylinux_2_28_x86_64, manylinux_2_28_aarch64 or macosx_14_0_arm64",
        ),
        (
            ["--repository", "/nowhere"],
            "--repository: /nowhere is not a folder; give a clone of the project",
        ),
    ],
)
def test_wrong_arguments_are_told_in_a_line(project, data, tmp_path, arguments, line):
    arguments = [argument.replace("DIR", str(data)) for argument in arguments]
    with pytest.raises(UserError) as error:
        make(project, tmp_path / "out", "--no-wheels", *arguments)
    assert str(error.value) == line.replace("DIR", str(data))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_more_pieces_than_their_numbers_have_digits(project, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "MOST_PIECES", 2)
    with pytest.raises(UserError, match=r"--piece-mb: 0.001, more than 2 pieces of repository.tar"):
        make(project, tmp_path / "b", "--no-wheels", "--piece-mb", "0.001")
    assert list((tmp_path / "b").iterdir()) == []


def test_a_dirty_tree_is_refused_or_left_out(project, tmp_path):
    (project / "train.py").write_text("print('changed')")
    (project / "new.py").write_text("")
    try:
        with pytest.raises(UserError, match=r"2 files not as in .* \(train.py, new.py\); commit"):
            make(project, tmp_path / "b", "--no-wheels")
        make(project, tmp_path / "b", "--no-wheels", "--allow-dirty")
    finally:
        (project / "new.py").unlink()
        git(project, "checkout", "-q", "train.py")
    assert unpack(tmp_path / "b", tmp_path / "there").returncode == 0
    assert (tmp_path / "there/repository/train.py").read_text() == TRAIN
    assert not (tmp_path / "there/repository/new.py").exists()


def test_an_out_folder_with_other_files_is_left_alone(project, tmp_path):
    out = tmp_path / "bundle"
    make(project, out, "--no-wheels")
    before = contents(out)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"bundle is not empty \(it holds thesis.txt\)"):
        make(project, out, "--no-wheels")
    assert contents(out) == {**before, "thesis.txt": b"mine"}


def test_an_out_folder_that_cannot_be_written(project, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: .*file/b cannot be written"):
        make(project, tmp_path / "file/b", "--no-wheels")


def test_a_shallow_clone_is_refused(project, tmp_path):
    git(project, "commit", "-q", "--allow-empty", "-m", "second")
    git(tmp_path, "clone", "-q", "--depth", "1", project.as_uri(), "shallow")
    git(project, "reset", "-q", "--hard", "HEAD~1")
    with pytest.raises(UserError, match="a shallow clone; run git fetch --unshallow first"):
        make(tmp_path / "shallow", tmp_path / "b", "--no-wheels")


def test_a_wheel_that_pip_does_not_find(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(UserError, match="pip wheel: exit code 1, its last lines are above"):
        make(project, tmp_path / "b")
    shown = capsys.readouterr().err
    assert "dep==1.0" in shown and "ERROR: " in shown
    assert list((tmp_path / "b").iterdir()) == []


def test_the_command_line_says_error_and_no_traceback(tmp_path):
    done = sh(sys.executable, ROOT / "scripts/bundle.py", "--piece-mb", "-1", "--out", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: --piece-mb: -1; give a number above 0\n"


def test_make_hands_its_variables_over():
    variables = (
        "OUT=/tmp/o",
        "PLATFORM=p",
        "PYVER=3.12",
        "DATA=/d",
        "DATASETS=a b/c",
        "TORCH_PIP_ARGS=-i here",
    )
    done = sh("make", "--no-print-directory", "-n", "bundle", *variables, cwd=ROOT)
    planned = done.stdout.replace("\\\n", " ")
    assert " ".join(planned.split()).endswith(
        'scripts/bundle.py --out "/tmp/o" --platform p --python-version 3.12 --data "/d" '
        '--datasets a b/c --torch-pip-args="-i here"'
    )
