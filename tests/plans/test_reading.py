"""The compiler's text, read: loops, sources, groups, costs. No compiler for any device is needed."""

import types

import numpy as np
import pytest

from jaxlm.parallel.mesh import make_mesh
from jaxlm.planning import cost, hlo
from jaxlm.planning.chips import CHIPS
from jaxlm.planning.compiling import dumped_text
from jaxlm.planning.kernels import Sparsity, live_share
from jaxlm.planning.network import Network

# As TPU compilers write: a loop of 12 over a fusion and an asynchronous gather beside it, a gather that nothing runs beside,
# and a kernel whose metadata spans lines.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/home/me/jaxlm/models/layers.py"
2 "/env/site-packages/optax/_src/update.py"

FunctionNames
1 "project"
2 "apply"

FileLocations
1 {file_name_id=1 function_name_id=1 line=106 end_line=106 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %m = bf16[8,128]{1,0} multiply(%p, %p)
}

%body (t: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %t = (s32[], bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%t), index=1
  %start = (bf16[8,128]{1,0}, bf16[64,128]{1,0}) all-gather-start(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %work = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="up" stack_frame_id=1}, backend_config={"window_config":{"estimated_cycles":"1500"}}
  %done = bf16[64,128]{1,0} all-gather-done(%start)
  ROOT %r = (s32[], bf16[8,128]{1,0}) tuple(%t, %work)
}

%cond (t: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %t = (s32[], bf16[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %loop = (s32[], bf16[8,128]{1,0}) while(%a), condition=%cond, body=%body, metadata={op_name="layers" stack_frame_id=2}
  %splash_mha_fwd = (f32[4,2048,128]{2,1,0}, bf16[2,4,2048,128]{3,2,1,0}) custom-call(%mask, %mask, %q, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block_q":"512"
}}, metadata={op_name="splash_mha_fwd" stack_frame_id=1}
  %mask = s8[1,4,4]{2,1,0} constant(0)
  %q = bf16[2,4,2048,128]{3,2,1,0} broadcast(%a)
  %k = bf16[2,1,2048,128]{3,2,1,0} broadcast(%a)
  %alone = bf16[64,128]{1,0} all-gather(%a), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}, metadata={stack_frame_id=2}
  ROOT %last = bf16[8,128]{1,0} copy(%a), backend_config={"estimated_cycles":"300"}
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


def test_a_loop_counts_its_body_as_often_as_its_condition_says(module):
    times = {step.instruction.name: step.times for step in module.walk()}
    assert (times["work"], times["last"]) == (12, 1)
    assert "m" not in times  # inside a fusion nothing runs by itself


def test_a_limit_within_a_fusion_is_found(module):
    """As XLA for GPUs writes it."""
    lines = TEXT.splitlines()
    limit = next(line for line in lines if "%limit = " in line)
    compare = next(line for line in lines if "ROOT %lt = " in line)
    fused = [
        "%compared (p.1: s32[]) -> pred[] {",
        "  %p.1 = s32[] parameter(0)",
        limit,
        compare.replace("%i", "%p.1"),
        "}",
        "",
    ]
    call = "  ROOT %found = pred[] fusion(%i), kind=kLoop, calls=%compared"
    lines = [call if line == compare else line for line in lines if line != limit]
    place = next(k for k, line in enumerate(lines) if line.startswith("%cond "))
    changed = hlo.parse("\n".join([*lines[:place], *fused, *lines[place:]]))
    assert {s.instruction.name: s.times for s in changed.walk()}["work"] == 12


def test_the_compilers_own_trip_count_wins(module):
    (loop,) = [i for i in module.computations["main"] if i.opcode == "while"]
    known = loop.attributes + ', backend_config={"known_trip_count":{"n":"7"}}'
    stated = hlo.Instruction(loop.name, loop.opcode, loop.shape, loop.operands, known)
    assert module.trip_count(stated) == 7


def test_a_loop_without_a_constant_limit_is_an_error(module):
    wrong = hlo.parse(TEXT.replace("direction=LT", "direction=GT"))
    with pytest.raises(ValueError, match="trip count of loop"):
        list(wrong.walk())


def test_sources_are_the_innermost_line_of_this_package(module):
    lines = {step.instruction.name: step.instruction for step in module.walk()}
    assert module.source(lines["work"]) == "jaxlm/models/layers.py:106"
    assert (
        module.source(lines["alone"]) == "jaxlm/models/layers.py:106"
    )  # optax was called from there


def test_attributes_over_several_lines_are_read(module):
    kernel = module.by_name("main")["splash_mha_fwd"]
    assert kernel.op_name == "splash_mha_fwd" and "last" in module.by_name("main")


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a'}", [[0, 1, 2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_are_read_in_every_spelling(text, groups):
    assert hlo.replica_groups(f"channel_id=1, {text}, dimensions={{0}}", 4).tolist() == groups


# --- costs ------------------------------------------------------------------------------------------------------------


def fake_devices(rows: int, columns: int, slices: int = 1):
    return [
        types.SimpleNamespace(coords=[x, y, 0], slice_index=s, id=0)
        for s in range(slices)
        for y in range(columns)
        for x in range(rows)
    ]


@pytest.fixture(scope="module")
def costs(module):
    mesh = make_mesh(data=2, fsdp=4)
    reader = cost._Reader(
        module,
        mesh,
        CHIPS["v5e"],
        Network(CHIPS["v5e"], fake_devices(2, 4), (2, 4, 1)),
        Sparsity(True),
    )
    return {o.name: o for o in reader.computation("main", 1.0)[0]}


def test_cycles_become_seconds_times_the_loops(costs):
    assert costs["work"].seconds[1] == pytest.approx(12 * 1500 / 1.5e9)
    assert costs["last"].seconds[1] == pytest.approx(300 / 1.5e9)


def test_at_best_an_operation_takes_what_its_bytes_take(costs):
    traffic = 2 * 8 * 128 * 2  # read and written
    best = traffic / 819e9 / cost.MEMORY_EFFICIENCY[0]
    assert costs["work"].num_bytes == 12 * traffic
    assert costs["work"].seconds[0] == pytest.approx(12 * best)


def test_a_collective_is_charged_unless_work_runs_beside_it(costs):
    hidden, alone = costs["start"], costs["alone"]
    whole = 64 * 128 * 2
    assert hidden.num_bytes == pytest.approx(12 * whole)
    assert hidden.seconds[1] == 0 and hidden.hidden[1] > 0
    # Four chips of two lines: half of 90 GB/s along each of them.
    assert alone.seconds[0] == pytest.approx(whole * 3 / 4 / (2 * 45e9))
    assert alone.axes == ("fsdp",) and hidden.axes == ("data", "fsdp")


def test_work_that_is_too_short_hides_only_itself():
    short = hlo.parse(TEXT.replace('"1500"', '"3"'))
    mesh = make_mesh(data=2, fsdp=4)
    network = Network(CHIPS["v5e"], fake_devices(2, 4), (2, 4, 1))
    operations, _ = cost._Reader(short, mesh, CHIPS["v5e"], network, Sparsity(True)).computation(
        "main", 1.0
    )
    start = next(o for o in operations if o.name == "start")
    assert start.hidden[0] == pytest.approx(12 * 3 / 1.5e9)
    assert start.seconds[0] > 0


def test_a_kernel_is_charged_by_the_flops_of_the_blocks_it_computes(costs):
    kernel = costs["splash_mha_fwd"]
    whole = 2 * 2 * (2 * 4 * 2048 * 2048 * 128)
    assert kernel.flops == pytest.approx(whole * live_share((4, 4)))
    assert kernel.seconds[0] >= kernel.flops / 197e12 / cost.KERNEL_EFFICIENCY[0] * 0.999
    assert live_share((4, 4)) == 10 / 16 and live_share((4, 8)) == pytest.approx(20 / 32)


TRANSFER = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {{
  %a = bf16[64,128]{{1,0}} parameter(0)
  %t = token[] after-all()
  %send = (bf16[64,128]{{1,0}}, u32[], token[]) send(%a, %t), channel_id=2, is_host_transfer=true, frontend_attributes={{_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="{kind}"}}
  %recv = (bf16[64,128]{{1,0}}, u32[], token[]) recv(%t), channel_id=1, is_host_transfer=true, frontend_attributes={{_xla_host_transfer_rendezvous="all-reduce.1_0",_xla_megascale_transfer_type="{kind}"}}
  %work = bf16[64,128]{{1,0}} copy(%a), backend_config={{"estimated_cycles":"{cycles}"}}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  ROOT %recv-done = (bf16[64,128]{{1,0}}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
}}
"""


def transfer_cost(kind, cycles=3):
    """(send's operation, seconds that one chip takes to send its array over the slower network)."""
    module = hlo.parse(TRANSFER.format(kind=kind, cycles=cycles))
    mesh, chip = make_mesh(data=2, fsdp=4), CHIPS["v5e"]
    network = Network(chip, fake_devices(2, 2, slices=2), (2, 2, 1))
    operations, _ = cost._Reader(module, mesh, chip, network, Sparsity(True)).computation(
        "main", 1.0
    )
    (found,) = [o for o in operations if o.kind != "compute"]
    return found, 64 * 128 * 2 / chip.dcn_bandwidth


@pytest.mark.parametrize(
    "kind, collective, passes",
    [
        ("ALL_REDUCE", "all-reduce", 1),  # of two slices: half of the array, there and back
        ("ALL_GATHER", "all-gather", 1),
        ("REDUCE_SCATTER", "reduce-scatter", 0.5),
        ("ONE_TO_ONE", "collective-permute", 1),
    ],
)
def test_what_hosts_carry_between_slices_is_charged_to_the_slow_axis(kind, collective, passes):
    found, one = transfer_cost(kind)
    assert found.kind == collective and found.axes == ("data",) and found.is_slow
    assert found.seconds[1] + found.hidden[1] == pytest.approx(passes * one)
    assert 0 < found.hidden[1] <= 3 / 1.5e9 + 1e-12


def test_work_until_it_is_received_hides_what_hosts_carry():
    found, one = transfer_cost("ALL_REDUCE", cycles=10**9)
    assert found.seconds[1] == 0 and found.hidden[1] == pytest.approx(one)


@pytest.mark.parametrize(
    "shape, opcode, whole",
    [
        ("bf16[64,128]{1,0}", "all-gather", 16384),
        ("(bf16[8,128]{1,0}, bf16[64,128]{1,0})", "all-gather-start", 16384),
        ("bf16[8,128]{1,0}", "reduce-scatter", 16384),
        ("(bf16[64,128]{1,0}, bf16[8,128]{1,0})", "reduce-scatter-start", 16384),
        ("bf16[64,128]{1,0}", "all-reduce", 16384),
        ("(f32[4]{0}, f32[8]{0})", "all-reduce-start", 48),  # two results
        ("bf16[8,128]{1,0}", "all-to-all", 16384),
        ("(bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)})", "collective-permute-start", 2048),
    ],
)
def test_the_whole_of_a_collective_is_found_in_every_form(shape, opcode, whole):
    line = hlo.Instruction("c", opcode, shape, "%a", ", channel_id=1")
    assert cost.whole_bytes(line, 8) == whole


MATMULS = """ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[4,2048,1024]{2,1,0} parameter(0)
  %b = bf16[1024,3072]{1,0} parameter(1)
  %one = bf16[4,2048,3072]{2,1,0} convolution(%a, %b), dim_labels=0bf_io0->0bf
  %q = bf16[8,12,1024,64]{3,2,1,0} parameter(2)
  %k = bf16[8,12,512,64]{3,2,1,0} parameter(3)
  %many = f32[8,12,1024,512]{3,2,1,0} convolution(%q, %k), window={size=8x12 stride=7x11 lhs_dilate=8x12}, dim_labels=01bf_01oi->01bf
  ROOT %dots = f32[8,12,1024,512]{3,2,1,0} dot(%q, %k), lhs_batch_dims={0,1}, lhs_contracting_dims={3}, rhs_batch_dims={0,1}, rhs_contracting_dims={3}
}
"""


def check_matmul_flops(flops) -> None:
    module = hlo.parse(MATMULS)
    shapes = {i.name: i.shape for i in module.computations["main"]}
    count = {i.name: flops(i, module, shapes) for i in module.computations["main"]}
    assert count["one"] == pytest.approx(2 * 8192 * 1024 * 3072)
    assert count["many"] == count["dots"] == pytest.approx(2 * 96 * 1024 * 512 * 64)


def test_flops_of_matmuls_follow_from_the_sizes_of_their_operands():
    check_matmul_flops(cost.matmul_flops)


def test_the_check_fails_for_a_count_that_takes_many_matmuls_for_one(monkeypatch):
    monkeypatch.setattr(cost, "num_matmuls", lambda line, left: 1)
    with pytest.raises(AssertionError):
        check_matmul_flops(cost.matmul_flops)


def check_collective_times(network_of) -> None:
    """What bandwidth-bound algorithms give on v5e: rings, lines, two axes, and two slices."""
    v5e, big = CHIPS["v5e"], 1e9
    ring = network_of(v5e, fake_devices(16, 16), (16, 16, 1))
    row, all_of_it = np.arange(16), np.arange(256)
    assert ring.seconds("all-gather", big, row) == pytest.approx(big * 15 / 16 / 9e10)
    assert ring.seconds("all-reduce", big, row) == pytest.approx(2 * big * 15 / 16 / 9e10)
    assert ring.seconds("all-gather", big, all_of_it) == pytest.approx(big * 255 / 256 / 1.8e11)
    line = network_of(v5e, fake_devices(4, 4), (4, 4, 1))
    assert line.seconds("all-gather", big, np.arange(4)) == pytest.approx(big * 3 / 4 / 4.5e10)
    two = network_of(v5e, fake_devices(4, 1, slices=2), (4, 1, 1))
    assert two.crosses_slices(np.array([0, 4])) and not two.crosses_slices(np.arange(4))
    assert two.seconds("all-reduce", big, np.array([0, 4])) == pytest.approx(big / 3.125e9)
    assert two.seconds("all-gather", big, np.array([3])) == 0


def test_collectives_take_what_the_links_allow():
    check_collective_times(Network)


def test_the_check_fails_for_a_network_without_wrap_around():
    class Lines(Network):
        def bandwidth(self, members):
            return super().bandwidth(members) / 2

    with pytest.raises(AssertionError):
        check_collective_times(Lines)


def test_the_compilers_own_text_is_that_of_the_step_after_the_last_pass(tmp_path):
    assert dumped_text(tmp_path) == ""
    for name, text in (
        ("module_0000.jit_step.after_codegen.txt", "HloModule jit_step, the whole of it"),
        ("module_0001.jit_iota.after_codegen.txt", "HloModule jit_iota"),
        ("module_0000.jit_step.after_optimizations.txt", "HloModule jit_step, " + "early " * 9),
    ):
        (tmp_path / name).write_text(text)
    assert dumped_text(tmp_path) == "HloModule jit_step, the whole of it"
