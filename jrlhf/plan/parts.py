"""The figures of a planned stage."""

from dataclasses import dataclass

from jrlhf.plan.programs import Figures


@dataclass(frozen=True)
class StageFigures:
    """What one stage takes; bytes are a device's."""

    name: str
    batch_key: str
    batch: int
    held: dict[str, float]
    cache: float
    temporaries: float
    """Of the program with the highest peak: activations, gradients, the cache."""
    peak: float
    peak_in: str
    flops: float
    """Of a step (PPO: an iteration), of all devices."""
    sent: dict[str, float]
    """By a device in a step, by mesh axes."""
    seconds: float | None
    memory: float | None
    """That may be used; None: nothing is known of the devices' memory."""
    fits: bool | None
    fitting_batch: int | None
    """The largest batch that fits, read in as many slices; 0: not even a row a device."""
    programs: list[Figures]
