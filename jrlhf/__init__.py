"""RLHF in JAX: SFT, a reward model from human rankings, and PPO under a KL penalty."""

__version__ = "0.1.0"
