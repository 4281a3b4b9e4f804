"""Devices that are not there: their names, their links, and the compilers that describe them."""

from importlib.util import find_spec

import pytest

from jrlhf.parallel.devices.compilers import absent_topology, described_topology
from jrlhf.system.errors import UsageError


@pytest.mark.parametrize(
    ("name", "devices", "platform", "gigabytes"),
    [
        # Links of a chip in the slice, times the GB/s of one.
        ("v5p:2x2x1", 4, "tpu", 2 * 100),
        ("v5p:2x2x2", 8, "tpu", 3 * 100),
        ("v5p:2x2x4", 16, "tpu", 4 * 100),
        ("v5p:4x4x4", 64, "tpu", 6 * 100),
        ("v5e:2x2", 4, "tpu", 2 * 50),
        ("v5e:4x4", 16, "tpu", 2 * 50),
        ("v5e:16x16", 256, "tpu", 4 * 50),
        ("v6e:8x16", 128, "tpu", 3 * 100),
        ("v4:2x2x1", 4, "tpu", 2 * 50),
        ("h100x8", 8, "gpu", 450),
        ("h100x1", 1, "gpu", 450),
    ],
)
def test_a_name_says_how_many_devices_and_links(name: str, devices: int, platform: str, gigabytes: float) -> None:
    topology = absent_topology(name)
    assert (topology.size, topology.platform(), topology.real) == (devices, platform, False)
    assert topology.sent_in_group(0) == pytest.approx(gigabytes * 1e9)
    assert topology.chip is not None
    assert (topology.chip.clock > 0) == (platform == "tpu")


@pytest.mark.parametrize("name", ["v5p", "v5p-8", "v5p:4", "a100x8", "h100", "cpu:8", ""])
def test_what_is_no_name_is_answered_with_examples(name: str) -> None:
    with pytest.raises(UsageError, match=r"no TPU slice, such as v5p:2x2x1 .* and no h100x8"):
        absent_topology(name)


def test_an_unknown_chip_is_answered_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"'v9:2x2': v9 is not known; known are .*v5p"):
        absent_topology("v9:2x2")


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="the TPU's compiler is installed")
def test_without_the_compiler_of_a_tpu_it_says_what_to_install() -> None:
    with pytest.raises(UsageError, match=r'pip install "jrlhf\[tpu-compiler\]"'):
        described_topology("v5p:2x2x1")


@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is not None, reason="XLA's CUDA compiler is installed")
def test_without_the_compiler_of_a_gpu_it_says_what_to_install() -> None:
    with pytest.raises(UsageError, match=r'pip install "jax\[cuda13\]"'):
        described_topology("h100x8")
