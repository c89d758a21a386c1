"""Packages whose versions do not go together: by requirements.txt, by what they ask of one another, and by experience."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jaxlm.config_files import HOME

REQUIREMENTS = HOME / "requirements.txt"
# Whose own requirements are looked at, with the extras that an accelerator is installed by.
CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml-collections")
EXTRAS = ("", "tpu", "cuda12", "cuda13")


class Conflict(NamedTuple):
    """breaks: whether a run fails by it, or is only slower."""

    found: str
    mend: str
    breaks: bool = True


class Known(NamedTuple):
    """Versions that fail together although no package says so."""

    versions: tuple[str, ...]
    why: str
    mend: str
    breaks: bool = True


KNOWN = (
    Known(
        ("jax>=0.11.1", "flax<=0.12.8"),
        "flax 0.12.8 uses what jax 0.11.1 has removed",
        "pip install 'jax>=0.7.2,<0.11'",
    ),
    Known(
        ("sentencepiece<0.2.1",),
        "a crafted model file overflows its memory (CVE-2026-1260)",
        "pip install 'sentencepiece>=0.2.1'",
    ),
    Known(
        ("jinja2<3.1.6",),
        "chat templates can leave its sandbox (CVE-2025-27516)",
        "pip install 'jinja2>=3.1.6'",
    ),
    Known(
        ("jaxlib>=0.10.2,<=0.11.0", "jax-cuda12-plugin"),
        "the gradient of an embedding may be hundreds of times slower on a GPU (openxla/xla#46225)",
        "look at the step's time; jaxlib 0.10.1 does not have it",
        breaks=False,
    ),
)


def find_conflicts() -> list[Conflict]:
    """All conflicts among the packages that this Python has."""
    installed = {
        canonicalize_name(d.name): d.version
        for d in reversed([*importlib.metadata.distributions()])
    }
    asked = [("requirements.txt", r, True) for r in read_requirements(REQUIREMENTS)]
    asked += [
        (f"{name} {installed[name]}", r, False)
        for name in CORE
        if name in installed
        for r in own_requirements(name)
    ]
    return [*known_conflicts(installed), *unmet(asked, installed)]


def read_requirements(path: Path) -> list[Requirement]:
    """The requirements of a requirements.txt, without its comments."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").split("\n"))
    return [Requirement(line) for line in lines if line]


def own_requirements(name: str) -> list[Requirement]:
    """What a package asks for, also by an extra of EXTRAS (of which only what is installed will count)."""
    lines = map(Requirement, importlib.metadata.requires(name) or ())
    return [
        r for r in lines if not r.marker or any(r.marker.evaluate({"extra": e}) for e in EXTRAS)
    ]


def known_conflicts(installed: Mapping[str, str]) -> Iterator[Conflict]:
    """The lines of KNOWN that the installed versions are in. installed: {canonical name: version}."""
    for known in KNOWN:
        if all(is_met(Requirement(text), installed) for text in known.versions):
            names = [Requirement(text).name for text in known.versions]
            versions = " with ".join(f"{name} {installed[name]}" for name in names)
            yield Conflict(f"{versions}: {known.why}", known.mend, known.breaks)


def is_met(requirement: Requirement, installed: Mapping[str, str]) -> bool:
    """Whether a package is installed in a version that a requirement allows."""
    version = installed.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def unmet(
    asked: list[tuple[str, Requirement, bool]], installed: Mapping[str, str]
) -> Iterator[Conflict]:
    """asked: (who asks, for what, whether it must be there at all)."""
    for who, requirement, needed in asked:
        name = canonicalize_name(requirement.name)
        if is_met(requirement, installed) or not (needed or name in installed):
            continue
        found = f"{name} {installed[name]}" if name in installed else f"no {name}"
        wanted = f"{name}{requirement.specifier}"
        yield Conflict(f"{found}, and {who} asks for {wanted}", f"pip install '{wanted}'")
