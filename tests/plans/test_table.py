"""The README's plans: every row is a config that there is, and what was written keeps its promises."""

import json

import pytest

from jaxlm.config_files import read_config
from jaxlm.planning.compiling import plan_program
from jaxlm.planning.topologies import parse_topology
from tools import plan_table

ROWS = [*plan_table.DENSE, *plan_table.BARS, *plan_table.CALIBRATIONS]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_a_config_on_machines_that_there_are(row):
    config = read_config(str(plan_table.ROOT / row.config), row.overrides)
    assert config.batch_size % config.accumulation_steps == 0
    assert parse_topology(row.topology).num_chips >= 1


@pytest.mark.plans
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_could_be_trained_on_its_machines(row):
    """A plan is of a run: what `jaxlm.pretrain` would refuse there, evaluation included, is refused."""
    config = read_config(str(plan_table.ROOT / row.config), row.overrides)
    assert plan_program(config, parse_topology(row.topology)).state_shape


@pytest.mark.plans
def test_a_plan_of_what_could_not_be_evaluated_there_is_refused():
    config = read_config(str(plan_table.ROOT / "configs/gpt.py:gpt2"), {"eval.batch_size": 3})
    with pytest.raises(ValueError, match="eval.batch_size is 3, not divisible by the 8 devices"):
        plan_program(config, parse_topology("v5e-8"))


def fake_plan(**changes):
    plan = dict(
        mesh={"fsdp": 8}, batch_size=8, seq_len=2048, accumulation_steps=2, remat="full", fits=True,
        hbm_bytes=2.0**33, usable_bytes=2.0**34, tokens_per_second_per_chip=1000.0,
        tokens_per_second_per_chip_range=[900.0, 1100.0], estimated_mfu=0.5,
        estimated_mfu_range=[0.4, 0.6], roofline={"bound": "compute"}, model_flops=1e15,
    )  # fmt: skip
    return plan | changes


def test_the_tables_go_between_the_readmes_markers_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_table, "FOLDER", tmp_path)
    for row in ROWS:
        (tmp_path / f"{row.name}.json").write_text(json.dumps(fake_plan()))
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- plans -->\nold\n<!-- /plans -->\nbetween\n<!-- calibration --><!-- /calibration -->\nafter\n"
    )
    plan_table.write_readme(readme)
    text = readme.read_text()
    assert "| GPT-2 124M | v5e-1 | fsdp 8 | 8 x 2,048 in 2 parts | full | 8.0 of 16.0 GiB |" in text
    assert "old" not in text and all(word in text for word in ("before", "between", "after"))
    plan_table.write_readme(readme)
    assert readme.read_text() == text


def test_a_readme_without_markers_is_an_error(tmp_path):
    (tmp_path / "README.md").write_text("no markers\n")
    with pytest.raises(ValueError, match="put the markers"):
        plan_table.write_readme(tmp_path / "README.md")


def test_a_plan_that_does_not_fit_says_so_in_its_row():
    assert "does not fit" in plan_table.format_row(ROWS[0], fake_plan(fits=False))


def test_a_published_number_of_flops_becomes_tokens():
    row = next(row for row in ROWS if row.name == "published_32b_v5p-128")
    assert plan_table.published_speed(row, fake_plan()) == pytest.approx(
        328e12 / (1e15 / (8 * 2048))
    )


# --- what the written plans say ---------------------------------------------------------------------------------------


def recorded(name: str):
    return json.loads((plan_table.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def test_qwen3_takes_at_most_35_percent_of_the_temporaries_of_maxtexts_step():
    """5.9e9 bytes: MaxText's own step of this model, with as many tokens a device and full rematerialisation."""
    plan = recorded("qwen3_0_6b_v5e-16")
    assert plan["tokens_per_chip"] == 4 * 2048 and plan["remat"] == "full"
    assert plan["temp_bytes"] <= 0.35 * 5.9e9
