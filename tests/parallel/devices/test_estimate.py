"""Estimated time: small programs whose cost is worked out here, step by step."""

import math

import pytest

from jrlhf.parallel.devices.estimate import estimate
from jrlhf.parallel.devices.topology import parse_topology


def cycles(count: int) -> str:
    return f'backend_config={{"estimated_cycles":"{count}"}}'


TPU = f"""\
HloModule jit_step, is_scheduled=true, num_partitions=4

%product (a: bf16[64,64], b: bf16[64,64]) -> bf16[64,64] {{
  %a = bf16[64,64]{{1,0}} parameter(0)
  %b = bf16[64,64]{{1,0}} parameter(1)
  ROOT %ab = bf16[64,64]{{1,0}} convolution(%a, %b), dim_labels=bf_io->bf
}}

%double (c: bf16[64,64]) -> bf16[64,64] {{
  %c = bf16[64,64]{{1,0}} parameter(0)
  ROOT %cc = bf16[64,64]{{1,0}} add(%c, %c)
}}

%body (s: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {{
  %s = (s32[], bf16[64,64]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = bf16[64,64]{{1,0}} get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = bf16[256,64]{{1,0}} all-gather(%x), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, \
metadata={{op_name="jit(step)/while/body/layer_3/weights"}}
  %y = bf16[64,64]{{1,0}} fusion(%x, %x), kind=kOutput, calls=%product, \
metadata={{op_name="jit(step)/while/body/layer_3/mlp/dot_general"}}, {cycles(3500)}
  ROOT %t = (s32[], bf16[64,64]{{1,0}}) tuple(%next, %y)
}}

%goes (s.1: (s32[], bf16[64,64])) -> pred[] {{
  %s.1 = (s32[], bf16[64,64]{{1,0}}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %n.1 = s32[] constant(LIMIT)
  ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT
}}

%cheap (d: bf16[64,64]) -> bf16[64,64] {{
  %d = bf16[64,64]{{1,0}} parameter(0)
  ROOT %dd = bf16[64,64]{{1,0}} fusion(%d), kind=kLoop, calls=%double, {cycles(175)}
}}

%dear (e: bf16[64,64]) -> bf16[64,64] {{
  %e = bf16[64,64]{{1,0}} parameter(0)
  ROOT %ee = bf16[64,64]{{1,0}} fusion(%e), kind=kLoop, calls=%double, {cycles(7000)}
}}

ENTRY %main (p: bf16[64,64], q: pred[]) -> bf16[64,64] {{
  %p = bf16[64,64]{{1,0}} parameter(0)
  %q = pred[] parameter(1)
  %zero = s32[] constant(0)
  %state = (s32[], bf16[64,64]{{1,0}}) tuple(%zero, %p)
  %while.1 = (s32[], bf16[64,64]{{1,0}}) while(%state), condition=%goes, body=%body
  %z = bf16[64,64]{{1,0}} get-tuple-element(%while.1), index=1
  %either = bf16[64,64]{{1,0}} conditional(%q, %z, %z), branch_computations={{%cheap, %dear}}
  %sum-start = bf16[64,64]{{1,0}} all-reduce-start(%either), replica_groups={{{{0,1}},{{2,3}}}}, to_apply=%double
  %sum-done = bf16[64,64]{{1,0}} all-reduce-done(%sum-start)
  %odd = s32[] fusion(%zero), kind=kLoop, calls=%double, {cycles(2**63)}
  ROOT %turned = bf16[64,64]{{0,1}} copy(%sum-done), metadata={{op_name="jit(step)/transpose"}}, {cycles(875)}
}}
"""

CYCLE = 1 / 1.75e9
LINK = 0.9 * 2 / 6 * 600e9
"""Two of a v5p chip's six links, at 90 %."""
MATRIX = 64 * 64 * 2


def test_a_tpu_program_takes_its_cycles_its_loops_and_its_links() -> None:
    matmul = waits = 0.0
    for _ in range(5):
        waits += 4 * MATRIX * 3 / 4 / LINK
        matmul += 3500 * CYCLE
    branch, turned = max(175, 7000) * CYCLE, 875 * CYCLE
    beside = 2 * MATRIX * 1 / 2 / LINK
    work = matmul + branch + turned
    got = estimate(TPU.replace("LIMIT", "5"), parse_topology("v5p:2x2x1"), trips=99)
    assert math.isclose(got.work, work, rel_tol=1e-12)
    # The sum on its way finds enough work beside it.
    assert math.isclose(got.exposed, waits, rel_tol=1e-12)
    assert math.isclose(got.seconds, work + waits, rel_tol=1e-12)
    assert got.sent == {"all-gather": 5 * 4 * MATRIX * 3 / 4, "all-reduce": MATRIX}
    assert got.kinds == pytest.approx(
        {
            "matmul": matmul,
            "communication": waits,
            "elementwise": branch,
            "copy": turned,
            "overlapped communication": beside,
        }
    )
    assert [(kind, place) for _, kind, place in got.places] == [
        ("matmul", "layer_/mlp/dot_general"),
        ("elementwise", "fusion"),
        ("communication", "all-gather [4] layer_/weights"),
        ("copy", "transpose"),
        ("overlapped communication", "all-reduce [2] all-reduce-start"),
    ]
    assert [seconds for seconds, _, _ in got.places] == sorted(got.kinds.values(), reverse=True)


def test_a_loop_that_data_ends_takes_the_given_trips() -> None:
    text = TPU.replace("ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT", "ROOT %lt = pred[] copy(%more)")
    got = estimate(text, parse_topology("v5p:2x2x1"), trips=11)
    assert math.isclose(got.kinds["matmul"], 11 * 3500 * CYCLE, rel_tol=1e-12)


def test_more_links_and_another_clock_take_less_time() -> None:
    text = TPU.replace("LIMIT", "5")
    small, large = (estimate(text, parse_topology(name), trips=1) for name in ("v5p:2x2x1", "v5p:4x4x4"))
    assert math.isclose(small.exposed, 3 * large.exposed, rel_tol=1e-12)
    assert small.work == large.work
    v5e = estimate(text, parse_topology("v5e:4x4"), trips=1)
    assert math.isclose(v5e.kinds["matmul"], 5 * 3500 / 1.5e9, rel_tol=1e-12)
    assert math.isclose(v5e.exposed, 5 * MATRIX * 3 / (0.9 * 100e9), rel_tol=1e-12)


def test_communication_beside_too_little_work_is_exposed_in_part() -> None:
    text = (
        TPU.replace("LIMIT", "1").replace("all-gather(", "all-gather-start(").replace("bf16[256,64]", "bf16[999936,64]")
    )
    got = estimate(text, parse_topology("v5p:2x2x1"), trips=1)
    beside = (999936 * 64 * 2 * 3 / 4 + MATRIX) / LINK
    assert math.isclose(got.exposed, beside - got.work, rel_tol=1e-12)
    assert math.isclose(got.seconds, beside, rel_tol=1e-12)


def test_a_loop_takes_at_least_as_long_as_its_bytes() -> None:
    """A product of 2 us on matrices of 32 MB: an iteration waits for memory, unless they lie in VMEM."""
    text = TPU.replace("LIMIT", "5").replace("64,64", "4096,4096")
    text = text.replace("%w = bf16[256,64]{1,0} all-gather(%x)", "%w = bf16[0]{0} all-gather(%i)")
    got = estimate(text, parse_topology("v5p:2x2x1"), trips=1)
    size = 4096 * 4096 * 2
    # The product reads x twice and writes y. The counter and the empty gather read and write 4 bytes each time.
    moved = 3 * size + (4 + 4 + 4) + 4 + (4 + 4 + 1)
    wait = moved / (0.85 * 2765e9) - 3500 * CYCLE
    assert math.isclose(got.kinds["memory wait"], 5 * wait, rel_tol=1e-9)
    assert ("memory wait", "loop while") in [(kind, place) for _, kind, place in got.places]
    vmem = text.replace("bf16[4096,4096]{1,0}", "bf16[4096,4096]{1,0:T(8,128)S(1)}")
    assert "memory wait" not in estimate(vmem, parse_topology("v5p:2x2x1"), trips=1).kinds


GPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%gemm (a: bf16[4096,8192], b: bf16[8192,1024]) -> bf16[4096,1024] {
  %a = bf16[4096,8192]{1,0} parameter(0)
  %b = bf16[8192,1024]{1,0} parameter(1)
  ROOT %ab = bf16[4096,1024]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%row (s: f32[256,8192], n: s32[]) -> f32[8192] {
  %s = f32[256,8192]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %z = s32[] constant(0)
  %r = f32[1,8192]{1,0} dynamic-slice(%s, %n, %z), dynamic_slice_sizes={1,8192}
  ROOT %v = f32[8192]{0} bitcast(%r)
}

%body (t: (s32[], f32[8192])) -> (s32[], f32[8192]) {
  %t = (s32[], f32[8192]{0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %u = f32[8192]{0} get-tuple-element(%t), index=1
  %turned = f32[8192]{0} transpose(%u), dimensions={0}, metadata={op_name="jit(f)/turn"}
  ROOT %o = (s32[], f32[8192]{0}) tuple(%i, %turned)
}

%goes (t.1: (s32[], f32[8192])) -> pred[] {
  %t.1 = (s32[], f32[8192]{0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (p: bf16[4096,8192], q: bf16[8192,1024], m: f32[256,8192], k: s32[], f: f32[64,32]) -> f32[] {
  %p = bf16[4096,8192]{1,0} parameter(0)
  %q = bf16[8192,1024]{1,0} parameter(1)
  %m = f32[256,8192]{1,0} parameter(2)
  %k = s32[] parameter(3)
  %f = f32[64,32]{1,0} parameter(4)
  %product = bf16[4096,1024]{1,0} fusion(%p, %q), kind=kCustom, calls=%gemm
  %library = (f32[64,64]{1,0}, s8[99]{0}) custom-call(%f, %f), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %one = f32[8192]{0} fusion(%m, %k), kind=kLoop, calls=%row
  %state = (s32[], f32[8192]{0}) tuple(%k, %one)
  %while.2 = (s32[], f32[8192]{0}) while(%state), condition=%goes, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
  %near = bf16[4096,1024]{1,0} all-reduce(%product), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%body
  ROOT %result = f32[] constant(0)
}
"""


def test_a_gpu_program_takes_the_longer_of_flops_and_bytes() -> None:
    memory, peak = 0.8 * 3350e9, 0.75 * 989e12
    product = max(2 * 4096 * 8192 * 1024 / peak, 2 * (4096 * 8192 + 8192 * 1024 + 4096 * 1024) / memory)
    library = max(2 * 64 * 64 * 32 / (peak / 2), (2 * 4 * 64 * 32 + 4 * 64 * 64 + 99) / memory)
    turned = 0.0
    for _ in range(6):
        turned += 2 * 4 * 8192 / memory
    one = (4 * 8192 + 4 + 4 * 8192) / memory
    waits = 2 * (2 * 4096 * 1024) * 7 / 8 / (0.8 * 450e9)
    got = estimate(GPU, parse_topology("h100x8"), trips=99)
    assert got.kinds == pytest.approx(
        {"matmul": product + library, "copy": turned, "slice, update": one, "communication": waits}
    )
    assert got.seconds == pytest.approx(product + library + turned + one + waits)
    # Over more nodes than one, a sum goes over the network.
    far = GPU.replace("{{0,1,2,3,4,5,6,7}}", "{{0,8}}")
    assert estimate(far, parse_topology("h100x16"), trips=99).exposed == pytest.approx(2 * 4096 * 1024 / (0.8 * 50e9))


def test_without_a_data_sheet_there_is_no_estimate() -> None:
    with pytest.raises(ValueError, match="cpu:8: no data sheet"):
        estimate(TPU, parse_topology("cpu:8"), trips=1)
