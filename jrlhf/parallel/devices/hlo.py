"""Parser of the text of an optimised HLO module, as XLA prints it for a TPU, a GPU or a CPU."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
PARENTHESIS = re.compile(r"[()]")
OPERAND = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+\w*|c\d+)\[([\d,]*)\](\{[^}]*\})?")
CALLED = re.compile(r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
DEVICES = re.compile(r"(?:num_partitions|replica_count)=(\d+)")


class Array(NamedTuple):
    """An array in the type of an instruction."""

    dtype: str
    dims: tuple[int, ...]
    layout: str

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Number of bytes; elements of less than a byte count as one."""
        bits = 8 if self.dtype == "pred" else int(re.findall(r"\d+", self.dtype)[0])
        return self.elements * max(bits, 8) // 8

    @property
    def in_main_memory(self) -> bool:
        """Whether the compiler left the array in a device's main memory, and not in a TPU's VMEM or SMEM."""
        return "S(" not in self.layout


class Instruction(NamedTuple):
    """One instruction: ``%name = shape opcode(arguments), attributes``."""

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results are the arguments."""
        return OPERAND.findall(self.arguments)

    @property
    def arrays(self) -> list[Array]:
        """Arrays of the result: one, or those of a tuple."""
        return arrays_of(self.shape)

    @property
    def called(self) -> dict[str, str]:
        """Computations that the instruction calls, by their role such as ``body``, apart from listed branches."""
        return dict(CALLED.findall(self.attributes))

    @property
    def branches(self) -> list[str]:
        """Computations of a conditional, of which one runs."""
        listed = BRANCHES.search(self.attributes)
        if listed:
            return [name.strip().removeprefix("%") for name in listed[1].split(",")]
        return [name for role, name in self.called.items() if role.endswith("_computation")]

    def quoted(self, key: str) -> str:
        """Return the text that ``key="..."`` or ``"key":"..."`` has in the attributes; empty if there is none."""
        match = re.search(rf'\b{key}"?[=:]"([^"]*)"', self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]
"""Instructions by name, in the order of the text."""


class Module(NamedTuple):
    """The computations of a program."""

    entry: str
    computations: dict[str, Computation]
    devices: int

    def contains(self, name: str, opcodes: frozenset[str]) -> bool:
        """Tell whether a computation, or one that it calls, has an instruction with one of the opcodes."""
        return any(
            i.opcode in opcodes or any(self.contains(called, opcodes) for called in i.called.values())
            for i in self.computations.get(name, {}).values()
        )


def parse_hlo(text: str) -> Module:
    """Parse the text of a module; what is neither a computation nor an instruction is skipped."""
    entry, computations, current = "", {}, {}
    for line in _logical_lines(text):
        if head := COMPUTATION.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    counts = DEVICES.findall(text[: text.find("\n")])
    return Module(entry, computations, math.prod(int(count) for count in counts))


def _logical_lines(text: str) -> Iterator[str]:
    """Yield lines; an instruction whose braces or quotes are open takes in the lines that follow."""
    held = ""
    for line in text.split("\n"):
        held = f"{held} {line}" if held else line
        if held.startswith(" ") and _is_open(held):
            continue
        yield held
        held = ""


def _is_open(text: str) -> bool:
    # Balanced braces that a string unbalances are rare, and strings are long: most lines need one count alone.
    if text.count("{") == text.count("}") and text.count('"') % 2 == 0:
        return False
    bare = STRING.sub("", text)
    return '"' in bare or bare.count("{") > bare.count("}")


def _instruction(line: str) -> Instruction | None:
    head = INSTRUCTION.match(line)
    if not head:
        return None
    start = head.end()
    end = _closing(line, start) if line[start] == "(" else line.find(" ", start)
    opening = line.find("(", end)
    if opening < 0:
        return None
    closing = _closing(line, opening)
    return Instruction(
        name=head[2],
        shape=line[start:end],
        opcode=line[end:opening].strip(),
        arguments=line[opening + 1 : closing - 1],
        attributes=line[closing:],
        root=bool(head[1]),
    )


def _closing(text: str, start: int) -> int:
    """Return the place after the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in PARENTHESIS.finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def arrays_of(shape: str) -> list[Array]:
    """Return the arrays in an HLO type; tokens and opaque values are none."""
    return [
        Array(dtype, tuple(int(dim) for dim in dims.split(",") if dim), layout)
        for dtype, dims, layout in ARRAY.findall(shape)
    ]


def total_bytes(arrays: list[Array]) -> int:
    """Return the bytes of all arrays."""
    return sum(array.bytes for array in arrays)
