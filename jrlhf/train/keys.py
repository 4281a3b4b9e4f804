"""The random keys of a run: each consumer has its own named stream of the seed.

``split(k)[i]`` and ``fold_in(k, i)`` are the same key, so two consumers that count from one root would share keys.
Here each consumer counts from its own root.
"""

import zlib
from typing import Literal

import jax

from jrlhf.types import Key

Stream = Literal["init", "lora", "train", "eval", "samples", "candidates", "safety", "best_of_n"]
"""Streams for new weights, new adapters, training steps, held-out answers, samples, candidates, safety answers and the
curve of best of n."""


def stream_key(seed: int, stage: str, stream: Stream) -> Key:
    """Return the root key of one stream of a stage or a command, a pure function of the arguments.

    A stream belongs to one consumer, which derives all its keys from this root.
    """
    # The hash depends on the name alone, so a new stream changes no other; small step numbers cannot collide with it.
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{stage}/{stream}".encode()))
