"""The trained part of a model belongs to the state; what a stage also reads itself stays as it is."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrlhf.config import LoRAConfig
from jrlhf.models import Pretrained, load_pretrained
from jrlhf.parallel import make_mesh
from jrlhf.train.lora import trainable
from tests.support.checkpoints import write_named


def model_of(folder: Path, weights: str) -> Pretrained:
    return load_pretrained(
        write_named(folder, "llama2"), dtype="bfloat16", mesh=make_mesh(data=2, fsdp=2, tensor=2), weights=weights
    )


def parts_of(model: Pretrained, *, rank: int, shared: bool) -> tuple:
    lora = LoRAConfig(rank=rank)
    return trainable(model, lora, jax.random.key(0), mesh=make_mesh(data=2, fsdp=2, tensor=2), path="", shared=shared)


def buffers(tree) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards}


@pytest.mark.parametrize("weights", ["float32", "auto"])
def test_a_policy_in_training_is_neither_its_reference_nor_rounded_with_it(weights: str, tmp_path: Path) -> None:
    """A reference in bfloat16 is rounded from the start; the policy has every bit of the file."""
    model, exact = model_of(tmp_path, weights), load_pretrained(tmp_path, dtype="float32")
    trained, frozen = parts_of(model, rank=0, shared=True)
    assert frozen is None
    jax.tree.map(np.testing.assert_array_equal, trained, exact.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert not buffers(trained) & buffers(model.params)


def test_a_model_that_nobody_else_reads_is_not_copied(tmp_path: Path) -> None:
    model = model_of(tmp_path, "float32")
    trained, _ = parts_of(model, rank=0, shared=False)
    assert buffers(trained) == buffers(model.params)


@pytest.mark.parametrize("shared", [False, True])
def test_adapters_are_float32_and_their_base_is_the_model_s_own(shared: bool, tmp_path: Path) -> None:
    model = model_of(tmp_path, "auto")
    trained, frozen = parts_of(model, rank=2, shared=shared)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}
    assert frozen["layers"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert not buffers(trained) & buffers(model.params)
    assert buffers(model.params) <= buffers(frozen)
