"""The training loop that all stages share, and the setup before it; it contains no algorithm."""
