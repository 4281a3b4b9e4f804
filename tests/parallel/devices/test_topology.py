"""Topologies: names as people write them, and what is known of each."""

import math

import jax
import pytest

from jrlhf.parallel.devices.peaks import CHIPS
from jrlhf.parallel.devices.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "devices", "platform", "gigabytes"),
    [
        ("v5p-128", 64, "tpu", 95),
        ("v4-8", 4, "tpu", 32),
        ("v5e-16", 16, "tpu", 16),
        ("v5litepod-16", 16, "tpu", 16),
        ("v6e-256", 256, "tpu", 32),
        ("v3-8", 8, "tpu", 16),
        ("h100x64", 64, "gpu", 80),
        ("H200x8", 8, "gpu", 141),
        ("a100x16", 16, "gpu", 80),
        ("a100-40gbx8", 8, "gpu", 40),
        ("h100-pciex2", 2, "gpu", 80),
    ],
)
def test_a_topology_has_its_devices(name: str, devices: int, platform: str, gigabytes: float) -> None:
    topology = parse_topology(name)
    assert (topology.size, topology.platform(), topology.memory()) == (devices, platform, gigabytes * 1e9)
    peaks = topology.peaks("bfloat16")
    assert peaks is not None
    assert topology.chip is not None
    assert peaks.flops == devices * topology.chip.tflops * 1e12


def test_every_row_of_the_table_can_be_asked_for() -> None:
    assert len({chip.name for chip in CHIPS}) == len(CHIPS)
    for chip in CHIPS:
        mark = "-" if chip.kind.startswith("TPU") else "x"
        assert parse_topology(f"{chip.name}{mark}8").chip is chip


def test_simulated_devices_share_the_machine() -> None:
    eight, four = parse_topology("cpu:8"), parse_topology("cpu:4")
    assert eight.platform() == "cpu"
    assert list(eight.devices()) == jax.devices()[:8]
    memory, more = eight.memory(), four.memory()
    assert memory is not None
    assert more is not None
    assert math.isclose(2 * memory, more)


def test_without_a_name_it_is_this_machine() -> None:
    topology = parse_topology("")
    assert topology.real
    assert list(topology.devices()) == jax.devices()


@pytest.mark.parametrize("name", ["v5p", "x100x8", "h100-8", "v5px8", "cpu8", "cpu:0", "h100x0", "8", "-"])
def test_an_unknown_name_lists_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"not known; known are .*h100x8.*v5p-8.*cpu:8"):
        parse_topology(name)


def test_a_number_that_cannot_be_says_why() -> None:
    with pytest.raises(ValueError, match="2"):
        parse_topology("v5p-7")
    with pytest.raises(ValueError, match="a pod has at most 256"):
        parse_topology("v5e-512")
    with pytest.raises(ValueError, match=r"100 devices to simulate, but JAX has started with 8"):
        parse_topology("cpu:100").devices()


def test_axes_within_a_node_are_fast_and_across_nodes_slow() -> None:
    topology = parse_topology("h100x16")
    mesh = {"data": 2, "fsdp": 1, "tensor": 8}
    assert topology.sent_per_second(mesh, ("tensor",)) == 450e9
    assert topology.sent_per_second(mesh, ("data",)) == 50e9
    assert topology.sent_per_second({"data": 1, "fsdp": 16, "tensor": 1}, ("fsdp",)) == 50e9
    assert parse_topology("v5p-1024").sent_per_second({"data": 1, "fsdp": 512, "tensor": 1}, ("fsdp",)) == 600e9
    assert parse_topology("cpu:8").sent_per_second({"data": 8, "fsdp": 1, "tensor": 1}, ("data",)) is None
