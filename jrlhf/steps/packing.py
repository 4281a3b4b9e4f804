"""Padding dropped on the device, where the lengths of what was sampled are known: several sequences share a row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from jrlhf.steps.accumulate import split_rows
from jrlhf.types import Params

PerToken = Callable[..., Any]
"""``(params, tokens [B, T], mask [B, T], **settings) -> `` arrays ``[B, T]``: a ``LogprobFn`` or a ``ScoreFn``."""


class Layout(NamedTuple):
    """Places of the tokens of a batch ``[B, T]`` whose sequences are packed into as few of its rows as possible."""

    source: Int[Array, "B T"]
    """For each place the index of its token in the flattened batch; B · T where there is none."""
    segments: Int[Array, "B T"]
    """0 where there is no token, else the number of its sequence in the row."""
    used: Int[Array, ""]
    """Slices that hold a token, at least one: they are the first ones."""

    def pack(self, x: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
        """Tokens to their places; 0 elsewhere."""
        return x.reshape(-1).at[self.source].get(mode="fill", fill_value=0)

    def unpack(self, x: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
        """``pack`` backwards; 0 where the batch has padding."""
        return jnp.zeros(x.size, x.dtype).at[self.source.reshape(-1)].set(x.reshape(-1), mode="drop").reshape(x.shape)


def packed_layout(mask: Bool[Array, "B T"], *, slices: int) -> Layout:
    """Best fit, the longest sequence first (Johnson et al. 1974); rows are filled slice by slice of ``split_rows``."""
    rows, width = mask.shape
    if rows % slices:
        raise ValueError(f"{rows} rows do not divide into {slices} slices")
    row, start, number = _best_fit(jnp.sum(mask, axis=1, dtype=jnp.int32), width)
    in_slice = rows // slices
    filled = jnp.max(jnp.where(jnp.any(mask, axis=1), row, 0)) + 1
    used = (filled + in_slice - 1) // in_slice
    # Slice p is the rows p, p + slices, ...: the first rows to be filled are those of slice 0.
    placed = row % in_slice * slices + row // in_slice
    index = jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    nowhere = jnp.int32(rows * width)
    place = jnp.where(mask, (placed * width + start)[:, None] + index, nowhere).reshape(-1)

    def scattered(values: Int[Array, "N"], empty: Array) -> Int[Array, "B T"]:
        return jnp.full(rows * width, empty, jnp.int32).at[place].set(values, mode="drop").reshape(rows, width)

    source = scattered(jnp.arange(rows * width, dtype=jnp.int32), nowhere)
    return Layout(source, scattered(jnp.repeat(number, width), jnp.int32(0)), used)


def _best_fit(lengths: Int[Array, "B"], width: int) -> tuple[Int[Array, "B"], Int[Array, "B"], Int[Array, "B"]]:
    """For each sequence its row, the column it starts at, and its number in the row from 1."""
    rows = lengths.shape[0]

    def put(
        state: tuple[Int[Array, "B"], Int[Array, "B"]], sequence: Int[Array, ""]
    ) -> tuple[tuple[Int[Array, "B"], Int[Array, "B"]], tuple[Array, Array, Array]]:
        room, members = state
        length = lengths[sequence]
        # Of equal room the first: a new row is opened only where no other has room.
        row = jnp.argmin(jnp.where(room >= length, room, width + 1)).astype(jnp.int32)
        filled = room.at[row].add(-length), members.at[row].add(1)
        return filled, (row, width - room[row], filled[1][row])

    order = jnp.argsort(-lengths).astype(jnp.int32)
    empty = jnp.full(rows, width, jnp.int32), jnp.zeros(rows, jnp.int32)
    _, placement = lax.scan(put, empty, order)
    row, start, number = (jnp.zeros(rows, jnp.int32).at[order].set(x) for x in placement)
    return row, start, number


def without_padding(fn: PerToken, *, slices: int) -> PerToken:
    """A ``LogprobFn`` or ``ScoreFn`` over packed rows, one of ``slices`` parts of them at a time, empty ones left out.

    Same results at real tokens (log-probs: that have one before them), 0 at padding. ``fn`` must know segment numbers,
    as those of the bundled decoders do; ``where``, if given, is packed along. No gradient can be taken: how many
    slices hold anything only the device knows.
    """

    def packed(
        params: Params,
        tokens: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        /,
        *,
        where: Bool[Array, "B T"] | None = None,
        **settings: Any,
    ) -> Any:
        layout = packed_layout(mask, slices=slices)
        places = {} if where is None else {"where": layout.pack(where)}
        parts = split_rows(((layout.pack(tokens), layout.segments), places), slices)

        # Jitted, so that it is traced once for its shapes and for the loop.
        @jax.jit
        def of_slice(params: Params, part: Any) -> Any:
            arrays, places = part
            return fn(params, *arrays, **places, **settings)

        shapes = jax.eval_shape(of_slice, params, jax.tree.map(lambda x: x[0], parts))
        empty = jax.tree.map(lambda s: jnp.zeros((slices, *s.shape), s.dtype), shapes)

        def add(number: Int[Array, ""], results: Any) -> Any:
            new = of_slice(params, jax.tree.map(lambda x: x[number], parts))
            return jax.tree.map(lambda out, part: out.at[number].set(part), results, new)

        results = lax.fori_loop(0, layout.used, add, empty)
        # Back from [slices, rows a slice, T] in the order of split_rows.
        return jax.tree.map(lambda x: layout.unpack(jnp.swapaxes(x, 0, 1).reshape(mask.shape)), results)

    return packed
