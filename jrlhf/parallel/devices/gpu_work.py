"""Time of a GPU's instructions by a roofline over their shapes."""

import math
import re

from jrlhf.parallel.devices.hlo import Computation, Instruction, Module
from jrlhf.parallel.devices.kernels import attention_flops
from jrlhf.parallel.devices.kinds import kind_of_work
from jrlhf.parallel.devices.peaks import Chip
from jrlhf.parallel.devices.traffic import memory_bytes

MATMUL_SHARE, KERNEL_SHARE, MEMORY_SHARE = 0.75, 0.5, 0.8
"""Share of the peak FLOP/s that products and fused attention reach, and of the memory bandwidth."""

FLOAT32_SHARE = 0.5
"""Peak FLOP/s of float32 products, which run as TF32, as a share of those of bfloat16."""

CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=|ensions":)[{\[]([\d,"]*)[}\]]')


def gpu_work(module: Module, computation: Computation, instruction: Instruction, chip: Chip) -> tuple[str, float]:
    """Return the kind of an instruction's work, and its seconds: the longer of its FLOPs and its bytes."""
    seconds = memory_bytes(module, computation, instruction) / (MEMORY_SHARE * chip.bandwidth * 1e9)
    if "fmha" in (target := instruction.quoted("custom_call_target")) or "triton" in target.lower():
        flops = attention_flops(computation, instruction)
        return "kernel", max(seconds, flops / (KERNEL_SHARE * chip.tflops * 1e12))
    products = product_flops(module, computation, instruction)
    if not products:
        return kind_of_work(module, instruction), seconds
    peak = MATMUL_SHARE * chip.tflops * 1e12
    compute = math.fsum(v / (peak * (FLOAT32_SHARE if dtype == "f32" else 1)) for dtype, v in products.items())
    return "matmul", max(seconds, compute)


def product_flops(module: Module, computation: Computation, instruction: Instruction) -> dict[str, float]:
    """Return the FLOPs of the products in an instruction, by the type of their left side."""
    target = instruction.quoted("custom_call_target")
    if instruction.opcode == "dot" or "cublas" in target or "matmul" in target:
        left = computation[instruction.operands[0]].arrays[0]
        dims = CONTRACTED.search(instruction.attributes)
        contracted = re.findall(r"\d+", dims[1]) if dims else [len(left.dims) - 1]
        return {left.dtype: 2.0 * instruction.arrays[0].elements * math.prod(left.dims[int(d)] for d in contracted)}
    total: dict[str, float] = {}
    inside = module.computations.get(instruction.called.get("calls", ""), {})
    for one in inside.values():
        for dtype, flops in product_flops(module, inside, one).items():
            total[dtype] = total.get(dtype, 0.0) + flops
    return total
