"""Plans with the real compilers of TPUs and GPUs: what fits, what is moved, what is in memory."""

import json

import pytest

from configs import gpt
from jaxlm.plan import make_plan, write_plan
from jaxlm.planning import hlo
from jaxlm.planning.chips import CHIPS
from jaxlm.planning.compiling import compile_program, plan_program
from jaxlm.planning.report import format_plan
from jaxlm.planning.topologies import parse_topology
from jaxlm.planning.warn import arrays_with

pytestmark = pytest.mark.plans

PROMISED = (
    "fits hbm_bytes temp_bytes bytes_by_kind model_flops estimated_step_seconds estimated_mfu "
    "tokens_per_second_per_chip collectives warnings"
).split()


def small(batch_size: int, **changes):
    """A decoder that compiles fast: one layer of Qwen3's shape in miniature."""
    config = gpt.get_config("tiny")
    config.model.num_layers, config.unroll, config.remat = 1, 1, "full"
    config.optimizer = gpt.get_config("nanogpt").optimizer
    config.batch_size, config.seq_len = batch_size, 1024
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def one_chip(cache):
    return make_plan(small(8), "v5e-1", cache=cache)


@pytest.mark.smoke
def test_a_plan_has_all_that_is_promised_and_can_be_read(one_chip, tmp_path):
    write_plan(one_chip, tmp_path)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert set(PROMISED) <= written.keys() and written["fits"]
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert (tmp_path / "time.png").stat().st_size > 1000
    assert "FITS" in format_plan(one_chip) and "MFU" in format_plan(one_chip)


@pytest.mark.smoke
def test_bytes_by_kind_add_up_to_what_the_compiler_says(one_chip):
    kinds = one_chip["bytes_by_kind"]
    assert sum(kinds.values()) == pytest.approx(one_chip["hbm_bytes"])
    assert kinds["parameters"] == 4 * one_chip["num_params"]


def test_the_bracket_holds_the_estimate_and_the_roofline_is_under_it(one_chip):
    low, high = one_chip["estimated_step_seconds_range"]
    assert low < one_chip["estimated_step_seconds"] < high
    assert one_chip["roofline"]["compute"] < high
    assert 0 < one_chip["estimated_mfu"] < 1


def test_a_compiled_program_is_kept_and_not_made_again(one_chip, cache):
    before = {p: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert before
    again = make_plan(small(8), "v5e-1", cache=cache)
    assert again == one_chip and before == {p: p.stat().st_mtime_ns for p in cache.iterdir()}


def test_splash_leaves_no_scores_and_the_chunked_loss_no_logits_in_memory(cache):
    program = plan_program(small(8), parse_topology("v5e-1"))
    outcome = compile_program(program, CHIPS["v5e"], cache)
    module = hlo.parse(outcome.text)
    assert arrays_with(module, 1024, 1024) == 0
    reference = plan_program(small(8, attention_kernel="xla"), parse_topology("v5e-1"))
    scores = hlo.parse(compile_program(reference, CHIPS["v5e"], cache).text)
    assert arrays_with(scores, 1024, 1024) > 0


def check_edge(make, topology: str, chip: str) -> None:
    """Doubling a batch until it does not fit: up to there bytes rise and stay under what the chip has, then they are over it."""
    usable, batch_size, before = CHIPS[chip].usable_bytes, 512, 0.0
    while (plan := make(small(batch_size), topology))["fits"]:
        assert before < plan["hbm_bytes"] <= usable
        before, batch_size = plan["hbm_bytes"], 2 * batch_size
        assert batch_size < 2**20, "everything fits"
    assert plan["hbm_bytes"] > usable * 0.999  # the compiler's own figure has two decimals
    assert 1.2 * before < plan["hbm_bytes"] < 3 * before or before == 0
    assert plan["warnings"][0].startswith("does not fit")


@pytest.mark.parametrize("topology, chip", [("v5e-1", "v5e"), ("h100x1", "h100")])
def test_fits_agrees_with_the_compiler_on_both_sides_of_the_edge(topology, chip, cache):
    check_edge(lambda config, name: make_plan(config, name, cache=cache), topology, chip)


def test_the_edge_check_fails_for_a_plan_that_says_everything_fits(one_chip):
    with pytest.raises(AssertionError):
        check_edge(lambda config, name: one_chip, "v5e-1", "v5e")


def test_fsdp_divides_the_state_and_its_collectives_are_named(one_chip, cache):
    config = small(8)
    config.mesh.update(data=1, fsdp=8)
    plan = make_plan(config, "v5e-8", cache=cache)
    assert plan["mesh"] == {"fsdp": 8}
    whole, part = (p["bytes_by_kind"]["parameters"] for p in (one_chip, plan))
    assert whole / 8 <= part < 1.1 * whole / 8
    assert {"all-gather"} <= {c["kind"] for c in plan["collectives"] if c["axes"] == "fsdp"}
    assert not any(c["between_slices"] for c in plan["collectives"])


def test_between_slices_only_data_is_moved(cache):
    config = small(8)
    config.mesh.update(data=2, fsdp=4)
    plan = make_plan(config, "2xv5e-4", cache=cache)
    slow = {c["axes"] for c in plan["collectives"] if c["between_slices"]}
    assert slow and all("data" in axes for axes in slow)
    assert plan["roofline"]["dcn"] > 0


@pytest.mark.parametrize("topology", ["v5e-4", "2xv5e-4", "h100x4"])
def test_stages_hold_their_own_layers_and_hand_on_micro_batches(topology, one_chip, cache):
    config = small(16)
    config.model.num_layers = 2
    slices = 2 if topology.startswith("2x") else 1
    config.mesh.update(data=1, stage=2, fsdp=2 * slices)
    plan = make_plan(config, topology, cache=cache)
    assert plan["fits"] and plan["attention_kernel"] == (
        "triton" if topology.startswith("h") else "splash"
    )
    moved = {c["axes"]: c for c in plan["collectives"] if c["kind"] == "collective-permute"}
    assert moved["stage"]["count"] >= 8  # micro-batches, there and back
    assert moved["stage"]["between_slices"] == (slices > 1)
    whole, part = (p["bytes_by_kind"]["parameters"] for p in (one_chip, plan))
    assert part < whole / slices  # of two layers, of which it has one
    # Not a turn of either pass gathers what all stages made.
    rows = 16 * config.seq_len * config.model.emb_dim * 4
    assert not [
        c
        for c in plan["collectives"]
        if "stage" in c["axes"] and c["kind"] == "all-gather" and c["bytes"] / c["count"] > 4 * rows
    ]


@pytest.mark.parametrize("factor, kind", [(1.25, "all-to-all"), (0.0, "reduce-scatter")])
def test_experts_are_sent_their_tokens_or_see_those_of_all(factor, kind, cache):
    """With a capacity tokens are exchanged; dropless each device scatters the sums of what its experts made of all tokens."""
    config = small(8)
    config.model.update(num_experts=8, experts_per_token=2, expert_capacity_factor=factor)
    config.mesh.update(data=1, expert=4)
    plan = make_plan(config, "v5e-4", cache=cache)
    moved = {c["kind"]: c["bytes"] for c in plan["collectives"] if c["axes"] == "expert"}
    tokens = config.batch_size * config.seq_len * config.model.emb_dim * 2 // 4  # of a device
    assert moved[kind] >= tokens


def test_micro_batches_on_gpus_can_be_planned(cache):
    """XLA for GPUs takes one of them out of the loop, and writes the loop's limit within a fusion."""
    config = small(32)
    config.mesh.update(data=1, fsdp=4)
    plans = []
    for parts in (1, 4):
        config.accumulation_steps = parts
        plans.append(make_plan(config, "h100x4", cache=cache))
    one, four = (plan["estimated_step_seconds"] for plan in plans)
    assert 0.7 * one < four < 3 * one


@pytest.mark.parametrize("topology", ["v4-8", "v5p-8", "v6e-4", "h100x8"])
def test_every_kind_of_machine_can_be_planned_for(topology, cache):
    plan = make_plan(small(8), topology, cache=cache)
    assert plan["fits"] and plan["estimated_step_seconds"] > 0
