"""Compilations are counted while somebody looks, and not after."""

import jax
import jax.numpy as jnp

from jrlhf.parallel.compilation import counted_compilations


def test_a_program_counts_once_a_shape() -> None:
    triple = jax.jit(lambda x: x * jnp.float32(3))
    short, long = jnp.ones(3), jnp.ones(5)
    with counted_compilations() as compiled:
        triple(short)
        first = compiled.programs
        triple(short)
        again = compiled.programs
        triple(long)
    assert (first, again, compiled.programs) == (1, 1, 2)
    assert compiled.seconds > 0
    triple(jnp.ones(7))
    assert compiled.programs == 2
