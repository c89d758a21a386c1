"""Checkpoints that are hurt on purpose: never restored wrong, always named, and the run goes on from what is whole."""

import contextlib
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.exits import Damaged, NotSaved
from jaxlm.training import stored
from jaxlm.training.checkpoints import Checkpoints, find_step
from jaxlm.training.state import new_state

OPTIMIZER = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))
SHAPES = {"embed": (64, 32), "layers": {"up": (2, 16, 64), "bias": (2, 16)}}
# What Orbax leaves behind when a file cannot be read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step):
    """A state as a run has it: two layers, moments, an average, and some parameters in bfloat16."""
    keys = iter(jax.random.split(jax.random.key(step), 3))
    normal = lambda shape: jax.random.normal(next(keys), shape)
    params = jax.tree.map(normal, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    params["embed"] = params["embed"].astype(jnp.bfloat16)
    state = new_state(params, OPTIMIZER, ema=True)
    grads = jax.tree.map(jnp.ones_like, params)
    _, opt_state = OPTIMIZER.update(grads, state.opt_state, params)
    return state.replace(step=jnp.int32(step), opt_state=opt_state)


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


ABSTRACT = abstract(make_state(0))


def about(step):
    return {"step": step, "window": {"loss": [step / 3, 4.0]}}


def save(workdir, steps):
    checkpoints = Checkpoints(workdir, keep_last=9, best_metric="loss")
    for step in steps:
        checkpoints.save(step, make_state(step), about(step), {"loss": 1.0 / step})
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with steps 10, 20 and 30."""
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, [10, 20, 30])
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir):
    """(state, manifest) as a run gets them."""
    checkpoints = Checkpoints(workdir, keep_last=9, best_metric="loss")
    try:
        return checkpoints.restore(ABSTRACT)
    finally:
        checkpoints.close()


def differences(restored, step):
    """What is not, bit by bit, what was saved at that step."""
    state, manifest = restored
    leaves = lambda tree: [
        (np.asarray(x).dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)
    ]
    wrong = [] if leaves(state) == leaves(make_state(step)) else ["the state"]
    wrong += [key for key, value in about(step).items() if manifest[key] != value]
    return wrong


def files(step_dir):
    return sorted(path for path in step_dir.rglob("*") if path.is_file())


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in files(folder)}


# ---------------------------------------------------------------- a damaged newest step


def data_file(step_dir, item="params"):
    """The largest file of an item: its arrays."""
    return max(files(step_dir / item), key=lambda path: path.stat().st_size)


def edit(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def zero(data):
    data[:] = bytes(len(data))


def halve(data):
    del data[len(data) // 2 :]


def edit_manifest(step_dir, **changes):
    path = step_dir / "manifest" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def of_another_step(step_dir, item):
    shutil.rmtree(step_dir / item)
    shutil.copytree(step_dir.parent / "20" / item, step_dir / item)


DAMAGE = {
    "an empty folder": lambda d: (shutil.rmtree(d), d.mkdir()),
    "no data": lambda d: data_file(d).unlink(),
    "half of the data": lambda d: edit(data_file(d, "opt_state"), halve),
    "zeros for data": lambda d: edit(data_file(d, "ema"), zero),
    "no parameters": lambda d: shutil.rmtree(d / "params"),
    "no average": lambda d: shutil.rmtree(d / "ema"),
    "bad metadata": lambda d: (d / "params" / "_METADATA").write_text("{"),
    "no index": lambda d: (d / "opt_state" / "manifest.ocdbt").unlink(),
    "no manifest": lambda d: shutil.rmtree(d / "manifest"),
    "an edited manifest": lambda d: edit_manifest(d, step=31),
    "the parameters of another step": lambda d: of_another_step(d, "params"),
    "the metrics of another step": lambda d: of_another_step(d, "metrics"),
}


def check_falls_back(workdir, caplog, step_restored=20, broken=30):
    before = contents(workdir / "checkpoints" / str(broken))
    with caplog.at_level(logging.WARNING, "jaxlm"):
        restored = restore(workdir)
    assert not differences(restored, step_restored)
    said = [record.getMessage() for record in caplog.records]
    assert any(f"checkpoint {broken} is damaged" in line for line in said), said
    aside = workdir / "checkpoints.damaged" / f"{broken}-1"
    assert contents(aside) == before
    assert aside.with_name(f"{broken}-1.txt").read_text().strip()
    assert int(find_step(workdir).name) == step_restored


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_step_is_named_and_set_aside(workdir, caplog, damage):
    DAMAGE[damage](workdir / "checkpoints" / "30")
    check_falls_back(workdir, caplog)
    save(workdir, [30, 40])  # the run comes there again, and is not refused
    assert not differences(restore(workdir), 40)
    assert Checkpoints(workdir).steps() == [10, 20, 30, 40]


def test_the_same_step_may_be_damaged_twice(workdir, caplog):
    for _ in range(2):
        (workdir / "checkpoints" / "30" / "manifest" / "metadata").unlink()
        assert not differences(restore(workdir), 20)
        save(workdir, [30])
    names = {path.name for path in (workdir / "checkpoints.damaged").iterdir()}
    assert names == {"30-1", "30-1.txt", "30-2", "30-2.txt"}


def test_numbers_that_are_none_are_not_resumed_from(workdir, caplog):
    checkpoints = Checkpoints(workdir)
    state = make_state(40)
    moments = jax.tree.map(lambda x: x * jnp.nan, state.opt_state[0].mu)
    opt_state = (state.opt_state[0]._replace(mu=moments), *state.opt_state[1:])
    checkpoints.save(40, state.replace(opt_state=opt_state), about(40), None)
    checkpoints.close()
    check_falls_back(workdir, caplog, step_restored=30, broken=40)
    assert "opt_state/0/mu/embed" in caplog.text


def test_a_broken_manifest_of_an_older_step_is_set_aside_too(workdir, caplog):
    (workdir / "checkpoints" / "10" / "metrics" / "metrics").write_text("{")
    assert not differences(restore(workdir), 30)
    assert "checkpoint 10 is set aside" in caplog.text
    assert Checkpoints(workdir).steps() == [20, 30]


def test_if_every_step_is_damaged_nothing_is_changed(workdir):
    for number, name in enumerate(["no parameters", "zeros for data", "an empty folder"], start=1):
        DAMAGE[name](workdir / "checkpoints" / f"{number}0")
    before = contents(workdir)
    with pytest.raises(Damaged, match=r"has steps \[10, 20, 30\], and none") as error:
        restore(workdir)
    assert error.value.status == 65
    assert all(f"checkpoints/{step}" in str(error.value) for step in (10, 20, 30))
    assert contents(workdir) == before


# ---------------------------------------------------------------- flipped bits


def flip_a_bit(step_dir, seed):
    """Flips one bit and says which: of an even seed in any file alike, of an odd one of all bytes alike."""
    size = lambda path: path.stat().st_size
    paths = sorted(files(step_dir), key=lambda path: (path.parent, size(path)))  # names are random
    draw, sizes = random.Random(seed), [*map(size, paths)]
    (path,) = draw.choices(paths, [1] * len(paths) if seed % 2 == 0 else sizes)
    bit = draw.randrange(path.stat().st_size * 8)

    def flip(data):
        data[bit // 8] ^= 1 << bit % 8

    edit(path, flip)
    return f"seed {seed}: bit {bit} of {path.relative_to(step_dir)}"


def check_no_flip_is_restored(saved, tmp_path, seeds, restore=restore):
    """A flipped bit in any file of the newest step is seen, or has changed nothing of what is restored."""
    seen = 0
    for seed in seeds:
        workdir = shutil.copytree(saved, tmp_path / f"flip {seed}")
        flip = flip_a_bit(workdir / "checkpoints" / "30", seed)
        restored = restore(workdir)
        fell_back = (workdir / "checkpoints.damaged" / "30-1").is_dir()
        wrong = differences(restored, 20 if fell_back else 30)
        assert not wrong, f"{flip}: {', '.join(wrong)} restored wrong"
        seen += fell_back
        shutil.rmtree(workdir)
    print(
        f"{len(seeds)} flipped bits: {seen} seen, {len(seeds) - seen} without effect, 0 restored wrong"
    )
    return seen


@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 600), marks=pytest.mark.slow)], ids=len
)
def test_no_flipped_bit_is_restored(saved, tmp_path, seeds):
    assert check_no_flip_is_restored(saved, tmp_path, seeds) > len(seeds) / 3


def test_flipped_bits_are_restored_where_nothing_is_compared(saved, tmp_path, monkeypatch):
    """The law fails where the checksums are not compared, so it is they that keep it."""
    monkeypatch.setattr(stored, "compare", lambda *_: None)
    with pytest.raises(AssertionError, match="the state restored wrong"):
        check_no_flip_is_restored(saved, tmp_path, range(60))


# ---------------------------------------------------------------- a disk that does not take a checkpoint


@contextlib.contextmanager
def full(disk):
    """All of the small disk is taken."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(1 << 16)):
            pass
    yield "No space left on device"
    filler.unlink()


@contextlib.contextmanager
def read_only(disk):
    mount = ["mount", "-o", "remount", str(disk)]
    subprocess.run([*mount, "-r"], check=True)
    try:
        yield "Read-only file system"
    finally:
        subprocess.run([*mount, "-w"], check=True)


@contextlib.contextmanager
def small_files(disk):
    """No file of this process may be larger than half a megabyte: a write fails when its folder is there already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        yield "File too large"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk of its own")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def large_state(step):
    return make_state(step).replace(
        frozen={"table": jax.random.normal(jax.random.key(step), (1 << 19,))}
    )


def check_a_failed_save_is_told(disk, breaking, make=Checkpoints, patience=60):
    """NotSaved by the next looks, with the system's reason; the step before stays; and later ones are saved."""
    checkpoints = make(disk / "run", keep_last=9)
    checkpoints.save(10, large_state(10), about(10), None)
    checkpoints.wait()
    with breaking(disk) as reason, pytest.raises(NotSaved, match=reason) as error:
        checkpoints.save(20, large_state(20), about(20), None)
        until = time.monotonic() + patience
        while time.monotonic() < until:
            checkpoints.check()
            time.sleep(0.01)
        raise AssertionError(f"nobody was told in {patience} s")
    assert error.value.status == 74 and "GB are free" in str(error.value)
    assert checkpoints.steps() == [10] and checkpoints.latest_step() == 10
    checkpoints.save(30, large_state(30), about(30), None)
    checkpoints.close()
    again = Checkpoints(disk / "run", keep_last=9)
    state, _ = again.restore(abstract(large_state(0)))
    again.close()
    assert again.steps() == [10, 30] and int(state.step) == 30
    names = sorted(path.name for path in (disk / "run" / "checkpoints").iterdir())
    assert names == ["10", "30"], "nothing unfinished is left"


@pytest.mark.parametrize("breaking", [full, read_only])
def test_a_disk_that_is_full_or_read_only_is_told(disk, breaking):
    check_a_failed_save_is_told(disk, breaking)


class Careless(Checkpoints):
    def check(self):
        """Looks at nothing."""


def test_a_write_that_fails_in_the_background_is_told(tmp_path):
    check_a_failed_save_is_told(tmp_path, small_files)
    with pytest.raises(AssertionError, match="nobody was told"):
        check_a_failed_save_is_told(tmp_path / "careless", small_files, Careless, patience=2)


def test_the_next_save_tells_of_a_failed_write_too(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with small_files(tmp_path):
        checkpoints.save(10, large_state(10), about(10), None)
        with pytest.raises(NotSaved, match="File too large"):
            checkpoints.save(20, large_state(20), about(20), None)
    checkpoints.close()
    assert checkpoints.steps() == []
