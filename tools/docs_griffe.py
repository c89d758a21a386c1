"""What the documentation site makes of jaxlm's docstrings: options become tables, names in backticks links."""

import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Any

import griffe

DRAWN = re.compile(r"\S {3,}\S|──▶")
OPTION = re.compile(r"(?:^|(?<=\. ))(\w+(?:, \w+)*): ", re.M)
RESULT = re.compile(r"(?<=\.) (?=Returns )")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")


class Docstrings(griffe.Extension):
    """griffe calls it once it has read a package (`extensions` in mkdocs.yml)."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrites the docstrings of a package's modules, classes and functions."""
        del kwargs
        documented = [thing for thing in walk(pkg) if thing.docstring]
        # Of recipes and tools the site has only the modules.
        for_all = find_targets(documented) if pkg.name == "jaxlm" else {}
        described = {}
        for thing in documented:
            text, options = read(thing)
            link = lambda line, thing=thing: NAME.sub(lambda m: linked(m, thing, for_all), line)
            lines = [line if line.startswith("    ") else link(line) for line in text.split("\n")]
            linked_options = {name: link(option) for name, option in options.items()}
            described[thing.path] = "\n".join(lines), linked_options
        for thing in documented:
            text, options = described[thing.path]
            for base in bases_of(thing):
                options = described.get(base.path, ("", {}))[1] | options
            thing.docstring.value = text + section(thing, options)


def walk(thing: griffe.Object) -> Iterator[griffe.Object]:
    """A module or class, and all that is defined in it."""
    yield thing
    for member in thing.members.values():
        if not member.is_alias and (member.is_module or member.is_class or member.is_function):
            yield from walk(member)


def bases_of(thing: griffe.Object) -> list[griffe.Class]:
    """The bases of a dataclass, whose options are its own, too; the nearest first."""
    return thing.mro() if is_dataclass(thing) else []


def is_dataclass(thing: griffe.Object) -> bool:
    return thing.is_class and "dataclass" in thing.labels


def names_of(thing: griffe.Object) -> list[str]:
    """What `name: text` in a docstring may be about: a function's parameters, or a class's fields."""
    if thing.is_function:
        return [parameter.name for parameter in thing.parameters]
    if thing.is_module:
        return []
    classes = [*reversed(bases_of(thing)), thing]
    fields = [m.name for c in classes for m in c.members.values() if m.is_attribute]
    return list(dict.fromkeys([*(p.name for p in thing.parameters), *fields]))


def read(thing: griffe.Object) -> tuple[str, dict[str, str]]:
    """(text without what it says of options, {option: what it is}) of a docstring.

    `name: text` or `name, name: text` is about options where it begins a line, or follows a full stop; it goes on up to
    the next one, an empty line, or a sentence that says what is returned.
    """
    names, kept, options = set(names_of(thing)), [], {}
    for paragraph in indent_drawings(thing.docstring.value).split("\n\n"):
        is_section = paragraph.split("\n")[0].endswith(":")
        starts = [m for m in OPTION.finditer(paragraph) if set(m[1].split(", ")) <= names] * (
            not is_section
        )
        ends = [m.start() for m in starts] + [len(paragraph)]
        kept.append(paragraph[: ends[0]])
        for match, end in zip(starts, ends[1:], strict=True):
            about, *result = RESULT.split(" ".join(paragraph[match.end() : end].split()))
            options |= dict.fromkeys(match[1].split(", "), about)
            kept += result
    return "\n\n".join(filter(str.strip, kept)), options


def indent_drawings(text: str) -> str:
    """A docstring that is a line and a drawing has lost the drawing's indent, which says that it is one."""
    first, *paragraphs = text.split("\n\n")
    is_flat = lambda paragraph: DRAWN.search(paragraph) and not paragraph.startswith(" ")
    return "\n\n".join(
        [first, *(textwrap.indent(p, "    ") if is_flat(p) else p for p in paragraphs)]
    )


def section(thing: griffe.Object, options: dict[str, str]) -> str:
    """Options as griffe reads them, in the order of the signature; it adds types and defaults."""
    if not options:
        return ""
    parameters = {parameter.name for parameter in thing.parameters}
    is_called_with = is_dataclass(thing) or set(options) <= parameters
    title = "Args" if is_called_with else "Attributes"
    lines = [f"    {name}: {options[name]}" for name in names_of(thing) if name in options]
    return "\n".join(["", "", f"{title}:", *lines])


def find_targets(things: list[griffe.Object]) -> dict[str, str]:
    """The paths of public classes and functions of modules, by those names that only one has."""
    tops = [t for t in things if not t.is_module and t.parent.is_module and is_public(t)]
    counts = Counter(thing.name for thing in tops)
    return {thing.name: thing.path for thing in tops if counts[thing.name] == 1}


def is_public(thing: griffe.Object) -> bool:
    return not any(part.startswith("_") for part in thing.path.split("."))


def linked(match: re.Match, thing: griffe.Object, targets: dict[str, str]) -> str:
    """`name` as a link: what it is where the docstring stands, or the only one of that name."""
    try:
        target = thing.package[thing.resolve(match[1]).removeprefix(f"{thing.package.name}.")]
    except (griffe.NameResolutionError, KeyError):
        is_name = "_" in match[1] or match[1][0].isupper()  # and no ordinary word
        path = targets.get(match[1]) if is_name else None
    else:
        path = target.path if target.path in targets.values() else None
    return f"[{match[0]}][{path}]" if path else match[0]
