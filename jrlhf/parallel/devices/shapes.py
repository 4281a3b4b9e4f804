"""Shapes of TPU slices by their number of chips."""

import math

SMALL_SLICES = {
    2: {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)},
    3: {1: (1, 1, 1), 2: (1, 1, 2), 4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)},
}
"""Shapes by the number of dimensions and of chips."""

CUBE = 4
"""Side of the cubes that larger slices of three dimensions are built of."""


def slice_shape(chips: int, dimensions: int) -> tuple[int, ...]:
    """Return the sides of the slice with this many chips that Google Cloud gives by default; empty if there is none.

    A large slice of three dimensions is a box of 4 x 4 x 4 cubes, as close to a cube as can be: 192 chips are 4 x 4 x
    12 (https://cloud.google.com/tpu/docs/v5p).
    """
    if known := SMALL_SLICES.get(dimensions, {}).get(chips):
        return known
    cubes, rest = divmod(chips, CUBE**3)
    if dimensions != 3 or rest or not cubes:
        return ()
    boxes = [
        (a, b, cubes // (a * b))
        for a in range(1, math.isqrt(cubes) + 1)
        for b in range(a, cubes // a + 1)
        if cubes % (a * b) == 0 and cubes // (a * b) >= b
    ]
    return tuple(CUBE * side for side in min(boxes, key=sum))
