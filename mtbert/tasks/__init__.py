"""Task definitions: what a task's tables look like, how its labels are read and how it is scored."""

from __future__ import annotations

from mtbert.tasks.registry import TASKS, Kind, Task, get_task, register

__all__ = ["TASKS", "Kind", "Task", "get_task", "register"]
