"""Real runs that are hurt, and the law that they end as the unbroken one."""

import re
import subprocess
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxlm import build
from jaxlm.training.checkpoints import find_step
from tests import tiny

TIMEOUT = 300  # seconds; of any child


def arrays(workdir):
    """Every array of the newest checkpoint by its name, whatever devices it was saved from."""
    handler, found = ocp.PyTreeCheckpointHandler(), {}
    for item in ("params", "ema", "opt_state"):
        folder = find_step(workdir) / item
        if not folder.is_dir():
            continue
        as_numpy = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(folder).tree
        )
        tree = handler.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        for path, value in jax.tree_util.tree_leaves_with_path(tree):
            found[item, jax.tree_util.keystr(path)] = np.asarray(value)
    return found


def check_same_run(workdir, unbroken):
    """Bitwise equal arrays, equal metrics at equal steps, each step once."""
    assert find_step(workdir).name == find_step(unbroken).name
    a, b = arrays(workdir), arrays(unbroken)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=str(name))
    assert tiny.learned(workdir) == tiny.learned(unbroken)


def write_config(folder, spec, store, **overrides):
    path = folder / "config.json"
    build.write_config(tiny.tiny_config(spec, store, **overrides), path)
    return path


def start(command, devices=1, **options):
    return subprocess.Popen(
        command,
        env=tiny.environment(devices),
        cwd=tiny.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def end(child, timeout=TIMEOUT):
    """(exit status, what it said); it is not left behind."""
    try:
        _, said = child.communicate(timeout=timeout)
    finally:
        child.kill()
    return child.returncode, said


def at_point(command, point, nth, action):
    """The same command, with something done to it at a point of its NTH save."""
    python, m, *rest = command
    assert m == "-m"
    return [python, "-m", "tests.faults.at_point", point, str(nth), action, *rest]


def wait_for(child, is_true, what):
    """Until it is, while the child runs; a child that ends before is an error."""
    deadline = time.monotonic() + TIMEOUT
    while not is_true():
        assert child.poll() is None, (
            f"it ended before: {what}\n{(child.communicate()[1] or '')[-3000:]}"
        )
        if time.monotonic() > deadline:
            child.kill()
            raise AssertionError(f"in {TIMEOUT} s not: {what}")
        time.sleep(0.005)


def count_lines(workdir):
    metrics = workdir / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def unfinished(workdir):
    """Everything in a run's folder that is a part of something, or about to be removed."""
    partial = re.compile(r"tmp|partial|deleting")
    return [path for path in workdir.rglob("*") if partial.search(path.name)]
