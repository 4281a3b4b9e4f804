"""Signatures of nested functions are checked too, each time that they are defined."""

import jax.numpy as jnp
import pytest
from jax import Array
from jaxtyping import Float, Int, TypeCheckError, jaxtyped

from tests.support.signatures import checked


def define(kind: type):
    @jaxtyped(typechecker=checked)
    def nested(x: kind[Array, "N"], y: kind[Array, "N"]) -> kind[Array, "N M"]:  # noqa: F821
        return jnp.outer(x, y) if len(x) != 3 else x

    return nested


def test_a_check_that_is_made_once_refuses_what_a_new_one_would() -> None:
    two, three, whole = jnp.ones(2), jnp.ones(3), jnp.ones(2, jnp.int32)
    for _ in range(2):
        multiply = define(Float)
        assert multiply(two, two).shape == (2, 2)
        with pytest.raises(TypeCheckError, match=r"checking the parameters of .*nested"):
            multiply(two, three)
        with pytest.raises(TypeCheckError, match=r"checking the parameters of .*nested"):
            multiply(whole, whole)
        with pytest.raises(TypeCheckError, match=r"checking the return value of .*nested"):
            multiply(three, three)
        # The same place in the file with other annotations is another signature.
        assert define(Int)(whole, whole).shape == (2, 2)
        with pytest.raises(TypeCheckError, match=r"checking the parameters of .*nested"):
            define(Int)(two, two)
