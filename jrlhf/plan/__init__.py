"""Compiles stages for real or simulated devices and predicts memory, traffic, time and the largest batch."""

from jrlhf.plan.run import run_plan

__all__ = ["run_plan"]
