"""Methods that are settings of a stage and no stages of their own, for whoever looks for one by its name.

Imports no JAX.
"""

from typing import get_args, get_type_hints

from jrlhf.config.stages import DPOConfig

GROUP_METHODS = ("rloo", "dr_grpo", "dapo", "gspo", "cispo", "gdpo")
"""The methods in the table of docs/grpo.md, except GRPO."""


def method_advice(name: str) -> str:
    """Return what to run for a method that is no stage, such as kto; an empty text for any other name."""
    method = name.lower().replace("-", "_").replace(".", "").replace(" ", "_")
    losses: tuple[str, ...] = get_args(get_type_hints(DPOConfig)["loss"])
    # The default loss is DPO itself.
    if method in losses and method != DPOConfig().loss:
        return f"{name} is the stage dpo with loss: {method} (docs/dpo.md)"
    return f"{name} is the stage grpo with other settings (docs/grpo.md)" if method in GROUP_METHODS else ""
