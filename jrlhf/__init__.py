"""RLHF in JAX: SFT, a reward model from human rankings, and PPO under a KL penalty.

Public, and stable in names and signatures, are the packages' ``__all__``:

- ``jrlhf.core``, pure functions over arrays: log-probs, KL, advantages, losses, sampling;
- ``jrlhf.steps``, factories of pure training steps over any model, and ``jrlhf.types``, what they call and exchange;
- ``jrlhf.models``, Hugging Face folders and wrappers for your own modules;
- ``jrlhf.parallel``, mesh, shardings and jitted steps.

So are the command line, the fields of its YAML and the layout of a run's folder. Everything else is internal and may
change with any release. Before 1.0 a minor release may change what is public too; the changelog then says so.
"""

__version__ = "0.1.0"
