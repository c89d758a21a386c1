#!/usr/bin/env bash
# From a fresh clone to a trained language model, in about ten minutes on two CPU cores:
#
#   bash tools/quickstart.sh [--text FILE_OR_DIR] [WORKDIR] [-- FLAGS OF jaxlm.pretrain]
#
# Installs jaxlm and requirements.txt into .venv, prepares text (this Python's own standard library, or yours),
# pretrains configs/gpt.py:tiny, evaluates it on held-out text beside gzip and xz, draws the curves and
# prints text that the model wrote. A second run reuses whatever the first one made.
set -euo pipefail
here="$PWD"
cd "$(dirname "$0")/.."
. tools/venv.sh

text="" workdir=""
while [ $# -gt 0 ]; do
  case "$1" in
    --text)
      [ $# -ge 2 ] || die "found: --text without a path; expected: --text FILE_OR_DIR"
      text="$2"
      shift
      ;;
    --text=*) text="${1#--text=}" ;;
    --help | -h)
      sed -n '2,8s/^# \{0,1\}//p' "$0"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    -*) die "found: $1; expected: [--text FILE_OR_DIR] [WORKDIR]" ;;
    *)
      [ -z "$workdir" ] || die "found: two workdirs, $workdir and $1; expected: one"
      workdir="$1"
      ;;
  esac
  shift
done

# Paths are the caller's; this script works in the repository's root.
from_here() {
  case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s\n' "$here/$1" ;;
  esac
}

set -- --config=configs/gpt.py:tiny ${1+"$@"}
if [ -n "$text" ]; then
  text="$(from_here "$text")"
  [ -e "$text" ] || die "found: no file or folder $text; expected: text files"
  case "$text" in *"'"*) die "found: a quote in $text; change: rename it" ;; esac
  # A part of every file is held out, so that a single file will do.
  set -- "$@" "--config.data.sources=('text=$text',)" --config.data.split=tail
fi
if [ -n "$workdir" ]; then
  workdir="$(from_here "$workdir")"
elif [ -n "$text" ]; then
  workdir="runs/quickstart-text"
else
  workdir="runs/quickstart"
fi

make_venv .venv
install_once .venv jaxlm pyproject.toml requirements.txt -- -e . ||
  die "could not install jaxlm and requirements.txt"
python=.venv/bin/python

heading "1 of 3: pretraining configs/gpt.py:tiny in $workdir (what is there already is reused)"
"$python" -m jaxlm.pretrain "$@" --workdir="$workdir"

heading "2 of 3: held-out text"
"$python" -m jaxlm.evaluate --checkpoint="$workdir" --baselines

heading "3 of 3: what the model writes"
prompt="def "
[ -z "$text" ] || prompt="The "
"$python" -m jaxlm.generate --checkpoint="$workdir" --prompt="$prompt"

cat <<EOF

curves:  $workdir/plots/loss.png  $workdir/plots/throughput.png

Four things to do next:
  $python -m jaxlm.generate --checkpoint=$workdir --prompt='import numpy'
  $python -m jaxlm.finetune --config=configs/finetune/demo.py:package --config.init_from=$workdir --workdir=runs/package
  $python -m jaxlm.pretrain --config=configs/bert.py:tiny --workdir=runs/bert
  bash tools/quickstart.sh --text A_FOLDER_OF_YOUR_TEXT
EOF
