"""Every stage compiled ahead of time for devices that need not be there: memory, traffic, time, the batch that fits."""

from jrlhf.plan.run import run_plan

__all__ = ["run_plan"]
