"""FLOPs of attention kernels, beside a count of the blocks that a causal mask leaves."""

import pytest

from jrlhf.parallel.devices.hlo import parse_hlo
from jrlhf.parallel.devices.kernels import attention_flops


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
