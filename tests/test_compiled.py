"""Programs that were compiled once are read back at the next start."""

import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxlm import build
from jaxlm.compiled import forget_old_programs, keep_compiled_programs, machine_key
from jaxlm.parallel.mesh import make_mesh
from tests import tiny

MISSES = []
jax.monitoring.register_event_listener(
    lambda event, **_: MISSES.append(event) if event.endswith("/cache_misses") else None
)


@pytest.fixture
def fresh_start(monkeypatch, tmp_path):
    """No cache is set, and this host's folder is empty; what the tests' own cache is comes back."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_enable_xla_caches",
    )
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def check_second_start_compiles_nothing(start):
    """What the first start compiles, the second one finds, in a process that remembers nothing of it."""
    counts = []
    for _ in range(2):
        jax.clear_caches()
        MISSES.clear()
        start()
        counts.append(len(MISSES))
    assert counts[0] > 0
    assert counts[1] == 0, f"{counts[1]} of {counts[0]} programs were compiled again"


def test_the_second_start_of_a_run_compiles_nothing(fresh_start, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    folder = keep_compiled_programs()
    assert folder == tmp_path / "cache" / "jaxlm" / "compiled" / machine_key()
    store = tiny.make_store(tmp_path / "store")
    config = tiny.tiny_config("configs/gpt.py:tiny", store, model__num_layers=1)
    mesh = make_mesh(devices=jax.devices()[:1])

    def start():  # its smaller half: a step takes longer to compile, and is kept in the same way
        build.make_run(config, tmp_path / "run", mesh=mesh).init_state()

    check_second_start_compiles_nothing(start)
    assert any(folder.iterdir())


def test_the_check_fails_without_a_cache(fresh_start):
    with pytest.raises(AssertionError, match="compiled again|assert 0 > 0"):
        check_second_start_compiles_nothing(lambda: jax.jit(lambda x: x + 1)(1.0))


def test_what_jax_is_told_comes_first(fresh_start, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert keep_compiled_programs() == tmp_path / "mine"
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert keep_compiled_programs() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_a_run_on_a_bucket_keeps_its_programs_there(fresh_start):
    folder = keep_compiled_programs("gs://bucket/run")
    assert str(folder) == f"gs://bucket/run/compiled/{machine_key()}"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"


def test_old_programs_are_forgotten_and_new_ones_kept(tmp_path):
    for name, age in (("old", 3), ("new", 1)):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (0, (tmp_path / name).stat().st_mtime - age * 86400))
    (tmp_path / "folder").mkdir()
    forget_old_programs(tmp_path, days=2)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "folder"}
