"""A reader's folder: a clone, some files of his own, and what earlier commands of the pages have left."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from tests import tiny
from tests.readme import small
from tests.readme.markdown import ROOT

CLONE = ("jaxlm", "configs", "tools", "tests", "requirements.txt", "pyproject.toml")
# Flags of what a command makes: that is not there before.
MAKES = ("--workdir", "--output", "--target", "--work", "--index")
SECONDS = 600
ROWS = 32


def write_files(folder: Path) -> None:
    """The files that the pages name, with a few lines each."""
    (folder / "text").mkdir()
    for number, path in enumerate(sorted(Path(os.__file__).parent.glob("*.py"))[:40]):
        text = path.read_text(encoding="utf-8")[:1500]
        (folder / "text" / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "input.txt").write_text(text * 8, encoding="utf-8")
    (folder / "F.txt").write_text("def f\nimport os\n", encoding="utf-8")
    for name in ("my.csv", "new.csv"):
        rows = "".join(f"{'a' * (n % 5 + 1)} {'yz'[n % 2]},{'yz'[n % 2]}\n" for n in range(48))
        (folder / name).write_text(f"text,intent\n{rows}", encoding="utf-8")
    for name in "abc":
        (folder / f"{name}.en").write_text("one two\nthree\n" * 16, encoding="utf-8")
        (folder / f"{name}.de").write_text("eins zwei\ndrei\n" * 16, encoding="utf-8")
    write_rows(
        folder / "chats.jsonl",
        lambda n: {"messages": [said("user", f"a {n}"), said("assistant", "b")]},
    )
    write_rows(
        folder / "pairs.jsonl", lambda n: {"prompt": f"a {n}", "chosen": "a", "rejected": "zz"}
    )
    write_rows(folder / "similar.jsonl", lambda n: {"text": f"one {n}", "text_pair": f"{n} one"})
    for name in ("train", "dev", "test"):
        write_rows(folder / f"{name}.jsonl", lambda n: {"source": f"one two {n}", "target": "one"})
    rows = [{"instruction": "Say b.", "input": f"a {n}", "output": "b"} for n in range(ROWS)]
    (folder / "instruction-data.json").write_text(json.dumps(rows), encoding="utf-8")
    tasks = folder / "lm_eval_tasks"
    tasks.mkdir()
    write_rows(
        tasks / "rows.jsonl",
        lambda n: {"question": f"one {n}", "choices": ["two", "four"], "answer": 0},
    )
    (tasks / "tiny.yaml").write_text(TASK, encoding="utf-8")


TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: lm_eval_tasks/rows.jsonl}, cache_dir: cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def write_rows(path: Path, row: Callable[[int], dict]) -> None:
    """JSON lines; row: what the row of a number is."""
    path.write_text("".join(json.dumps(row(n)) + "\n" for n in range(ROWS)), encoding="utf-8")


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


class Reader:
    """Runs commands, each in a folder of its own, under `root`; what one needs is made once, by commands too."""

    def __init__(self, root: Path):
        self.root = root
        self.made: dict[str, Path] = {}

    def run(self, text: str, has: Mapping[str, str] | None = None) -> tuple[Path, str]:
        """Runs a whole command of a page; (its folder, what it printed). It must end well."""
        how = small.longest(small.HOW, text)
        assert isinstance(how, small.Run), text
        command = small.small(small.stood_for(text), how)
        folder = self.folder(shlex.split(command), {**how.has, **(has or {})})
        return folder, self.end(folder, command, how)

    def run_python(self, code: str) -> None:
        """Runs a block of Python of a page. It must end well."""
        found = small.longest(small.PYTHON, code)
        assert found is not None, code
        before, has = found
        folder = self.folder(list(has), has)
        (folder / "block.py").write_text(before + code, encoding="utf-8")
        self.end(folder, "python block.py", small.Run())

    def end(self, folder: Path, command: str, how: small.Run) -> str:
        """Runs a command in a folder to its end; what it printed."""
        environment = tiny.environment(how.devices) | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.root),
        }
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        printed = ""
        try:
            if how.serves:
                printed = end_server(process)
            rest, _ = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        printed += rest
        assert process.returncode == 0, f"{command}\nstatus {process.returncode}\n{printed[-4000:]}"
        assert "Traceback" not in printed, printed
        return printed

    def folder(self, words: list[str], has: Mapping[str, str]) -> Path:
        """A new folder with the clone, the files, and what the command's words name and do not make."""
        folder = self.root / f"{len(list(self.root.iterdir())):03}"
        folder.mkdir()
        for name in CLONE:
            (folder / name).symlink_to(ROOT / name)
        write_files(folder)
        for name, what in {**small.NAMES, **has}.items():
            if is_named(name, words) and name not in outputs(words):
                shutil.copytree(self.make(what), folder / name)
        return folder

    def make(self, what: str) -> Path:
        """The folder of small.MADE that was asked for."""
        if what not in self.made:
            made = small.MADE[what]
            folder, _ = self.run(made.command, made.has)
            self.made[what] = folder / made.folder
        return self.made[what]


def outputs(words: list[str]) -> set[str]:
    """The folders that a command makes: values of its flags of MAKES."""
    pairs = [word.partition("=")[::2] for word in words] + list(zip(words, words[1:], strict=False))
    return {value for flag, value in pairs if flag in MAKES}


def is_named(name: str, words: list[str]) -> bool:
    """Whether a folder of this name is in a word, also as a part: W is in W/config.json and in --checkpoint=W@12."""
    return any(re.search(rf"(?<![\w/.]){re.escape(name)}(?![\w.])", word) for word in words)


def end_server(process: subprocess.Popen) -> str:
    """What a server prints until it says its address; once it answers there, it is interrupted, as by Ctrl-C."""
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if found := re.search(r"http://[\d.]+:(\d+)", line):
            wait_for_answer(f"http://127.0.0.1:{found[1]}/")
            os.killpg(process.pid, signal.SIGINT)
            break
    return printed


def wait_for_answer(address: str) -> None:
    """Returns when a server answers, if only with an error."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(address, timeout=10).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nothing answers at {address}")
