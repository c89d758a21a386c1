"""Nothing that jaxlm reads is run as code: found in the source with ast, so also in what no test calls."""

import ast
import builtins
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("jaxlm", "tools", "configs", "colab")

# Modules whose readers run what they read.
MODULES = frozenset(
    "pickle cPickle _pickle dill cloudpickle joblib shelve marshal yaml ruamel runpy imp".split()
)
# Calls that do, and the one place (file, function) that may: 'X.name' is any object's method.
CALLS: dict[str, tuple[str, str] | None] = {
    "eval": None,
    "exec": None,
    "compile": None,
    "__import__": None,
    "os.system": None,
    "os.popen": None,
    "numpy.fromregex": None,
    "jinja2.Template": None,
    "jinja2.Environment": ("jaxlm/page/__init__.py", "template"),  # a template of jaxlm's own
    "jinja2.sandbox.SandboxedEnvironment": None,  # a template could change what it is given
    "torch.load": ("jaxlm/interop/source.py", "read_pickle"),  # behind --allow_pickle
    # configs/*.py
    "importlib.util.spec_from_file_location": ("jaxlm/config_files.py", "load_recipe"),
    "importlib.import_module": ("jaxlm/tasks/text_scores.py", "_library"),  # names written there
    "shutil.unpack_archive": None,
    "X.extractall": None,  # leaves its folder
    "X.read_pickle": None,
    "X.exec_module": ("jaxlm/config_files.py", "load_recipe"),
}
# Arguments that must, and that must not, have a value.
NEEDED = {"numpy.load": ("allow_pickle", False)}
FORBIDDEN = {"allow_pickle": True, "trust_remote_code": True, "shell": True, "weights_only": False}


def violations(root: Path) -> list[str]:
    """'jaxlm/x.py:7: numpy.load without allow_pickle=False' for all that could run what it reads."""
    found = []
    for path in sorted(file for folder in FOLDERS for file in root.glob(f"{folder}/**/*.py")):
        name = str(path.relative_to(root))
        found += [f"{name}:{line}: {what}" for line, what in _in_file(path, name)]
    return found


def _in_file(path: Path, name: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(path.read_text(encoding="utf-8"), name)
    imported = dict(_imports(tree))
    for line, module in _modules(tree):
        if module.split(".")[0] in MODULES:
            yield line, f"imports {module}"
    for function, node in _calls(tree):
        called = _full_name(node.func, imported)
        keywords = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        method = f"X.{called.rpartition('.')[2]}" if isinstance(node.func, ast.Attribute) else ""
        for forbidden in {called, method} & CALLS.keys():
            if CALLS[forbidden] != (name, function):
                yield node.lineno, f"calls {called}"
        if called in NEEDED:
            argument, value = NEEDED[called]
            if keywords.get(argument, ...) is not value:
                yield node.lineno, f"{called} without {argument}={value}"
        for argument, value in FORBIDDEN.items():
            if keywords.get(argument, ...) is value:
                yield node.lineno, f"{called} with {argument}={value}"


def _modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every imported module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.lineno, str(node.module)


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(the name in the file, what it stands for): np -> numpy, load -> torch.load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (top, top)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _calls(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.Call]]:
    """(name of the innermost function, call)."""
    for node in ast.iter_child_nodes(tree):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.Call):
            yield function, node
        yield from _calls(node, node.name if is_function else function)


def _full_name(node: ast.expr, imported: dict[str, str]) -> str:
    """'np.load' -> 'numpy.load'; '?.load' where the object is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_full_name(node.value, imported)}.{node.attr}"
    if isinstance(node, ast.Name):
        return imported.get(node.id, node.id if hasattr(builtins, node.id) else f"?{node.id}")
    return "?"


def check_nothing_is_run(root: Path) -> None:
    found = violations(root)
    assert not found, "what is read could run code:\n" + "\n".join(found)


def test_nothing_that_is_read_can_run_code():
    check_nothing_is_run(ROOT)


WRONG = {
    "pickle": "import pickle",
    "a pickle in a function": "def f():\n    from cloudpickle import loads",
    "yaml": "import yaml",
    "a loader that defaults to pickles": "import numpy as np\nnp.load('x')",
    "allowed by a variable": "import numpy as np\nyes = True\nnp.load('x', allow_pickle=yes)",
    "another module's loader": "from numpy import load\nload('x', allow_pickle=True)",
    "numpy's format": "import numpy as np\nnp.lib.format.read_array(f, allow_pickle=True)",
    "torch": "import torch\ndef read_pickle(path):\n    return torch.load(path, weights_only=True)",
    "torch by its name": "from torch import load as read\nread('x')",
    "eval": "eval('1')",
    "exec": "def f():\n    exec('1')",
    "a Python file": "from importlib import util\nutil.spec_from_file_location('a', 'a.py')",
    "a module by name": "import importlib\nimportlib.import_module('a')",
    "a shell": "import subprocess\nsubprocess.run('a', shell=True)",
    "code of a model": "from transformers import AutoModel\nAutoModel.from_pretrained('a', trust_remote_code=True)",
    "a template outside the sandbox": "import jinja2\njinja2.Environment()",
    "an archive": "import tarfile\ntarfile.open('a').extractall('b')",
}


@pytest.mark.parametrize("case", WRONG)
def test_what_could_run_code_is_found(case, tmp_path):
    (tmp_path / "jaxlm").mkdir()
    (tmp_path / "jaxlm" / "a.py").write_text(WRONG[case] + "\n")
    with pytest.raises(AssertionError, match=r"jaxlm/a\.py:\d+: "):
        check_nothing_is_run(tmp_path)


def test_what_only_looks_like_it_is_not_reported(tmp_path):
    (tmp_path / "jaxlm").mkdir()
    (tmp_path / "jaxlm" / "a.py").write_text(
        "import ast, re\nimport numpy as np\nast.literal_eval('1')\nre.compile('a')\nmodel.eval()\n"
        "np.load('x', mmap_mode='r', allow_pickle=False)\nlowered.compile()\n"
    )
    check_nothing_is_run(tmp_path)
