"""Sampling, scoring, reading, evaluation and planning, for all stages that learn from their policy's own answers."""
