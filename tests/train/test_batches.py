"""How a batch is cut up for the devices, against what dealing out the rows by hand gives."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrlhf.config import ConfigError
from jrlhf.parallel import make_mesh
from jrlhf.train.batches import (
    CPU_TOKENS,
    covering_batches,
    device_multiple,
    device_share,
    gradient_slices,
    reading_slices,
    usual_microbatch,
)

MESHES = [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 8, 1)]


def dealt(rows: int, slices: int) -> list[int]:
    """How many of the rows each slice gets, dealt out one by one."""
    sizes = [0] * slices
    for row in range(rows):
        sizes[row % slices] += 1
    return sizes


@given(share=st.integers(1, 24), microbatch=st.integers(1, 30))
def test_slices_are_the_fewest_of_one_size_that_keep_to_the_microbatch(share: int, microbatch: int) -> None:
    slices = gradient_slices(share, microbatch=microbatch)
    assert len({*dealt(share, slices)}) == 1
    assert max(dealt(share, slices)) <= microbatch
    for fewer in range(1, slices):
        sizes = dealt(share, fewer)
        assert len({*sizes}) > 1 or max(sizes) > microbatch, f"{fewer} slices would do"


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20), size=st.integers(1, 8), limit=st.integers(0, 25))
def test_every_row_is_visited_once_with_rows_of_its_length(lengths: list[int], size: int, limit: int) -> None:
    visited: list[int] = []
    batches = [*covering_batches(np.asarray(lengths), batch_size=size, limit=limit)]
    for number, (indices, real) in enumerate(batches):
        assert indices.shape == real.shape == (size,)
        assert real.all() or number == len(batches) - 1, "only the last batch is filled up"
        assert {*indices.tolist()} == {*indices[real].tolist()}, "what fills it up are its own rows"
        visited += indices[real].tolist()
    rows = range(len(lengths))[: limit or None]
    assert sorted(visited) == [*rows]
    assert [lengths[row] for row in visited] == sorted(lengths[row] for row in rows)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), MESHES)
def test_a_device_takes_its_share(data: int, fsdp: int, tensor: int) -> None:
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
    assert device_share(5 * data * fsdp, mesh, key="rows") == 5
    for rows in range(1, 20):
        # Rows are added until all devices get the same number of them.
        filled = next(more for more in range(rows, 40) if len({*dealt(more, data * fsdp)}) == 1)
        assert device_multiple(rows, mesh) == filled


@pytest.mark.parametrize(("tokens", "rows"), [(1.0, 16), (64.0, 16), (65.0, 15), (500.5, 2), (1024.0, 1), (5000.0, 1)])
def test_a_cpu_takes_what_its_caches_hold_and_others_all(tokens: float, rows: int) -> None:
    assert usual_microbatch(16, tokens=tokens, platform="cpu") == rows
    assert usual_microbatch(16, tokens=tokens, platform="gpu") == 16


@given(share=st.integers(1, 24), tokens=st.floats(1.0, 3000.0))
def test_a_cpu_reads_as_many_rows_at_a_time_as_its_caches_hold(share: int, tokens: float) -> None:
    at_once = max(dealt(share, reading_slices(share, microbatch=0, tokens=tokens, platform="cpu")))
    assert at_once * tokens <= CPU_TOKENS or at_once == 1
    assert max(dealt(share, reading_slices(share, microbatch=1, tokens=tokens, platform="cpu"))) == 1
    assert reading_slices(share, microbatch=0, tokens=tokens, platform="gpu") == 1


def test_rows_that_do_not_divide_over_the_devices_are_named() -> None:
    mesh = make_mesh(data=2, fsdp=4, tensor=1)
    with pytest.raises(ConfigError, match=r"sft\.batch_size: 12 rows do not divide over 8 devices"):
        device_share(12, mesh, key="sft.batch_size")
