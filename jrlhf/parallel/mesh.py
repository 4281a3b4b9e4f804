"""The device mesh and the placement of batches on it."""

import logging
from collections.abc import Sequence
from math import gcd
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jrlhf.parallel.hosts import mark_progress
from jrlhf.system.errors import UsageError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh with axes ``("data", "fsdp", "tensor")``; ``data=-1`` uses all devices that the other axes leave.

    ``devices`` are all devices of the job by default. Raises UsageError if the axes do not use all devices.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or tensor < 1 or (data < 1 and data != -1):
        raise UsageError(f"mesh axes are at least 1 (data may be -1): data={data}, fsdp={fsdp}, tensor={tensor}")
    shape = (len(devices) // (fsdp * tensor) if data == -1 else data, fsdp, tensor)
    if np.prod(shape) != len(devices):
        raise UsageError(f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not use exactly {len(devices)} devices")
    return Mesh(device_array(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_array(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Return devices in the shape of a mesh; the later an axis, the faster the links between its neighbours.

    Slices of TPUs, and hosts of GPUs, are joined by a slow network, which the earliest axes span: with 2 slices the
    shape (4, 8, 1) has rows 0 and 1 in one and rows 2 and 3 in the other. Raises UsageError if slices differ in size.
    """
    slices = [getattr(device, "slice_index", 0) for device in devices]
    sizes = {slices.count(number) for number in slices}
    if len(sizes) > 1:
        raise UsageError(f"{len(set(slices))} slices of {min(sizes)} to {max(sizes)} devices: a mesh needs equal ones")
    outer = spread_over(len(set(slices)), shape)
    if outer[-1] > 1:
        log.warning("the mesh splits tensor over several slices or hosts, whose network is slow: make it smaller")
    inner = [size // parts for size, parts in zip(shape, outer, strict=True)]
    # Without this a torus takes only axes that are products of its own: no tensor = 2 on 4 x 4 chips.
    options = {"allow_split_physical_axes": True}
    if len(set(slices)) == 1:
        return mesh_utils.create_device_mesh(inner, devices, **options)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **options)


def spread_over(slices: int, shape: Sequence[int]) -> list[int]:
    """Return how many slices each axis of a mesh spans, the first axes as many as they can.

    6 slices and the shape (4, 6, 2) give [2, 3, 1].
    """
    outer = []
    for size in shape:
        outer.append(gcd(slices, size))
        slices //= outer[-1]
    return outer


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Put a pytree of arrays, which is the same on all hosts, on every device of the mesh."""
    return jax.jit(_same, out_shardings=replicated(mesh))(tree)


def _same(tree: Any) -> Any:
    """Return the tree. JAX knows a function again by its identity: a lambda would be compiled at every call."""
    return tree


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of rows over ``data`` and ``fsdp``; the devices of a ``tensor`` group have the same rows."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def spread_rows(x: jax.Array, mesh: Mesh | None, *, last: str | None = None) -> jax.Array:
    """Constrain the rows of ``x`` in a jitted function to the batch sharding, if they divide over the mesh.

    ``last`` names the mesh axis over which its last dimension is split too, if it divides; None: it is whole. With
    parameters split over ``fsdp`` this makes XLA gather a layer's weights instead of the rows of all devices.
    """
    if mesh is None or mesh.size == 1 or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    if last is None or x.shape[-1] % mesh.shape[last]:
        return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
    between = (None,) * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES, *between, last)))


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Put a pytree of NumPy arrays on the mesh by rows (axis 0); every host passes the whole batch and keeps its part.

    Raises UsageError if the rows do not divide over the mesh.
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
