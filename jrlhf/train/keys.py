"""The random keys of a run: named streams of its seed, of which no two consumers share one.

``split(k)[i]`` and ``fold_in(k, i)`` are the same key, so consumers that number their draws from one root meet. Here
each of them has a root of its own, and numbers its draws below that.
"""

import zlib
from typing import Literal

import jax

from jrlhf.types import Key

Stream = Literal["init", "lora", "train", "eval", "samples", "candidates", "safety"]
"""Fresh weights, fresh adapters, training steps, held-out answers, answers to show, answers to rank, safety answers."""


def stream_key(seed: int, stage: str, stream: Stream) -> Key:
    """The root key of one stream of a stage (or command), a pure function of its arguments.

    A stream belongs to one consumer, which derives all its keys from this one.
    """
    # A hash of the name, not its place in a list: a new stream changes no other, and no step number comes near it.
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"{stage}/{stream}".encode()))
