#!/usr/bin/env bash
# What a new reader does in the first hour, on a clean clone of what is committed here and in an empty home:
#
#   bash tools/first_hour.sh [FOLDER]
#
# The two commands of README.md, then every command of README.md and docs/guide, each run small
# (tests/readme). FOLDER, by default a temporary one, keeps the clone and the home; a temporary one is removed.
# Of tools/check.sh formatter, linter, types and the fast tests of the pages run here, not its other tests,
# which take longer than all of this. It needs git, Python >= 3.11 with venv, pip's network, and about an hour
# on two CPU cores.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
. tools/venv.sh

case "${1:-}" in
  --help | -h)
    sed -n '2,10s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  -*) die "found: $1; expected: [FOLDER]" ;;
esac
if [ $# -gt 0 ]; then
  case "$1" in /*) folder="$1" ;; *) folder="$here/$1" ;; esac
  [ ! -e "$folder" ] || die "found: $folder is there already; expected: a folder to make"
  mkdir -p "$folder"
else
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
fi
folder="$(cd "$folder" && pwd)"
mkdir "$folder/home"
[ -z "$(git status --porcelain)" ] || say "what is not committed here is not in the clone"
git clone --quiet . "$folder/jaxlm"
cd "$folder/jaxlm"

# An empty home: no packages, caches or settings of this user.
unset PYTHONPATH VIRTUAL_ENV XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME
export HOME="$folder/home"

began=$SECONDS
heading "1 of 3: bash tools/quickstart.sh"
bash tools/quickstart.sh
say "after $((SECONDS - began)) s"
heading "2 of 3: bash tools/check.sh, with the tests of the pages"
bash tools/check.sh -- tests/readme
say "after $((SECONDS - began)) s"
heading "3 of 3: every command of README.md and docs/guide"
.venv/bin/python -m pytest -q -m slow tests/readme
say "the first hour, in $((SECONDS - began)) s"
