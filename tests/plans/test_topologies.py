"""Names of machines, what a plan needs to be installed, and what it says without a compiler."""

import importlib.util
import subprocess
import sys

import pytest
from jax.extend import core as jax_core
from jax.sharding import AbstractMesh

from configs import bert, gpt
from jaxlm.config_checks import check_config
from jaxlm.config_files import read_config
from jaxlm.parallel.mesh import MESH_AXES, make_mesh
from jaxlm.plan import make_plan
from jaxlm.planning import search, topologies
from jaxlm.planning.compiling import plan_program, read_too_large, stand_in_tokenizer
from jaxlm.planning.memory import state_bytes
from jaxlm.program import make_program

GIB = 2**30


@pytest.mark.parametrize(
    "name, chips, shape, slices",
    [
        ("v5e-1", 1, (1, 1), 1),
        ("v5e-16", 16, (4, 4), 1),
        ("v4-32", 16, (2, 2, 4), 1),
        ("v5p-128", 64, (4, 4, 4), 1),
        ("v6e-8", 8, (2, 4), 1),
        ("2xv5e-256", 512, (16, 16), 2),
        ("h100x4", 4, (4,), 1),
        ("h100x16", 16, (8,), 2),
    ],
)
def test_a_name_says_how_many_chips_there_are(name, chips, shape, slices):
    topology = topologies.parse_topology(name)
    assert (topology.num_chips, topology.shape, topology.num_slices) == (chips, shape, slices)


@pytest.mark.parametrize("name", ["v5e-3", "v7-8", "h100x12", "0xv5e-8", "h100", "v5p"])
def test_an_unknown_name_lists_those_there_are(name):
    with pytest.raises(ValueError, match="v5e-N with N of 1, 4, 8"):
        topologies.parse_topology(name)


@pytest.mark.parametrize("name, library", [("v5e-8", "libtpu"), ("h100x8", "jax_cuda12_plugin")])
def test_without_its_compiler_a_plan_says_what_to_install(name, library, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == library else found(n, *a)
    )
    with pytest.raises(ModuleNotFoundError, match=rf"no {library}.*pip install 'jaxlm\[plan\]'"):
        topologies.topology_devices(topologies.parse_topology(name))


def test_the_tool_ends_with_one_clear_line_for_an_unknown_topology(tmp_path):
    command = [sys.executable, "tools/plan.py", "--config=configs/gpt.py:tiny", "--topology=v5e-3"]
    done = subprocess.run(
        [*command, f"--output={tmp_path}"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "unknown topology 'v5e-3'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_compilers_words_for_too_little_memory_are_understood():
    new = "RESOURCE_EXHAUSTED: E1000: the total memory required for HLO temporaries (21.75G) exceeds available HBM (15.75G)."
    old = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
    assert read_too_large(new) == (21.75 * GIB, 15.75 * GIB)
    assert read_too_large(old) == (17.5 * GIB, 15.75 * GIB)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        read_too_large("INTERNAL: Mosaic failed")


def cpu_program(config, **mesh):
    return make_program(config, make_mesh(**mesh), stand_in_tokenizer(config.model.vocab_size))


def jaxpr_matmul_flops(jaxpr) -> float:
    """FLOPs of all matmuls of a jaxpr, those of a loop as often as it runs."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            size = 1
            for axis in contract:
                size *= left[axis]
            total += 2.0 * equation.outvars[0].aval.size * size
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if isinstance(inner, jax_core.Jaxpr):
                    total += times * jaxpr_matmul_flops(inner)
    return total


def check_model_flops(program, stated: float) -> None:
    """The stated model FLOPs are within 2% of the matmuls of the step that is really compiled."""
    trace = program.in_mesh(program.jitted_train_step.trace)
    counted = jaxpr_matmul_flops(trace(program.state_shape, program.batch_shape).jaxpr.jaxpr)
    assert counted == pytest.approx(stated, rel=0.02)


@pytest.fixture(scope="module")
def gpt2():
    config = gpt.get_config("gpt2")
    config.batch_size, config.attention_kernel = 8, "xla"
    return cpu_program(config)


def test_the_flops_of_a_plan_are_those_of_the_real_step_of_gpt2(gpt2):
    check_model_flops(gpt2, gpt2.step_flops)


def test_the_flops_of_a_plan_are_those_of_the_real_step_of_bert():
    config = bert.get_config("base")
    config.batch_size, config.attention_kernel = 8, "xla"
    program = cpu_program(config)
    check_model_flops(program, program.step_flops)


def test_the_check_of_flops_fails_for_a_count_without_attention(gpt2):
    c = gpt2.model.config
    scores = 3 * 4 * gpt2.step_tokens * gpt2.config.seq_len * c.emb_dim * c.num_layers
    with pytest.raises(AssertionError):
        check_model_flops(gpt2, gpt2.step_flops - scores)


def test_the_bytes_of_the_state_are_divided_as_the_mesh_says(gpt2):
    whole = state_bytes(gpt2)
    assert whole["parameters"] == 4 * gpt2.num_params
    assert whole["optimizer"] == 8 * gpt2.num_params + 4  # two moments and a count
    parts = state_bytes(cpu_program(gpt2.config, fsdp=8, data=1))
    # Biases and norms stay whole: they are few.
    assert whole["parameters"] / 8 < parts["parameters"] < 1.02 * whole["parameters"] / 8


# --- the search -------------------------------------------------------------------------------------------------------


LLAMA_70B = ("llama3_70b", 70.6e9, {"batch_size": 64, "eval.batch_size": 64})
MIXTRAL = ("mixtral_8x7b", 46.7e9, {"batch_size": 256, "eval.batch_size": 256})


def read(variant, **fields):
    return read_config(f"configs/gpt.py:{variant}", fields)


def check_runs(config, topology):
    """What `jaxlm.pretrain` would ask of the config on that machine."""
    mesh = AbstractMesh(tuple(config.mesh[axis] for axis in MESH_AXES), MESH_AXES)
    assert mesh.size == topology.num_chips
    check_config(config, mesh, stand_in_tokenizer(config.model.vocab_size), 0)


@pytest.mark.parametrize(
    "variant, name, fields",
    [
        ("llama3_1b", "2xv5e-16", {}),
        ("llama3_1b", "v5e-64", {"batch_size": 64, "eval.batch_size": 16}),
        ("llama3_70b", "v5p-64", {"batch_size": 64, "mesh.stage": 4, "pipeline_micro_batches": 16}),
        ("mixtral_8x7b", "v5p-64", {"batch_size": 64, "mesh.expert": 2}),
        ("llama3_70b", "2xv5p-64", {"batch_size": 64, "mesh.stage": 2}),
        ("llama3_8b", "h100x16", {"batch_size": 64}),
    ],
)
def test_every_candidate_can_run_and_in_more_parts_too(variant, name, fields):
    config, topology = read(variant, **fields), topologies.parse_topology(name)
    found = list(search.candidates(config, topology))
    assert found
    slices = 1 if name.startswith("h100") else topology.num_slices
    for c in found:
        assert c.data % slices == 0 or config.mesh.stage % slices == 0
        assert (more := search.more_parts(c, config)) is None or more in found
        check_runs(c.apply(config), topology)


@pytest.mark.parametrize("fields", [{"mesh.expert": -1}, {"mesh.stage": 3}])
def test_an_expert_or_stage_axis_that_leaves_open_what_is_kept_is_refused(fields):
    config = read("mixtral_8x7b", **fields)
    with pytest.raises(
        ValueError, match="set sizes whose product divides the 32 devices of v5p-64"
    ):
        list(search.candidates(config, topologies.parse_topology("v5p-64")))


@pytest.mark.parametrize(
    "model, name, fields, mesh",
    [
        (LLAMA_70B, "h100x64", {}, dict(data=1, fsdp=64)),  # over nodes
        (LLAMA_70B, "v5p-64", {"mesh.stage": 4}, dict(data=1, fsdp=8)),
        (MIXTRAL, "v5p-64", {"mesh.expert": 8}, dict(data=1, fsdp=4)),
        (LLAMA_70B, "2xv5p-64", {"mesh.stage": 2}, dict(data=1, fsdp=32)),  # stages over slices
    ],
)
def test_meshes_that_hold_a_large_model_are_candidates(model, name, fields, mesh):
    variant, num_params, batches = model
    config, topology = read(variant, **batches, **fields), topologies.parse_topology(name)
    found = search.shortlist(config, topology, int(num_params), 1000)
    assert any(mesh.items() <= vars(c).items() for c in found), found


def test_nodes_of_gpus_exchange_over_their_network_and_slices_of_tpus_are_counted_apart():
    nodes, slices = map(topologies.parse_topology, ("h100x16", "2xv5e-16"))
    found = [search.bandwidth(nodes, *group) for group in ((1, 8), (1, 16), (4, 4), (8, 2))]
    h100, v5e = nodes.chip, slices.chip
    assert found == [h100.axis_bandwidth, *(k * h100.dcn_bandwidth for k in (8, 2, 1))]
    assert search.bandwidth(slices, 1, 32) == v5e.axis_bandwidth


@pytest.mark.parametrize(
    "variant, name, fields",
    [
        ("llama3_1b", "v5e-64", {"batch_size": 64, "accumulation_steps": 4}),
        ("llama3_8b", "v5p-256", {"batch_size": 64}),
        ("mixtral_8x7b", "v5p-128", {"mesh.expert": 8, "mesh.data": 1, "mesh.fsdp": -1}),
    ],
)
def test_parameters_are_counted_whatever_the_batch_and_the_mesh(variant, name, fields):
    topology = topologies.parse_topology(name)
    check_runs(search.any_mesh(read(variant, **fields), topology), topology)


def fake_plan(config, name):
    """A plan without a compiler: what is taken in 8 parts or fewer does not fit."""
    return dict(
        topology=name, seq_len=config.seq_len, remat=config.remat, mesh={}, hbm_bytes=1,
        accumulation_steps=config.accumulation_steps, fits=config.accumulation_steps > 8,
        estimated_step_seconds=1.0, estimated_mfu=0.5,
    )  # fmt: skip


def test_what_does_not_fit_is_planned_in_more_parts():
    config, topology = read("llama3_1b"), topologies.parse_topology("v5p-32")
    plans = search.search(config, topology, fake_plan, int(1.24e9), 3)
    assert plans[0]["fits"] and not plans[-1]["fits"]
    parts = {plan["accumulation_steps"] for plan in plans}
    assert {8, 16} <= parts and len(plans) > 3, plans
    assert "does not fit" in search.format_ranking(plans)


def test_the_plans_of_a_search_are_of_its_config_and_machine():
    for name, seq_len in (("v5p-128", 8192), ("v5p-128", 4096), ("v4-128", 4096)):
        config = read("llama3_8b", batch_size=128, seq_len=seq_len)
        topology = topologies.parse_topology(name)
        plans = search.search(config, topology, fake_plan, int(8e9), 2)
        assert {(plan["topology"], plan["seq_len"]) for plan in plans} == {(name, seq_len)}


def test_a_model_that_no_mesh_can_hold_leaves_nothing_to_try():
    config = gpt.get_config("llama3_70b")
    topology = topologies.parse_topology("v5e-4")
    assert search.shortlist(config, topology, int(70e9), 5) == []


def test_a_config_of_fine_tuning_is_refused_before_any_device_is_asked_for():
    config = read_config("configs/finetune/classification.py:train=a.csv", {})
    with pytest.raises(ValueError, match="plans are of pretraining.*jaxlm.finetune"):
        make_plan(config, "v5e-1")
    with pytest.raises(ValueError, match="plans are of pretraining"):
        topology = topologies.parse_topology("v5e-1")
        plan_program(search.any_mesh(config, topology), topology)
