"""What a child of aot.py says of the program that it has compiled. Imports neither jrlhf nor a peer."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any


def say(
    compiled: Any,
    hlo: str,
    *,
    devices: int,
    seconds: float,
    package: str,
    flops: float = 0.0,
    trips: int = 1,
    loops: Mapping[str, float] = MappingProxyType({}),
):
    """Write the optimised program to the file ``hlo``, and print its figures as the last line.

    ``flops`` are the model FLOPs of all devices, 0 if nobody has counted them; ``package`` has the compiler. ``trips``
    is the number of trips of a loop whose end depends on data, ``loops`` that of such loops by name.
    """
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    Path(hlo).write_text(compiled.as_text(), encoding="utf-8")
    figures = {
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + results,
        "flops": flops,
        "trips": trips,
        "loops": dict(loops),
        "devices": devices,
        "compile_s": round(seconds, 1),
        "compiler": f"{package} {version(package)}, jax {version('jax')}",
    }
    print(f"\n{json.dumps(figures)}", flush=True)
