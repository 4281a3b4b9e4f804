"""FLOPs of attention kernels, beside a count of the blocks that a causal mask leaves."""

import pytest

from jrlhf.parallel.devices.hlo import parse_hlo
from jrlhf.parallel.devices.kernels import attention_flops
from jrlhf.parallel.devices.traffic import memory_bytes


def flops(kernel: str) -> float:
    text = f"""\
ENTRY %main (m: s8[1,4,4], q: bf16[8,32,2048,64], k: bf16[8,8,2048,64], f: bf16[8,2048,32,64]) -> f32[] {{
  %m = s8[1,4,4]{{2,1,0}} parameter(0)
  %q = bf16[8,32,2048,64]{{3,2,1,0}} parameter(1)
  %k = bf16[8,8,2048,64]{{3,2,1,0}} parameter(2)
  %f = bf16[8,2048,32,64]{{3,2,1,0}} parameter(3)
  {kernel}
}}
"""
    entry = parse_hlo(text).computations["main"]
    return attention_flops(entry, [*entry.values()][-1])


def blocks(length: int, rows: int, columns: int) -> int:
    """The number of entries in the blocks that hold at least one key at or before one of their queries."""
    return sum(
        rows * columns
        for first in range(0, length, rows)
        for key in range(0, length, columns)
        if key <= first + rows - 1
    )


TWO = "(bf16[8,32,2048,64]{3,2,1,0}, f32[8,32,2048,128]{3,2,1,0})"
THREE = "(f32[4,8,32,2048,64]{4,3,2,1,0}, bf16[8,8,2048,64]{3,2,1,0}, bf16[8,8,2048,64]{3,2,1,0})"
CALL = 'custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"'


def sizes(rows: int, columns: int, phase: str = "") -> str:
    written = f'{{\\"block_q{phase}\\": {rows}, \\"block_kv{phase}\\": {columns}, \\"q_layout\\": 1}}'
    return f'frontend_attributes={{kernel_metadata={{\n"xprof_metadata":"{written}"\n}}}}'


@pytest.mark.parametrize(
    ("kernel", "products", "rows", "columns"),
    [
        (f"%splash_mha_fwd_segmented.1 = {TWO} {CALL}", 2, 512, 512),
        (f"%splash_mha_fwd_segmented.1 = {TWO} {CALL}, {sizes(256, 1024)}", 2, 256, 1024),
        (f"%splash_mha_fwd_segmented.1 = {TWO} {CALL}, {sizes(2048, 512)}", 2, 2048, 512),
        (f"%splash_mha_dq_segmented.1 = bf16[8,32,2048,64] {CALL}, {sizes(1024, 512, '_dq')}", 3, 1024, 512),
        (f"%splash_mha_dkv_segmented.1 = {TWO} {CALL}, {sizes(1024, 256, '_dkv')}", 4, 1024, 256),
        (f"%splash_mha_dkv_segmented.1 = {THREE} {CALL}, {sizes(2048, 2048, '_dkv')}", 5, 2048, 2048),
    ],
)
def test_a_tpu_kernel_computes_the_blocks_that_the_mask_leaves(
    kernel: str, products: int, rows: int, columns: int
) -> None:
    per_entry = products * 2 * 8 * 32 * 64
    assert flops(kernel) == pytest.approx(per_entry * blocks(2048, rows, columns))


def test_cudnn_computes_half_of_the_square() -> None:
    forward = 'ROOT %c.1 = bf16[8,2048,32,64] custom-call(%f, %f), custom_call_target="__cudnn$fmhaSoftmax"'
    half = 8 * 32 * 2048**2 / 2
    assert flops(forward) == 2 * 2 * half * 64
    assert flops(forward.replace("Softmax", "SoftmaxBackward")) == 5 * 2 * half * 64


def test_of_another_kernel_no_product_is_known() -> None:
    assert flops(f"%gather_rows.1 = bf16[8] {CALL}") == 0
    assert flops('%splash_mha_fwd.1 = bf16[8] custom-call(%m), custom_call_target="tpu_custom_call"') == 0


MOVES = """\
%part (w: f32[16,1024], i: s32[]) -> f32[1024] {
  %w = f32[16,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,1024]{1,0} dynamic-slice(%w, %i, %zero), dynamic_slice_sizes={1,1024}
  ROOT %flat = f32[1024]{0} bitcast(%row)
}

%into (w.1: f32[16,1024], i.1: s32[], u: f32[1,1024]) -> f32[16,1024] {
  %w.1 = f32[16,1024]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %u = f32[1,1024]{1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %all = f32[16,1024]{1,0} dynamic-update-slice(%w.1, %u, %i.1, %zero.1)
}

ENTRY %main (p: f32[16,1024], n: s32[], v: f32[1,1024]) -> f32[] {
  %p = f32[16,1024]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %v = f32[1,1024]{1,0} parameter(2)
  %near = f32[1,1024]{1,0:T(8,128)S(1)} copy(%v)
  %whole = f32[16,1024]{1,0} negate(%p)
  %both = f32[16,1024]{1,0} add(%p, %whole)
  %slice = f32[1024]{0} fusion(%p, %n), kind=kLoop, calls=%part
  %bare = f32[1,1024]{1,0} dynamic-slice(%p, %n, %n), dynamic_slice_sizes={1,1024}
  %update = f32[16,1024]{1,0} fusion(%p, %n, %v), kind=kLoop, calls=%into
  %inside = f32[16,1024]{1,0} fusion(%p, %n, %near), kind=kLoop, calls=%into
  %set = f32[16,1024]{1,0} dynamic-update-slice(%p, %v, %n, %n)
  %start = (f32[16,1024]{1,0:S(1)}, f32[16,1024]{1,0}, u32[]{:S(2)}) copy-start(%p)
  %done = f32[16,1024]{1,0:S(1)} copy-done(%start)
  %send = (f32[1,1024]{1,0}, f32[1,1024]{1,0:S(1)}, u32[]{:S(2)}) collective-permute-start(%v), source_target_pairs={}
  %sent = f32[1,1024]{1,0:S(1)} collective-permute-done(%send)
  %sum = f32[1,1024]{1,0} all-reduce-start(%v), replica_groups={}, to_apply=%part
  %go = ((f32[16,1024]{1,0}, s32[], f32[1,1024]{1,0}), f32[16,1024]{1,0}, u32[]) fusion-start(%p, %n, %v), calls=%into
  ROOT %tuple = (f32[16,1024]{1,0}) tuple(%p)
}
"""


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("whole", 2 * 16 * 4096),
        ("both", 3 * 16 * 4096),
        ("near", 4096),
        ("slice", 2 * 4096 + 4),
        ("bare", 2 * 4096 + 2 * 4),
        ("update", 2 * 4096 + 4),
        ("inside", 4096 + 4),
        ("set", 2 * 4096),
        ("start", 16 * 4096),
        ("done", 0),
        ("send", 4096),
        ("sent", 0),
        ("go", 2 * 4096 + 2 * 4),
        ("sum", 2 * 4096),
        ("tuple", 0),
        ("p", 0),
    ],
)
def test_main_memory_sees_what_is_read_and_written(name: str, size: int) -> None:
    module = parse_hlo(MOVES)
    entry = module.computations["main"]
    assert memory_bytes(module, entry, entry[name]) == size
