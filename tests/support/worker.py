"""What a test has several processes do: ``python worker.py TASK FOLDER [ARGUMENTS]``.

What one task alone needs is imported there: most start faster than the rest of the package is read.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from jrlhf.cli.entry import ended
from jrlhf.config import DistributedConfig
from jrlhf.parallel import fetch, is_first, make_mesh, process_group, shard_batch
from jrlhf.parallel.hosts import AnyProcess, first_goes_ahead, from_first, same_everywhere
from jrlhf.system.errors import USAGE_ERRORS, UsageError
from jrlhf.system.interrupts import end_at_once
from jrlhf.system.terminal import complain

STEPS, ROWS, BATCH = 7, 40, 8


def read_rows(folder: Path, tensor: str) -> None:
    """Which rows of every step's batch are on this process's devices."""
    from jrlhf.data import Order
    from jrlhf.data.order import Part

    mesh = make_mesh(data=-1, fsdp=1, tensor=int(tensor))
    order = Order(5, batch_size=BATCH, lengths=np.arange(ROWS), parts=[Part(ROWS, 1.0)])
    here = []
    for step in range(STEPS):
        batch = shard_batch(order[step].astype(np.int32), mesh)
        np.testing.assert_array_equal(fetch(batch), order[step])
        shards = {shard.index[0].start or 0: np.asarray(shard.data).tolist() for shard in batch.addressable_shards}
        here.append([row for start in sorted(shards) for row in shards[start]])
    (folder / f"{jax.process_index()}.json").write_text(json.dumps(here))


def agree(folder: Path) -> None:
    """Every way of doing something together, each with its result in a file."""
    found = {"first": is_first(), "told": from_first("say where it is", lambda: {"process": jax.process_index()})}
    with first_goes_ahead("write a file"):
        if is_first():
            time.sleep(0.5)
            (folder / "written").write_text("whole")
        found["read"] = (folder / "written").read_text()
    same_everywhere("the weather", lambda: "fine")
    asked = AnyProcess()
    # One says yes at its third call: all know at the fourth.
    found["asked"] = [asked(jax.process_index() == 1 and call == 2) for call in range(6)]
    (folder / f"agreed-{jax.process_index()}.json").write_text(json.dumps(found))

    def refuse() -> None:
        raise UsageError("the first one refuses")

    from_first("look", refuse)


def train(folder: Path, *fault: str) -> None:
    """Steps without end; process 1 may break down or hang in one of them."""
    mesh, asked = make_mesh(data=-1, fsdp=1, tensor=1), AnyProcess()
    step = jax.jit(lambda x: x.sum())
    for number in range(100_000):
        step(shard_batch(np.ones((jax.device_count(), 2), np.float32), mesh)).block_until_ready()
        asked(False)
        if number == 20:
            if fault == ("differ",) and is_first():
                same_everywhere("rows", lambda: "of a file")
            (folder / f"up-{jax.process_index()}").touch()
            if jax.process_index() == 1:
                match fault:
                    case ["raise"]:
                        raise KeyError("broken")
                    case ["differ"]:
                        same_everywhere("rows", lambda: "of another file")
                    case ["hang"]:
                        time.sleep(1000)
        time.sleep(0.02)


def reload(folder: Path) -> None:
    """Load what one process saved, say what it is, and save it again."""
    from tests.support.saving import leaves, open_checkpoints, restored

    state, _ = restored(folder / "saved", jax.devices())
    found = leaves(state)
    if is_first():
        np.savez(folder / "loaded.npz", *found)
    with open_checkpoints(folder / "again") as checkpoints:
        checkpoints.save(1, state, metadata={}, metrics=None)


def main(task: str, folder: str, *arguments: str) -> int:
    timeouts = DistributedConfig(start_timeout=60, heartbeat_timeout=5, stall_timeout=100)
    if arguments == ("hang",):
        timeouts = replace(timeouts, stall_timeout=10)
    if arguments == ("answer signals",):
        end_at_once()
    try:
        with process_group(**vars(timeouts)):
            {"rows": read_rows, "agree": agree, "train": train, "reload": reload}[task](Path(folder), *arguments)
    except BaseException as error:
        complain(f"{type(error).__name__}: {error}")
        return 2 if isinstance(error, USAGE_ERRORS) else 1
    return 0


if __name__ == "__main__":
    sys.exit(ended(main(*sys.argv[1:])))
