"""Kinds of work, by what an instruction contains."""

from jrlhf.parallel.devices.collectives import PRODUCTS
from jrlhf.parallel.devices.hlo import Instruction, Module

KINDS = (
    ("matmul", PRODUCTS),
    ("gather, scatter", frozenset({"gather", "scatter"})),
    ("reduce", frozenset({"reduce", "reduce-window"})),
    ("copy", frozenset({"copy", "transpose"})),
    ("slice, update", frozenset({"dynamic-update-slice", "dynamic-slice"})),
    ("sort", frozenset({"sort"})),
)
"""Kinds of work by opcode; a fusion is of the first kind that it contains."""


def kind_of_work(module: Module, instruction: Instruction) -> str:
    """Return the kind of work of an instruction."""
    called = instruction.called.get("calls", "")
    for kind, opcodes in KINDS:
        if instruction.opcode in opcodes or (called and module.contains(called, opcodes)):
            return kind
    return "elementwise" if called else "other"
