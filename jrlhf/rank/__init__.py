"""Ranking of answers by people: tasks, a page on this machine, stored decisions, and exported rankings. Imports no
JAX."""

from jrlhf.rank.tasks import Task, TaskError, distinct, read_tasks, task_key, task_line

__all__ = ["Task", "TaskError", "distinct", "read_tasks", "task_key", "task_line"]
