"""Every call in the package is checked against its signature, nested functions each time that they are defined."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from jaxtyping import Float, Int

from jrlhf.config import OptimConfig
from jrlhf.core.logprobs import from_logits
from jrlhf.core.masks import masked_sum
from jrlhf.steps.packing import packed_layout
from tests.support.signatures import SignatureError, checked


def define(kind: type):
    @checked
    def nested(x: kind[Array, "N"], y: kind[Array, "N"]) -> kind[Array, "N M"]:  # noqa: F821
        return jnp.outer(x, y) if len(x) != 3 else x

    return nested


def test_a_check_that_is_made_once_refuses_what_a_new_one_would() -> None:
    two, three, whole = jnp.ones(2), jnp.ones(3), jnp.ones(2, jnp.int32)
    for _ in range(2):
        multiply = define(Float)
        assert multiply(two, two).shape == (2, 2)
        with pytest.raises(SignatureError, match=r"nested: the argument y is float32\[3\], not .*N"):
            multiply(two, three)
        with pytest.raises(SignatureError, match=r"nested: the argument x is int32\[2\]"):
            multiply(whole, whole)
        with pytest.raises(SignatureError, match=r"nested: the argument x is float64\[2\]"):
            multiply(x=np.ones(2), y=two)
        with pytest.raises(SignatureError, match=r"nested: the result is float32\[3\]"):
            multiply(three, three)
        # The same place in the file with other annotations is another signature.
        assert define(Int)(whole, whole).shape == (2, 2)
        with pytest.raises(SignatureError, match=r"nested: the argument x is float32\[2\]"):
            define(Int)(two, two)


@checked
def every_kind(first: int, /, second: float, *more: str, last: bool = False, **others: bytes) -> "list[str]":
    return [first] if last else [*more]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("args", "kwargs", "named"),
    [
        ((1, 2.0), {}, ""),
        ((1, 2.0, "a", "b"), {"x": b""}, ""),
        ((1,), {"second": 2.0}, ""),
        (("1", 2.0), {}, "the argument first is '1'"),
        ((1, "2"), {}, "the argument second is '2'"),
        ((1,), {"second": "2"}, "the argument second is '2'"),
        ((1, 2.0, "a", 3), {}, r"the argument \* is 3"),
        ((1, 2.0), {"last": 1}, "the argument last is 1"),
        ((1, 2.0), {"x": "y"}, "the argument x is 'y'"),
        ((1, 2.0), {"last": True}, r"the result is \[1\]"),
    ],
)
def test_each_kind_of_parameter_is_checked(args: tuple, kwargs: dict, named: str) -> None:
    if not named:
        assert every_kind(*args, **kwargs) == list(args[2:])
        return
    with pytest.raises(SignatureError, match=named):
        every_kind(*args, **kwargs)


def test_a_scope_ends_with_its_call() -> None:
    @checked
    def inner(x: Float[Array, "N"]) -> None:  # noqa: F821
        pass

    @checked
    def outer(x: Float[Array, "N"]) -> None:  # noqa: F821
        inner(jnp.ones(3))

    outer(jnp.ones(2))
    with pytest.raises(SignatureError, match="inner"):
        inner(jnp.ones((1, 1)))
    outer(jnp.ones(4))


def test_a_name_that_nobody_knows_is_not_passed_over() -> None:
    @checked
    def left_out(x: "Dataset | int") -> None:  # noqa: F821
        pass

    @checked
    def misspelt(x: "Datazet | int") -> None:  # noqa: F821
        pass

    left_out("of any type")
    with pytest.raises(NameError, match="Datazet"):
        misspelt(1)


def test_the_package_is_checked() -> None:
    """Methods, what is defined inside of functions, and dataclasses too."""
    with pytest.raises(SignatureError, match=r"jrlhf\.core\.masks\.masked_sum: the argument mask is bool\[3\]"):
        masked_sum(jnp.ones(2), jnp.ones(3, jnp.bool_))
    with pytest.raises(SignatureError, match=r"OptimConfig\.__init__: the argument lr is 'high'"):
        OptimConfig(lr="high")  # type: ignore[arg-type]
    nested = from_logits(lambda params, tokens, mask: jnp.zeros((1, 2, 3)))
    with pytest.raises(SignatureError, match=r"from_logits\.<locals>\.\w+: the argument"):
        nested(None, jnp.ones((1, 2)), jnp.ones((1, 2), jnp.bool_), temperature=1.0)
    with pytest.raises(SignatureError, match=r"Layout\.pack: the argument x is int32\[2\]"):
        packed_layout(jnp.ones((1, 2), jnp.bool_), slices=1).pack(jnp.arange(2))
