"""A tree in two: the leaves that are trained, and the frozen rest."""

from collections.abc import Callable
from typing import Any

import jax


def partition(tree: Any, trained: Callable[[str], bool]) -> tuple[Any, Any]:
    """``(trained, frozen)``: two trees of the same form, each with None where the other has a leaf.

    ``trained`` is called with the path of every leaf, such as ``"layers/attention/q/lora_a"``.
    """

    def side(is_trained: bool) -> Any:
        def leaf(path: tuple[Any, ...], x: Any) -> Any:
            return x if trained(jax.tree_util.keystr(path, simple=True, separator="/")) is is_trained else None

        return jax.tree_util.tree_map_with_path(leaf, tree)

    return side(True), side(False)


def combine(trained: Any, frozen: Any) -> Any:
    """The whole tree of a ``partition``; ``trained`` itself where nothing is frozen."""
    if frozen is None:
        return trained
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)
