# Functions that quickstart.sh and check.sh share. Sourced, with `set -u` on and in bash 3.2 (macOS),
# so: no associative arrays, no mapfile, no GNU-only options.

say() { printf '%s\n' "$*"; }

heading() { printf '\n== %s\n' "$*"; }

die() {
  printf '%s\n' "$*" >&2
  exit 1
}

# python_between PYTHON LOW HIGH: does PYTHON start, and is LOW <= its minor version <= HIGH?
python_between() {
  "$1" -c "import sys; sys.exit(not (3, $2) <= sys.version_info[:2] <= (3, $3))" >/dev/null 2>&1
}

# find_python: prints a Python >= 3.11. $PYTHON goes first; then one of 3.11 to 3.13, which is what
# requirements.txt is tested on; then anything newer.
find_python() {
  local candidates="python3 python3.13 python3.12 python3.11 python3.14 python"
  local high name
  if [ -n "${PYTHON:-}" ]; then
    candidates="$PYTHON"
  fi
  for high in 13 99; do
    for name in $candidates; do
      if python_between "$name" 11 "$high"; then
        command -v "$name"
        return 0
      fi
    done
  done
  {
    say "found: no Python >= 3.11 (tried: $candidates; python3 is $(python3 --version 2>&1))"
    say "expected: Python 3.11, 3.12 or 3.13"
    say "change: install one (Debian: apt-get install python3 python3-venv; macOS: brew install python@3.13),"
    say "        or name yours: PYTHON=/path/to/python3.13 bash $0"
  } >&2
  return 1
}

# make_venv DIR: a virtual environment with pip in DIR; an unfinished one is made again.
make_venv() {
  local dir="$1" python
  if "$dir/bin/python" -m pip --version >/dev/null 2>&1; then
    return 0
  fi
  python="$(find_python)" || exit 1
  if ! "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then
    die "found: $python without ensurepip, so it cannot make a virtual environment
expected: the venv module and ensurepip
change: apt-get install python3-venv   (as root, on Debian and Ubuntu; then run this again)"
  fi
  say "making $dir with $("$python" --version)"
  "$python" -m venv --clear "$dir" || die "could not make the virtual environment $dir"
}

HASH_FILES='
import hashlib, pathlib, sys
split = sys.argv.index("--")
parts = [sys.version, *sys.argv[split:]]
parts += [pathlib.Path(name).read_text(encoding="utf-8") for name in sys.argv[1:split]]
print(hashlib.sha256("\\0".join(parts).encode()).hexdigest())
'

# install_once DIR NAME FILE... -- PIP_ARGUMENT...: pip install, unless that was done already for
# files with these contents. The stamp is written last, so an interrupted install is done again.
install_once() {
  local dir="$1" name="$2" stamp wanted
  shift 2
  stamp="$dir/.installed-$name"
  wanted="$("$dir/bin/python" -c "$HASH_FILES" "$@")" || return 1
  while [ "$1" != "--" ]; do
    shift
  done
  shift
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    return 0
  fi
  say "installing into $dir: $*"
  "$dir/bin/python" -m pip install --quiet --disable-pip-version-check "$@" || return 1
  printf '%s\n' "$wanted" >"$stamp"
}
