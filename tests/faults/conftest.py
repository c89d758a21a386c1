"""A run that nobody hurts, made once: the others have to end as it does."""

import pytest

from jaxlm.objectives import OBJECTIVES
from tests import tiny
from tests.faults.bad_data import PerSpread, make_stores
from tests.faults.runs import write_config


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    return tiny.make_store(tmp_path_factory.mktemp("text") / "store")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, store):
    """(config.json, the workdir of its run): 60 steps, 15 log lines, 10 evaluations, 12 checkpoints of which 2 are kept."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(
        folder,
        "configs/gpt.py:tiny",
        store,
        num_train_steps=60,
        model__dropout_rate=0.1,
        ema_decay=0.9,
    )
    tiny.run(tiny.pretrain_command(config, folder / "run"))
    return config, folder / "run"


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """Two stores: text, and documents of one letter each."""
    return make_stores(tmp_path_factory.mktemp("stores"))


@pytest.fixture
def per_spread(monkeypatch):
    """An objective that divides by zero for documents of one letter."""
    monkeypatch.setitem(OBJECTIVES, "per_spread", PerSpread)
