"""Figures of a run. Matplotlib's objects are used directly: nothing touches pyplot's global state."""

from __future__ import annotations

from mtbert.evaluation.plots.run_plots import write_plots

__all__ = ["write_plots"]
