"""The engine: one training step, the loop around it, and what a run leaves on disk."""

from __future__ import annotations
