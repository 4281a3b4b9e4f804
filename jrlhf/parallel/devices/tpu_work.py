"""Time of a TPU's instructions by its compiler's own estimate of cycles."""

from jrlhf.parallel.devices.hlo import Computation, Instruction, Module, total_bytes
from jrlhf.parallel.devices.kernels import attention_flops
from jrlhf.parallel.devices.kinds import kind_of_work
from jrlhf.parallel.devices.peaks import Chip

KERNEL_SHARE, KERNEL_MEMORY_SHARE = 0.5, 0.8
"""Share of the peak FLOP/s and of the memory bandwidth that a Pallas kernel is assumed to reach."""

UNKNOWN_CYCLES = 10**15
"""Cycles from which on a compiler's figure stands for one that it does not know."""


def tpu_work(module: Module, computation: Computation, instruction: Instruction, chip: Chip) -> tuple[str, float]:
    """Return the kind of an instruction's work, and its seconds."""
    if instruction.quoted("custom_call_target") == "tpu_custom_call":
        return "kernel", _kernel_seconds(computation, instruction, chip)
    cycles = int(instruction.quoted("estimated_cycles") or 0)
    return kind_of_work(module, instruction), cycles / (chip.clock * 1e9) if cycles < UNKNOWN_CYCLES else 0.0


def _kernel_seconds(computation: Computation, kernel: Instruction, chip: Chip) -> float:
    flops = attention_flops(computation, kernel)
    size = total_bytes(kernel.arrays) + sum(total_bytes(computation[name].arrays) for name in kernel.operands)
    compute = flops / (KERNEL_SHARE * chip.tflops * 1e12)
    return max(compute, size / (KERNEL_MEMORY_SHARE * chip.bandwidth * 1e9))
