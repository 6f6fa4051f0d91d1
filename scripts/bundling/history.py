"""The repository: HEAD and its history."""

from __future__ import annotations

import subprocess
from pathlib import Path

from experiments.errors import UserError


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
