"""Sampling, scoring, reading and evaluation, for all stages that learn from their policy's own answers."""
