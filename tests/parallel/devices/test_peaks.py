"""Peaks: the table finds the devices people have, and a CPU is measured."""

import pytest

from jrlhf.parallel.devices.peaks import device_peaks, known_peaks


@pytest.mark.parametrize(
    ("kind", "tflops", "gigabytes"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 3350),
        ("NVIDIA H100 PCIe", 756, 2000),
        ("NVIDIA H200", 989, 4800),
        ("NVIDIA A100-SXM4-80GB", 312, 2039),
        ("NVIDIA A100-SXM4-40GB", 312, 1555),
        ("NVIDIA A100 80GB PCIe", 312, 1935),
        ("NVIDIA B200", 2250, 8000),
        ("NVIDIA GB200", 2500, 8000),
        ("NVIDIA L4", 121, 300),
        ("NVIDIA L40S", 362, 864),
        ("TPU v4", 275, 1228),
        ("TPU v5 lite", 197, 819),
        ("TPU v5", 459, 2765),
        ("TPU v5p", 459, 2765),
        ("TPU v6 lite", 918, 1640),
    ],
)
def test_a_device_is_found_by_the_name_jax_gives_it(kind: str, tflops: float, gigabytes: float) -> None:
    peaks = known_peaks(kind, 4)
    assert peaks is not None
    assert (peaks.flops, peaks.bytes) == (4e12 * tflops, 4e9 * gigabytes)


def test_of_an_unknown_device_nothing_is_claimed() -> None:
    assert known_peaks("NVIDIA Something 9000", 1) is None


def test_a_cpu_is_measured_once() -> None:
    peaks = device_peaks("float32")
    assert peaks is not None
    assert peaks.flops > 0
    assert peaks.bytes > 0
    assert device_peaks("float32") == peaks
