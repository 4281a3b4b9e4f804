"""How a batch is cut up for the devices."""

import jax
import pytest

from jrlhf.config_io import ConfigError
from jrlhf.parallel import make_mesh
from jrlhf.stages.batches import gradient_slices


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("microbatch", range(10))
def test_slices_are_the_fewest_that_keep_to_the_microbatch(data, fsdp, tensor, microbatch):
    mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=jax.devices()[: data * fsdp * tensor])
    for share in range(1, 13):
        slices = gradient_slices(share * data * fsdp, mesh, microbatch=microbatch, key="rows")
        limit = microbatch or share
        fitting = [n for n in range(1, share + 1) if share % n == 0 and share // n <= limit]
        assert slices == min(fitting)


def test_rows_that_do_not_divide_over_the_devices_are_named():
    mesh = make_mesh(data=2, fsdp=4, tensor=1)
    with pytest.raises(ConfigError, match=r"sft\.batch_size: 12 rows do not divide over 8 devices"):
        gradient_slices(12, mesh, microbatch=0, key="sft.batch_size")
