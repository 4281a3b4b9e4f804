"""A tree in two and whole again."""

import jax
import jax.numpy as jnp

from jrlhf.core import combine, partition
from jrlhf.types import PPOParams


def test_partition_and_combine_are_inverse_and_share_their_leaves():
    tree = PPOParams({"a": jnp.ones(2), "b": {"lora": jnp.zeros(3)}}, [jnp.ones(1), {"lora": jnp.ones(4)}])
    asked = []

    def trained(path):
        asked.append(path)
        return path.endswith("lora")

    moving, frozen = partition(tree, trained)
    assert set(asked) == {"policy/a", "policy/b/lora", "value/0", "value/1/lora"}
    assert moving == PPOParams({"a": None, "b": {"lora": tree.policy["b"]["lora"]}}, [None, tree.value[1]])
    assert len(jax.tree.leaves(frozen)) == 2
    whole = combine(moving, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(tree), strict=True))


def test_without_a_frozen_part_the_tree_is_returned_as_it_is():
    tree = {"a": jnp.ones(2)}
    assert combine(tree, None) is tree
