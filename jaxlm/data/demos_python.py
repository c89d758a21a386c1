"""What Python source says about itself: its functions with their docstrings, and the kinds of its tokens."""

import ast
import io
import keyword
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

STRING_ENDINGS = ("STRING_START", "STRING_END")  # of f-strings (Python 3.12) and t-strings (3.14)
WORD_KINDS = {tokenize.NUMBER: "NUMBER", tokenize.OP: "OP", tokenize.COMMENT: "COMMENT"}


class Function(NamedTuple):
    """A function or method; nested ones belong to the function around them.

    line: of its first decorator or `def`, from 1. source: its lines, dedented. docstring: as `inspect.getdoc` cleans it,
    '' = none. docstring_start: offset of the docstring's first line in `source`. body: `source` without that statement.
    """

    name: str
    line: int
    source: str
    docstring: str
    docstring_start: int
    body: str


def read_functions(text: str) -> list[Function]:
    """The functions of a module's text, in its order.

    Raises:
      SyntaxError: if the text is no Python of this interpreter's version.
    """
    lines = text.split("\n")  # as the parser counts them: a form feed ends no line
    return [_function(node, lines) for node in _outermost_functions(ast.parse(text))]


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
        else:
            yield from _outermost_functions(child)


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Function:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    indent = lines[first][: len(lines[first]) - len(lines[first].lstrip())]
    own = [line.removeprefix(indent) for line in lines[first : node.end_lineno]]
    docstring = ast.get_docstring(node) or ""
    start = 0
    body = own
    if docstring:
        begin, end = (n - first for n in (node.body[0].lineno, node.body[0].end_lineno or 0))
        start = sum(len(line) + 1 for line in own[: begin - 1])
        body = own[: begin - 1] + own[end:]
    return Function(node.name, first + 1, "\n".join(own), docstring, start, "\n".join(body))


class LogicalLine(NamedTuple):
    """A statement's words with their kinds, and the comments before and in it. line: of its first word, from 1."""

    line: int
    words: list[str]
    kinds: list[str]


def read_logical_lines(text: str) -> Iterator[LogicalLine]:
    """The words of every logical line of a module's text:

        # the  sum   def add   (  a   ,  b   )  :       x    .  total ( "two words" )
        COMMENT …    KEYWORD DEF OP ARG OP ARG OP OP    NAME OP CALL OP STRING STRING OP

    A word is a token of `tokenize`; strings and comments are several, cut at white space. Names are told apart by
    the syntax tree: DEF behind `def` and `class`, ARG a parameter (also where a call names it), CALL what is called,
    ATTR another attribute, NAME the rest. An f-string is a STRING in every version of Python.
    """
    names = _kinds_of_names(text)
    line, words, kinds = 0, [], []
    previous = ""
    for kind, string, (row, column) in _merged_tokens(text):
        if kind == tokenize.NEWLINE:
            yield LogicalLine(line, words, kinds)
            line, words, kinds = 0, [], []
        elif kind == tokenize.NAME or kind == tokenize.STRING or kind in WORD_KINDS:
            if kind == tokenize.STRING:
                label = "STRING"
            elif kind != tokenize.NAME:
                label = WORD_KINDS[kind]
            elif keyword.iskeyword(string):
                label = "KEYWORD"
            elif previous in ("def", "class"):
                label = "DEF"
            else:
                label = names.get((row, column), "NAME")
            pieces = string.split()
            line = line or row
            words += pieces
            kinds += [label] * len(pieces)
            previous = string


def _merged_tokens(text: str) -> Iterator[tuple[int, str, tuple[int, int]]]:
    """(kind, string, (row, column)) of each token; all of an f-string is one STRING, as before Python 3.12."""
    lines = text.split("\n")
    depth, begin = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        if name.endswith(STRING_ENDINGS[0]):
            begin = begin if depth else token.start
            depth += 1
        elif name.endswith(STRING_ENDINGS[1]):
            depth -= 1
            if not depth:
                yield tokenize.STRING, _cut(lines, begin, token.end), begin
        elif not depth:
            yield token.type, token.string, token.start


def _cut(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text between two places (row from 1, column)."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    whole = lines[start[0] : end[0] - 1]
    return "\n".join([lines[start[0] - 1][start[1] :], *whole, lines[end[0] - 1][: end[1]]])


def _kinds_of_names(text: str) -> dict[tuple[int, int], str]:
    """(row from 1, column) -> CALL, ATTR or ARG, of the names that the syntax tree tells apart."""
    lines = text.split("\n")
    kinds: dict[tuple[int, int], str] = {}

    def place(row: int, byte: int) -> tuple[int, int]:  # the tree counts bytes, tokenize characters
        return row, len(lines[row - 1].encode()[:byte].decode())

    def name_of(node: ast.expr) -> tuple[int, int] | None:
        if isinstance(node, ast.Name):
            return place(node.lineno, node.col_offset)
        if isinstance(node, ast.Attribute):
            return place(node.end_lineno, node.end_col_offset - len(node.attr.encode()))
        return None

    for node in _walk_outside_strings(ast.parse(text)):
        if isinstance(node, ast.Call) and (called := name_of(node.func)):
            kinds[called] = "CALL"
        elif isinstance(node, ast.Attribute):
            kinds.setdefault(name_of(node), "ATTR")
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            kinds[place(node.lineno, node.col_offset)] = "ARG"
    return kinds


def _walk_outside_strings(node: ast.AST) -> Iterator[ast.AST]:
    """`ast.walk` that leaves out what is inside f-strings, whose places are wrong before Python 3.12."""
    yield node
    for child in ast.iter_child_nodes(node):
        if type(child).__name__ not in ("JoinedStr", "TemplateStr"):
            yield from _walk_outside_strings(child)
