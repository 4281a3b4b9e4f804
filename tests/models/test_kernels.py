"""Which attention kernel "auto" takes, and rotary positions by a product, as on a TPU."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from jrlhf.models.kernels import attention_kernel
from jrlhf.models.layers import rotate
from jrlhf.models.rope import Angles
from jrlhf.system.errors import UsageError


def mesh_of(platform, kind=""):
    devices = np.array([SimpleNamespace(platform=platform, device_kind=kind)], dtype=object)
    return Mock(spec=Mesh, devices=devices)


@pytest.mark.parametrize(
    ("platform", "kind", "dtype", "head_dim", "softcap", "expected"),
    [
        ("cpu", "cpu", "bfloat16", 64, None, "xla"),
        ("tpu", "TPU v5", "bfloat16", 64, None, "splash"),
        ("tpu", "TPU v5 lite", "bfloat16", 256, 50.0, "splash"),
        ("tpu", "TPU v3", "bfloat16", 64, None, "xla"),
        ("tpu", "TPU v4", "float32", 64, None, "xla"),
        ("tpu", "TPU v4", "bfloat16", 80, None, "xla"),
        ("gpu", "NVIDIA H100", "bfloat16", 128, None, "cudnn"),
        ("cuda", "NVIDIA H100", "bfloat16", 128, None, "cudnn"),
        ("gpu", "NVIDIA H100", "float32", 128, None, "xla"),
        ("gpu", "NVIDIA H100", "bfloat16", 128, 50.0, "xla"),
        ("gpu", "NVIDIA H100", "bfloat16", 256, None, "xla"),
    ],
)
def test_auto_is_the_fastest_kernel_that_platform_and_model_support(
    arch, platform, kind, dtype, head_dim, softcap, expected
):
    arch = replace(arch, head_dim=head_dim, attention_softcap=softcap)
    assert attention_kernel("auto", arch, jnp.dtype(dtype), mesh_of(platform, kind)) == expected


def test_a_kernel_that_is_named_is_taken_or_refused(arch):
    assert attention_kernel("xla", arch, jnp.dtype("bfloat16"), mesh_of("tpu", "TPU v5")) == "xla"
    with pytest.raises(UsageError, match="'cudnn' has no soft cap"):
        attention_kernel("cudnn", replace(arch, attention_softcap=1.0), jnp.dtype("bfloat16"), mesh_of("gpu"))


@pytest.mark.parametrize(("width", "rotated"), [(64, 64), (24, 8)], ids=["whole heads", "a part of each"])
def test_rotation_by_a_product_is_that_of_halves(width, rotated):
    """In bfloat16 and its gradient; both round once, at the end."""
    turns = jax.random.normal(jax.random.key(1), (2, 5, 1, rotated // 2))
    angles = Angles(jnp.cos(turns), jnp.sin(turns))
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, width), jnp.bfloat16)

    def turned(x, by_product):
        return rotate(x, angles, by_product=by_product).astype(jnp.float32)

    def gradient(by_product):
        return jax.grad(lambda x: jnp.sum(jnp.sin(turned(x, by_product))))(x).astype(jnp.float32)

    np.testing.assert_allclose(turned(x, True), turned(x, False), rtol=2**-8, atol=1e-6)
    np.testing.assert_allclose(gradient(True), gradient(False), rtol=2**-7, atol=2**-8)
    assert float(jnp.max(jnp.abs(turned(x, True) - x.astype(jnp.float32)))) > 0.5
