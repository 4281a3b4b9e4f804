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


@pytest.mark.parametrize(
    ("name", "devices", "gigabytes"),
    [
        # Links of a chip in the slice, times the GB/s of one.
        ("v5p:2x2x1", 4, 2 * 100),
        ("v5p:2x2x2", 8, 3 * 100),
        ("v5p:2x2x4", 16, 4 * 100),
        ("v5p:4x4x4", 64, 6 * 100),
        ("v5e:2x2", 4, 2 * 50),
        ("v5e:4x4", 16, 2 * 50),
        ("v5e:16x16", 256, 4 * 50),
        ("v6e:8x16", 128, 3 * 100),
        ("v4:2x2x1", 4, 2 * 50),
        ("tpu7x:2x2x1", 8, 2 * 50),
        ("v5p-8", 4, 2 * 100),
        ("v5p-128", 64, 6 * 100),
        ("v5e-16", 16, 2 * 50),
        ("tpu7x-8", 8, 2 * 50),
        ("h100x8", 8, 450),
    ],
)
def test_a_name_says_how_many_devices_and_links(name: str, devices: int, gigabytes: float) -> None:
    topology = parse_topology(name)
    assert (topology.size, topology.real) == (devices, False)
    assert topology.sent_in_group(0) == pytest.approx(gigabytes * 1e9)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("v5e-1", (1, 1)),
        ("v5litepod-8", (2, 4)),
        ("v6e-32", (4, 8)),
        ("v6e-256", (16, 16)),
        ("v5p-8", (2, 2, 1)),
        ("v5p-64", (2, 4, 4)),
        ("v4-128", (4, 4, 4)),
        # As Google Cloud lists them for v5p.
        ("v5p-256", (4, 4, 8)),
        ("v5p-384", (4, 4, 12)),
        ("v5p-1024", (8, 8, 8)),
        ("v5p-1536", (8, 8, 12)),
        ("v5p-6144", (12, 16, 16)),
        ("v5e-12", ()),
        ("v5p-24", ()),
        ("h100x8", ()),
    ],
)
def test_a_number_of_chips_stands_for_a_slice(name: str, shape: tuple[int, ...]) -> None:
    assert parse_topology(name).shape == shape


def test_a_slice_of_a_wrong_number_of_sides_is_answered_with_an_example() -> None:
    with pytest.raises(ValueError, match=r"'v5e:2x2x1': a slice of v5e has 2 sides, such as v5e:2x2"):
        parse_topology("v5e:2x2x1")
    with pytest.raises(ValueError, match=r"'v5p:0x2x1' is not known"):
        parse_topology("v5p:0x2x1")


@pytest.mark.parametrize(
    ("name", "usable"), [("v5e-16", 15.75 * 2**30), ("v5p-8", 95.73 * 2**30), ("h100x8", 0.9 * 80e9)]
)
def test_memory_that_programs_may_take_is_the_compilers_limit_or_nine_tenths(name: str, usable: float) -> None:
    assert parse_topology(name).usable_memory() == usable


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


@pytest.mark.parametrize(
    "name", ["v5p", "x100x8", "h100-8", "v5px8", "cpu8", "cpu:0", "h100x0", "8", "-", "v9:2x2", "h100:2x2"]
)
def test_an_unknown_name_lists_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=r"not known; known are .*h100x8.*v5p-8.*:2x2x1.*cpu:8"):
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
