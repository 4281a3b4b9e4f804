"""The figures of a stage in a plan."""

from dataclasses import dataclass

from jrlhf.plan.programs import Figures


@dataclass(frozen=True)
class StageFigures:
    """Memory, traffic, FLOPs and time of one stage; bytes are per device."""

    name: str
    batch_key: str
    batch: int
    held: dict[str, float]
    cache: float
    temporaries: float
    """Activations, gradients and KV cache of the program with the highest peak."""
    peak: float
    peak_in: str
    flops: float
    """FLOPs of a step (PPO: an iteration) on all devices."""
    sent: dict[str, float]
    """Bytes that a device sends in a step, by mesh axes."""
    seconds: float | None
    """Seconds of a step from FLOPs and bytes alone; None if a program's are unknown."""
    estimate: float | None
    """Seconds of a step from the compiled programs; None if a program's are unknown."""
    memory: float | None
    """Usable bytes; None if the memory of the devices is unknown."""
    fits: bool | None
    fitting_batch: int | None
    """Largest batch that fits with the same number of slices; 0 if not even one row per device fits."""
    programs: list[Figures]
