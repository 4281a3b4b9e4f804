"""What weight decay pulls at: matrices, whatever their leaf is called, and no vector, stacked or not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrlhf.config import OptimConfig
from jrlhf.models import init_params, reward_params
from jrlhf.models.functions import is_matrix
from jrlhf.train.optim import make_optimizer
from tests.support.archs import small_arch


def leaves(tree: Any) -> dict[str, Any]:
    paths = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def test_decay_leaves_vectors_alone() -> None:
    arch = small_arch(qkv_bias=True)
    params = reward_params(init_params(arch, jax.random.key(0)), arch, jax.random.key(1))
    params = jax.tree.map(lambda x: x + 1.0, params)
    tx, _ = make_optimizer(OptimConfig(lr=0.1, weight_decay=0.5, warmup=0.0), updates=1)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = {name for name, update in leaves(updates).items() if np.any(update)}
    assert decayed == {name for name in leaves(params) if name.endswith(("/kernel", "/embed"))} - {"head/kernel"}
    assert decayed == {name for name, matrix in leaves(is_matrix(params)).items() if matrix}


def test_only_what_is_below_layers_is_stacked() -> None:
    found = is_matrix({"layers_of_mine": jnp.ones((2, 3)), "layers": {"norm": jnp.ones((2, 3))}})
    assert found == {"layers_of_mine": True, "layers": {"norm": False}}
