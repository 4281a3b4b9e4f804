"""How a batch is cut up for the devices."""

import jax
import pytest

from jrlhf.config import ConfigError
from jrlhf.parallel import make_mesh
from jrlhf.train.batches import device_share, gradient_slices, usual_microbatch


@pytest.mark.parametrize("microbatch", range(1, 14))
def test_slices_are_the_fewest_that_keep_to_the_microbatch(microbatch):
    for share in range(1, 13):
        slices = gradient_slices(share, microbatch=microbatch)
        assert slices == min(n for n in range(1, share + 1) if share % n == 0 and share // n <= microbatch)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 8, 1)])
def test_a_device_takes_its_share(data, fsdp, tensor):
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
    assert device_share(5 * data * fsdp, mesh, key="rows") == 5


@pytest.mark.parametrize(("tokens", "rows"), [(1.0, 16), (64.0, 16), (65.0, 15), (500.5, 2), (1024.0, 1), (5000.0, 1)])
def test_a_cpu_takes_what_its_caches_hold_and_others_all(tokens, rows):
    assert usual_microbatch(16, tokens=tokens, platform="cpu") == rows
    assert usual_microbatch(16, tokens=tokens, platform="gpu") == 16


def test_rows_that_do_not_divide_over_the_devices_are_named():
    mesh = make_mesh(data=2, fsdp=4, tensor=1)
    with pytest.raises(ConfigError, match=r"sft\.batch_size: 12 rows do not divide over 8 devices"):
        device_share(12, mesh, key="sft.batch_size")
