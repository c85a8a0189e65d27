"""The optimizer's parameter groups and the learning-rate schedule."""

from __future__ import annotations
