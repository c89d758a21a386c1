"""A run that nobody hurts, made once: the others have to end as it does."""

import pytest

from tests import tiny
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
