"""Every command of README.md and docs/guide: known, read with its flags and its config, and (-m slow) run."""

import shlex
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from jaxlm import build
from tests import tiny
from tests.readme import small
from tests.readme.markdown import PAGES, ROOT, Command, find_commands, find_python, read_commands
from tests.readme.reader import Reader, write_files
from tests.readme.reading import read_other, read_python

# runpy says that a module is imported already: it is read as a program of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")

COMMANDS = [command for page in PAGES for command in read_commands(page)]
PYTHON = [
    pytest.param(code, id=f"{page.relative_to(ROOT)}:{line}")
    for page in PAGES
    for line, code in find_python(page.read_text(encoding="utf-8"))
]
# The cheapest of those that show the most: a run, and the use of one.
SMOKE = (small.PRETRAIN.strip(), "python -m jaxlm.generate --checkpoint=W --prompt='def'")


def how_of(command: Command) -> small.Run | small.Read | small.Shell | None:
    return small.longest(small.HOW, small.whole(command.text))


def different(is_wanted: Callable[[Any], bool]) -> list:
    """A parameter for each command that is run in such a way, named by its first place."""
    found: dict[str, Command] = {}
    for command in COMMANDS:
        if is_wanted(how_of(command)):
            found.setdefault(small.whole(command.text), command)
    return [pytest.param(command, id=command.place) for command in found.values()]


def in_lanes(parameters: list) -> list:
    marked = []
    for parameter in parameters:
        (command,) = parameter.values
        marks = [getattr(pytest.mark, how_of(command).lane)]
        marks += [pytest.mark.smoke] if command.text in SMOKE else []
        marked.append(pytest.param(command, id=parameter.id, marks=marks))
    return marked


# --- the pages --------------------------------------------------------------------------------------------------------

PAGE = """
Some text with `python -m a.b --x=1`, a name `python`, `--lanes` and flags `--x=1
--y=2` over two lines.

| do | by |
| --- | --- |
| that | `… --z=3` or `bash c.sh d`, not `W/config.json` |

```bash
# a remark
NAME=v FLAGS="--p=1 --q=2"
python tool.py --n=$NAME \\
    -- $FLAGS      # and why
ssh host 'cd x &&
  python y.py'
```

```python
import not_this
```
"""


def test_commands_are_found_in_text_tables_and_blocks():
    assert list(find_commands(PAGE)) == [
        (2, "python -m a.b --x=1"),
        (2, "--x=1 --y=2"),
        (7, "… --z=3"),
        (7, "bash c.sh d"),
        (12, "python tool.py --n=v -- --p=1 --q=2"),
        (14, "ssh host 'cd x && python y.py'"),
    ]
    assert list(find_python(PAGE)) == [(19, "import not_this")]


def test_every_command_of_the_pages_is_known():
    unknown = [f"{c.place}: {c.text}" for c in COMMANDS if how_of(c) is None]
    assert not unknown, "say in tests/readme/small.py how they are run: " + "\n".join(unknown)
    assert len(COMMANDS) > 100


@pytest.mark.parametrize("code", PYTHON)
def test_python_of_the_pages_is_known(code):
    assert small.longest(small.PYTHON, code) is not None, (
        "say in tests/readme/small.py what it needs"
    )
    compile(code, "block", "exec")


def test_every_line_of_the_table_is_used():
    texts = [small.whole(command.text) for command in COMMANDS]
    texts += [made.command for made in small.MADE.values()]
    used = [max((k for k in small.HOW if t.startswith(k)), key=len, default="") for t in texts]
    assert set(small.HOW) == set(used) - {""}
    unused = [name for name in small.STANDS_FOR if not any(name in text for text in texts)]
    assert not unused


# --- flags and configs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the clone's configs and what a command reads before its flags are known: files, W/config.json."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    write_files(folder)
    (folder / "W").mkdir()
    config = tiny.tiny_config("configs/gpt.py:tiny", folder / "text")
    build.write_config(config, folder / "W" / "config.json")
    return folder


@pytest.mark.parametrize(
    "command",
    different(lambda how: isinstance(how, small.Read) or isinstance(how, small.Run) and how.reads),
)
def test_its_flags_and_its_config_are_known(command, place, monkeypatch):
    monkeypatch.chdir(place)
    how, text = how_of(command), small.stood_for(small.whole(command.text))
    if isinstance(how, small.Run):
        text = small.small(text, how)
    read_python(shlex.split(text))


@pytest.mark.parametrize("command", different(lambda how: isinstance(how, small.Shell)))
def test_bash_reads_it_and_ours_within_it_is_known(command, place, monkeypatch):
    monkeypatch.chdir(place)
    text = small.stood_for(small.whole(command.text))
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    read_other(text, how_of(command).devices)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("python -m jaxlm.pretrain --config=configs/gpt.py:tiny --workdri=W", "workdri"),
        ("python -m jaxlm.pretrain --config=configs/gpt.py:tinny --workdir=W", "tinny"),
        ("python -m jaxlm.pretrain --config=configs/gpt.py:tiny --config.seeed=1 --workdir=W", "seeed"),
        ("python tools/fsck.py", "2"),
        ("python tools/sweep.py --config=configs/gpt.py:tiny --workdir=S --grid sed=0,1", "sed"),
        ("pip install -e '.[gpus]'", "gpus"),
        ("pytest tests/no_such.py", "no_such"),
        ("python -m jaxlm.pretrain --config=configs/gpt.py:llama3_1b --workdir=W --config.mesh.fsdp=3", "fsdp"),
        ("xpk create --command='python -m jaxlm.pretrain --config=configs/gpt.py:tiny --mesh=8'", "mesh"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_not_known(wrong, error, place, monkeypatch):
    monkeypatch.chdir(place)
    with pytest.raises((Exception, SystemExit), match=error):
        read_other(wrong, devices=16)


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.mark.parametrize("command", in_lanes(different(lambda how: isinstance(how, small.Run))))
def test_it_runs(command, reader):
    reader.run(small.whole(command.text))


@pytest.mark.slow
@pytest.mark.parametrize("code", PYTHON)
def test_python_of_the_pages_runs(code, reader):
    reader.run_python(code)
