"""All that jaxlm offers says what it is; read from the source with ast, nothing is imported."""

import ast
from collections.abc import Iterator

from tests.tiny import ROOT


def undocumented(node: ast.AST, name: str) -> Iterator[str]:
    """The public classes, functions and methods below a module or class that have no docstring."""
    for part in node.body:
        if not isinstance(part, ast.FunctionDef | ast.ClassDef) or part.name.startswith("_"):
            continue
        if not ast.get_docstring(part):
            yield f"{name}.{part.name}"
        if isinstance(part, ast.ClassDef):
            yield from undocumented(part, f"{name}.{part.name}")


def test_all_that_is_public_has_a_docstring():
    modules = sorted((ROOT / "jaxlm").rglob("*.py"))
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text("utf-8")) for path in modules}
    assert [name for name, tree in trees.items() if not ast.get_docstring(tree)] == []
    assert [found for name, tree in trees.items() for found in undocumented(tree, name)] == []


def test_what_has_none_is_found():
    tree = ast.parse(
        "class A:\n  'A.'\n  def f(self): ...\n  def _g(self): ...\ndef h(): 'h.'\ndef k(): ..."
    )
    assert list(undocumented(tree, "m")) == ["m.A.f", "m.k"]
