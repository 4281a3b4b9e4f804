"""Compilers of devices that are not there: what they describe, and what is said where one is absent."""

from importlib.util import find_spec

import pytest

from jrlhf.parallel.devices.compilers import compiler_of, described_topology
from jrlhf.parallel.devices.topology import parse_topology
from jrlhf.system.errors import UsageError


@pytest.mark.skipif(find_spec("libtpu") is not None, reason="the TPU's compiler is installed")
def test_without_the_compiler_of_a_tpu_it_says_what_to_install() -> None:
    with pytest.raises(UsageError, match=r'pip install "jrlhf\[tpu-compiler\]"'):
        described_topology(parse_topology("v5p:2x2x1"))


@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is not None, reason="XLA's CUDA compiler is installed")
def test_without_the_compiler_of_a_gpu_it_says_what_to_install() -> None:
    with pytest.raises(UsageError, match=r'pip install "jax\[cuda13\]"'):
        described_topology(parse_topology("h100x8"))


@pytest.mark.parametrize(("name", "why"), [("a100x8", "only for h100"), ("v5e-12", "no slice has this number")])
def test_devices_without_a_description_say_so(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=rf"{name}: .*{why}"):
        described_topology(parse_topology(name))


def test_simulated_devices_are_said_to_be_simulated() -> None:
    assert compiler_of(parse_topology("v5p-8")).endswith("for simulated devices of the CPU")
    assert compiler_of(parse_topology("")).startswith("jaxlib ")
