"""The shell scripts start on macOS, too: bash 3.2, and no options that only GNU's tools have."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [ROOT / ".ci" / "run", *sorted((ROOT / "tools").glob("*.sh"))]

# What bash 3.2 or BSD's tools lack, as regular expressions on a line without its comment.
UNPORTABLE = {
    "associative array": r"\b(declare|local|typeset)\s+-\w*[An]\b",
    "mapfile": r"\b(mapfile|readarray)\b",
    "case conversion": r"\$\{\w+(\^|,)",
    "|&": r"\|&",
    "&>>": r"&>>",
    "negative index": r"\$\{\w+\[-\d",
    "${x@Q}": r"\$\{\w+@\w\}",
    "wait -n": r"\bwait\s+-n\b",
    "EPOCHSECONDS": r"\bEPOCH(SECONDS|REALTIME)\b",
    "heredoc in $( )": r"\$\([^)]*<<",
    "empty array under set -u": r'(?<!\+)"\$\{\w+\[[@*]\]\}"',
    "sed -i": r"\bsed\s+(-\w+\s+)*-i\b",
    "sed -r": r"\bsed\s+-r\b",
    "readlink -f": r"\breadlink\s+-\w*f|\brealpath\b",
    "grep -P": r"\bgrep\s+-\w*P",
    "date": r"\bdate\s+(-d|--date|\+\S*%N)",
    "stat": r"\bstat\s+(-c|--format)",
    "sort -V": r"\bsort\s+-\w*V",
    "xargs -r": r"\bxargs\s+-\w*r",
    "nproc, timeout, sha256sum": r"(^|[;&|(]|\$\()\s*(nproc|timeout|sha256sum|md5sum|tac|shuf)\b",
    "cp/ls/du long option": r"\b(cp|mv|ls|du|rm|mkdir|head|tail|find|tar)\s+--\w",
    "mktemp template": r"\bmktemp\s+(-\w+\s+)*(--|-p|-t)",
}


def unportable(text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        code = re.sub(r"(^|\s)#.*", "", line)
        found += [
            f"line {number}: {name}: {line}" for name, p in UNPORTABLE.items() if re.search(p, code)
        ]
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_parses_and_is_portable(script):
    assert unportable(script.read_text()) == []
    subprocess.run(["bash", "-n", str(script)], check=True)


WRONG = [
    "declare -A x",
    "mapfile -t lines < file",
    "echo ${name^^}",
    "make |& tee log",
    'echo "${items[@]}"',
    "sed -i s/a/b/ file",
    "here=$(readlink -f $0)",
    "grep -oP x file",
    "date -d yesterday",
    "x=$(nproc)",
    "x=$(cat <<EOF",
    "cp --reflink a b",
]


@pytest.mark.parametrize("line", WRONG)
def test_an_unportable_line_is_found(line):
    assert unportable(line)


def bash(script: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; . tools/venv.sh\n{script}"],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
    )


def fake_python(folder: Path, *, version: tuple[int, int], has_ensurepip: bool = True) -> Path:
    """A stand-in that runs this interpreter with another version or without ensurepip."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lie.py").write_text(
        "import sys\n"
        "code = sys.argv[2] if sys.argv[1:2] == ['-c'] else ''\n"
        f"sys.version_info = {(*version, 0, 'final', 0)}\n"
        + ("" if has_ensurepip else "sys.modules['ensurepip'] = None\n")
        + "exec(code)\n"
    )
    path = folder / "python3"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{folder}/lie.py" "$@"\n')
    path.chmod(0o755)
    return path


def test_an_old_python_is_refused_with_what_to_do(tmp_path):
    old = fake_python(tmp_path, version=(3, 9))
    done = bash("find_python", PYTHON=str(old))
    assert done.returncode != 0
    assert "found: no Python >= 3.11" in done.stderr and "apt-get install" in done.stderr


def test_a_tested_python_is_taken_before_a_newer_one(tmp_path):
    newer = fake_python(tmp_path / "new", version=(3, 15))
    tested = fake_python(tmp_path / "tested", version=(3, 12))
    done = bash("find_python", PYTHON=f"{newer} {tested}")
    assert done.stdout.strip() == str(tested)
    assert bash("find_python", PYTHON=str(newer)).stdout.strip() == str(newer)


def test_a_missing_ensurepip_names_the_apt_line(tmp_path):
    python = fake_python(tmp_path, version=(3, 11), has_ensurepip=False)
    done = bash(f"make_venv '{tmp_path}/venv'", PYTHON=str(python))
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_an_install_is_done_once_for_the_same_files(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    # A python that counts its pips.
    (venv / "bin" / "python").write_text(
        f'#!/bin/sh\n[ "$1" != -m ] || {{ echo pip >> "{tmp_path}/pips"; exit ${{PIP_EXIT:-0}}; }}\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    (venv / "bin" / "python").chmod(0o755)
    wanted = tmp_path / "requirements.txt"
    wanted.write_text("a\n")

    def install(**env):
        return bash(f"install_once '{venv}' dev '{wanted}' -- -r '{wanted}'", **env).returncode

    def pips():
        path = tmp_path / "pips"
        return len(path.read_text().split()) if path.exists() else 0

    assert install(PIP_EXIT="1") != 0 and pips() == 1
    assert install() == 0 and pips() == 2  # the failed one counts for nothing
    assert install() == 0 and pips() == 2
    wanted.write_text("b\n")
    assert install() == 0 and pips() == 3


@pytest.mark.parametrize(
    "script,argument,said",
    [
        ("check.sh", "--orakels", "expected: --oracles"),
        ("check.sh", "--smoke", "expected: --smoke LANE"),
        ("quickstart.sh", "--test", "[--text FILE_OR_DIR] [WORKDIR]"),
        ("quickstart.sh", "--text=/no/such/place", "/no/such/place"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_made(script, argument, said, tmp_path):
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / script), argument],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and said in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["check.sh", "quickstart.sh"])
def test_help_says_how_to_use_it(script):
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / script), "--help"], capture_output=True, text=True, check=True
    )
    assert f"bash tools/{script}" in done.stdout and "set -e" not in done.stdout
