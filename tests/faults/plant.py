"""Plant each fault of this folder in a copy of the repository, and see a test fail.

    python tests/faults/plant.py                # all of them
    python tests/faults/plant.py carry*         # those whose name fits

Each *.patch here is one small mistake that gives a wrong gradient or a wrong schedule without an
error. The quick tests of the library have to catch every one. The exit code is 1 if one slips by.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
TESTS = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", "-p", "no:cacheprovider"]


def patches(pattern: str = "*") -> list[Path]:
    return sorted(Path(__file__).parent.glob(f"{pattern}.patch"))


def copy_to(folder: Path) -> None:
    """The files that git knows, as they are now."""
    files = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY)
    command = ["xargs", "-0", "cp", "--parents", "-t", str(folder)]
    subprocess.run(command, input=files, cwd=REPOSITORY, check=True)


def first_failure(folder: Path) -> str | None:
    """The test that fails in ``folder``; None if all pass.

    Raises:
        RuntimeError: pytest could not run the tests.
    """
    done = subprocess.run(
        [*TESTS, "tests/highway_bp"], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0] if failed else None


def main(pattern: str = "*") -> int:
    slipped = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        copy_to(folder)
        for patch in patches(pattern):
            begun = time.monotonic()
            subprocess.run(["git", "apply", str(patch)], cwd=folder, check=True)
            found = first_failure(folder)
            subprocess.run(["git", "apply", "-R", str(patch)], cwd=folder, check=True)
            slipped += found is None
            seconds = time.monotonic() - begun
            print(f"{patch.stem}: {found or 'NOT CAUGHT'} ({seconds:.0f} s)", flush=True)
    return 1 if slipped else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
