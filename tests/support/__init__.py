"""What several tests use: oracles, tiny models, small runs, other processes."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

WITHOUT_TORCH = Path(__file__).with_name("without_torch")
"""On the path of a process that need not find torch, which transformers imports with any tokenizer: 2 CPU seconds."""
