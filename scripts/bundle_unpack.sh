#!/bin/sh
# Put the bundle beside this file together, on a machine without a network:
#
#     sh unpack.sh TARGET
#
# Checks every file, then makes TARGET/repository, TARGET/data and, from the bundle's wheels alone,
# TARGET/repository/.venv. PYTHON=/path/to/python chooses the interpreter.
set -eu
unset CDPATH

python_version='@PYTHON_VERSION@' # empty: a bundle without wheels
platform='@PLATFORM@'
sums='@SUMS@' # of SHA256SUMS itself
training='@TRAINING@'

bundle=$(cd "$(dirname "$0")" && pwd)

say() { echo "error: $*" >&2; }
fail() { say "$*"; exit 1; }

sha256() {
    if command -v sha256sum >/dev/null; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

intact() { # name, sha256
    [ -f "$bundle/$1" ] || { say "$1: missing; copy it into $bundle again"; return 1; }
    found=$(sha256 <"$bundle/$1")
    [ "$found" = "$2" ] || { say "$1: damaged, sha256 $found, not $2; copy it again"; return 1; }
}

check_files() {
    intact SHA256SUMS "$sums" || exit 1
    bad=0
    while read -r sum name; do
        intact "$name" "$sum" || bad=1
    done <"$bundle/SHA256SUMS"
    [ "$bad" = 0 ] || exit 1
}

version_of() { # "3.11", or nothing where there is no such Python
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true
}

find_python() { # sets $python
    tried=
    if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- "python$python_version" python3; fi
    for python; do
        version=$(version_of "$python")
        [ "$version" != "$python_version" ] || return 0
        tried="$tried$python is ${version:-not there}, "
    done
    fail "Python: ${tried}the wheels of this bundle need $python_version;" \
        "PYTHON=/path/to/python$python_version sh unpack.sh TARGET"
}

make_target() { # sets $target
    mkdir -p "$1" || fail "$1: cannot be made; give a folder that can be written"
    target=$(cd "$1" && pwd)
    [ -z "$(ls -A "$target")" ] || fail "$target: not empty; give a new or an empty folder"
}

restore() { # stem: its pieces, in their order, are one tar
    while read -r sum name; do
        case $name in "$1".????) cat "$bundle/$name" ;; esac
    done <"$bundle/SHA256SUMS" | tar -xf - -C "$target"
}

restore_all() {
    stems=$(sed -n 's/^[0-9a-f]*  \(.*\.tar\)\.0000$/\1/p' "$bundle/SHA256SUMS")
    printf '%s\n' "$stems" | while read -r stem; do
        echo "unpacking $stem"
        restore "$stem" || fail "$stem: tar failed; is the disk of $target full?"
    done
}

clone() {
    git -c advice.detachedHead=false clone -q "$target/repository.bundle" "$target/repository" ||
        fail "git clone: failed; is the disk of $target full?"
    git -C "$target/repository" remote remove origin
    rm "$target/repository.bundle"
}

logged() { # what it is, command: show the end of its output if it fails
    what=$1
    shift
    "$@" >"$target/install.log" 2>&1 && return
    tail -n 12 "$target/install.log" >&2
    fail "$what: failed, its last lines are above, all are in $target/install.log;" \
        "the wheels are for $platform and Python $python_version"
}

only_these_wheels() { # no setting of this machine's pip may name another place for packages
    for name in $(env | sed -n 's/^\(PIP_[A-Z_]*\)=.*/\1/p'); do unset "$name"; done
    export PIP_CONFIG_FILE=/dev/null
}

install() {
    only_these_wheels
    cd "$target/repository"
    echo "setting up $target/repository/.venv"
    logged venv "$python" -m venv .venv
    logged pip .venv/bin/python -m pip install --no-index --find-links "$target/wheels" \
        -c constraints.txt -e ".[experiments,dev]"
    touch .venv/.ready # for make: nothing is left to install
    rm -r "$target/wheels" "$target/install.log"
}

[ $# = 1 ] || fail "unpack.sh: $# arguments; expected one, the folder to unpack into"
command -v git >/dev/null || fail "git: not there; it restores the repository, and runs record it"
[ -z "$python_version" ] || find_python
echo "checking $bundle"
check_files
make_target "$1"
restore_all
clone
if [ -n "$python_version" ]; then install; fi
echo "done; now:"
echo "    cd '$target/repository' && $training"
