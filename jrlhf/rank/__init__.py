"""People rank answers: tasks in, a page on this machine, decisions kept, rankings out. Imports no JAX."""

from jrlhf.rank.tasks import Task, TaskError, distinct, read_tasks, task_key, task_line

__all__ = ["Task", "TaskError", "distinct", "read_tasks", "task_key", "task_line"]
