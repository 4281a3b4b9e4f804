"""What a machine cannot compute with is said at the start of a stage, by the name of the field."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from jax.sharding import Mesh

from jrlhf.config import ConfigError, ModelConfig
from jrlhf.parallel import make_mesh
from jrlhf.train.start import compute_options


def mesh_of(platform, kind):
    return Mock(spec=Mesh, devices=np.array([SimpleNamespace(platform=platform, device_kind=kind)]))


@pytest.mark.parametrize(
    ("attention", "mesh", "error"),
    [
        ("splash", make_mesh(data=-1, fsdp=1, tensor=1), "splash needs a TPU, v4 or newer, not cpu"),
        ("splash", mesh_of("gpu", "NVIDIA H100"), "splash needs a TPU, v4 or newer, not NVIDIA H100"),
        ("splash", mesh_of("tpu", "TPU v3"), "splash needs a TPU, v4 or newer, not TPU v3"),
        ("cudnn", mesh_of("tpu", "TPU v4"), "cudnn needs a GPU and bfloat16, not tpu and bfloat16"),
    ],
)
def test_an_attention_that_cannot_be_had_is_named(attention, mesh, error):
    with pytest.raises(ConfigError, match=rf"^sft\.model\.attention: {error}$"):
        compute_options(ModelConfig(dtype="bfloat16", attention=attention), mesh, key="sft.model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpu_takes_splash(dtype):
    model = ModelConfig(dtype=dtype, attention="splash")
    assert compute_options(model, mesh_of("tpu", "TPU v5 lite"), key="")["attention"] == "splash"
