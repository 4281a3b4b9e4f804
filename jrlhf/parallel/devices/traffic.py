"""Bytes that an instruction of an optimised program moves to and from a device's main memory."""

from jrlhf.parallel.devices.hlo import Array, Computation, Instruction, Module, total_bytes

FREE = frozenset(
    {
        "after-all",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "get-tuple-element",
        "iota",
        "opt-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
    }
)
"""Opcodes that move nothing themselves."""

COPY_STARTS = frozenset({"copy-start", "slice-start"})
SLICES = frozenset({"dynamic-slice", "slice", "gather"})


def memory_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Return the bytes that an instruction reads from and writes to main memory.

    Arrays that the compiler put into a TPU's VMEM move nothing. Of an array that is only sliced the slices count, and
    of one that is updated in place the update.
    """
    if instruction.opcode in FREE or instruction.opcode.endswith("-done"):
        return 0
    if instruction.opcode in COPY_STARTS:
        # (result, operand, context), or the other way round; a slice moves the smaller of the two.
        ends = instruction.arrays[:2]
        return min((array.bytes for array in ends), default=0) * sum(array.in_main_memory for array in ends)
    operands = [computation[name] for name in instruction.operands if name in computation]
    if instruction.opcode == "dynamic-update-slice":
        return 2 * total_bytes(operands[1].arrays)
    written = _in_main_memory(_results(instruction, operands))
    if instruction.opcode == "dynamic-slice":
        return written + sum(min(_in_main_memory(i.arrays), total_bytes(instruction.arrays)) for i in operands)
    inside = module.computations.get(instruction.called.get("calls", ""), {})
    return _written(inside, written) + _read(inside, operands)


def _results(instruction: Instruction, operands: list[Instruction]) -> list[Array]:
    """Return the arrays that an instruction writes; the result of an asynchronous start begins with what it reads."""
    read = sum(len(operand.arrays) for operand in operands)
    started = instruction.opcode.endswith("-start") and len(instruction.arrays) > read
    return instruction.arrays[read:] if started else instruction.arrays


def _in_main_memory(arrays: list[Array]) -> int:
    return total_bytes([array for array in arrays if array.in_main_memory])


def _written(inside: Computation, written: int) -> int:
    """Return the bytes of the results, in which an update in place counts instead of its array."""
    for update in inside.values():
        if update.opcode == "dynamic-update-slice" and (whole := total_bytes(update.arrays)) <= written:
            part = inside.get(update.operands[1])
            written += total_bytes(part.arrays) - whole if part is not None else 0
    return max(written, 0)


def _read(inside: Computation, operands: list[Instruction]) -> int:
    """Return the bytes of the operands, in which slices count instead of an array that is only sliced or updated."""
    names = {int(i.arguments): name for name, i in inside.items() if i.opcode == "parameter"}
    total = 0
    for number, operand in enumerate(operands):
        size, name = _in_main_memory(operand.arrays), names.get(number)
        users = [i for i in inside.values() if name in i.operands]
        if users and all(_takes_part(user, name) for user in users):
            size = min(size, sum(total_bytes(user.arrays) for user in users if user.opcode in SLICES))
        total += size
    return total


def _takes_part(user: Instruction, name: str | None) -> bool:
    updated = user.opcode == "dynamic-update-slice" and user.operands[0] == name
    return user.opcode in SLICES or updated
