"""FLOPs of fused attention kernels, about which a compiler says nothing."""

import re

from jrlhf.parallel.devices.hlo import Array, Computation, Instruction

USUAL_BLOCK = 512
"""Length of a block of a TPU's attention kernel that does not tell it."""


def attention_flops(computation: Computation, kernel: Instruction) -> float:
    """Return the FLOPs of the products of a causal attention kernel; 0 for a kernel of another kind.

    Forward it multiplies twice, queries by keys and scores by values. Backward it multiplies five times, or four times
    for keys and values and three for queries in two kernels, since each makes the scores again. A TPU's kernel
    computes whole blocks, of which those above the diagonal are left out.
    """
    operands = [computation[name] for name in kernel.operands if name in computation]
    arrays = [array for operand in operands for array in operand.arrays if array.dtype in ("bf16", "f32")]
    queries = next((array.dims for array in arrays if len(array.dims) == 4), None)
    if queries is None:
        queries = next(((1, *array.dims) for array in arrays if len(array.dims) == 3), None)
    if queries is None:
        return 0.0
    if "fmha" in kernel.quoted("custom_call_target"):
        rows, first, second, width = queries
        length, heads = max(first, second), min(first, second)
        products = 5 if "Backward" in kernel.quoted("custom_call_target") else 2
        return products * 2.0 * rows * heads * length**2 * width / 2
    if "splash" not in kernel.name and "flash" not in kernel.name:
        return 0.0
    rows, heads, length, width = queries
    return _products(kernel, kernel.arrays) * 2.0 * rows * heads * length**2 * width * _computed(kernel, length)


def _products(kernel: Instruction, results: list[Array]) -> int:
    if "dkv" in kernel.name:
        # The fused kernel returns the gradient of the queries too.
        return 5 if len(results) > 2 else 4
    return 3 if "dq" in kernel.name else 5 if "bwd" in kernel.name else 2


def _computed(kernel: Instruction, length: int) -> float:
    """Return the share of the square of scores that a kernel computes block by block under a causal mask."""
    rows, columns = (_block(kernel, name) for name in ("block_q", "block_kv"))
    ends = [min(length, row + rows) for row in range(0, length, rows)]
    return sum(min(length, -(-end // columns) * columns) for end in ends) / (len(ends) * length)


def _block(kernel: Instruction, name: str) -> int:
    phase = next((f"_{phase}" for phase in ("dkv", "dq") if phase in kernel.name), "")
    size = re.search(rf'\b{name}{phase}\\?": (\d+)', kernel.attributes)
    return int(size[1]) if size else USUAL_BLOCK
