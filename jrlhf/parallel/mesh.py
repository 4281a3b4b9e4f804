"""The device mesh, and batches laid out over it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jrlhf.parallel.hosts import mark_progress
from jrlhf.system.errors import UsageError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over ``("data", "fsdp", "tensor")``; ``data=-1`` takes all devices that the other axes leave.

    ``devices``: all of the job's by default. UsageError where the axes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise UsageError(f"mesh axes are at least 1 (data may be -1): data={data}, fsdp={fsdp}, tensor={tensor}")
    shape = (len(devices) // (fsdp * tensor) if data == -1 else data, fsdp, tensor)
    if np.prod(shape) != len(devices):
        raise UsageError(f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not use exactly {len(devices)} devices")
    # Given explicitly: the default of jax.make_mesh is not the same in all versions.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ``data`` and ``fsdp`` together; the devices of a ``tensor`` group read the same rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def spread_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """``x`` in a jitted function, its rows laid over the mesh as a batch's are; as it is where they do not divide.

    Where parameters are split over ``fsdp``, this makes XLA fetch a layer's weights to the rows, and not the rows of
    all devices to each part of the weights.
    """
    if mesh is None or mesh.size == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a pytree of NumPy arrays on the mesh by rows (axis 0). Every host passes the whole batch and keeps its part.

    UsageError where the rows do not divide.
    """
    mark_progress()
    sharding = batch_sharding(mesh)
    groups = mesh.shape["data"] * mesh.shape["fsdp"]

    def place(x: np.ndarray) -> jax.Array:
        if x.shape[0] % groups:
            raise UsageError(
                f"{x.shape[0]} rows do not divide over {groups} devices "
                f"(data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']})"
            )
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, batch)
