"""Runs a notebook from top to bottom in a real kernel, with other values in its form fields."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import nbclient
import nbformat

ROOT = Path(__file__).resolve().parents[2]


def run_notebook(
    path: Path | str,
    settings: Mapping[str, Any],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[nbclient.NotebookClient], None] | None = None,
    last: str = "",
) -> nbformat.NotebookNode:
    """Executes it on one CPU device and returns it with its outputs; raises what a cell raises.

    folder: where its kernel runs; default its own. environment: beside this process's. watch: is given the client before the
    first cell. last: code of a further cell at the end.
    """
    path = Path(path)
    notebook = nbformat.read(path, as_version=4)
    fill_in(notebook, settings)
    if last:
        notebook.cells.append(nbformat.v4.new_code_cell(last))
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder or path.parent)}},
        coalesce_streams=True,
    )
    # One device, as a laptop has; programs that another test has compiled are not compiled again.
    known = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    if cache := jax.config.jax_compilation_cache_dir:
        known["JAX_COMPILATION_CACHE_DIR"] = cache
        known["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    if watch:
        watch(client)
    client.execute(env=known | dict(environment or {}))
    return notebook


def fill_in(notebook: nbformat.NotebookNode, settings: Mapping[str, Any]) -> None:
    """Sets form fields. Raises KeyError for one that no form has."""
    left = dict(settings)
    for cell in notebook.cells:
        if "# @title" not in cell.source:
            continue
        lines = cell.source.splitlines()
        for index, line in enumerate(lines):
            name, equals, _ = line.partition(" = ")
            if equals and "  # @param" in line and name in left:
                field = line.partition("  # @param")
                lines[index] = f"{name} = {left.pop(name)!r}{field[1]}{field[2]}"
        cell.source = "\n".join(lines)
    if left:
        raise KeyError(f"no form has the fields {', '.join(left)}")


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.get("name") == "stdout"
    )


def pictures(notebook: nbformat.NotebookNode) -> list[str]:
    """The PNGs that it shows, as base64."""
    return [
        output["data"]["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
