"""What several tests use: oracles, tiny models, small runs, other processes."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
