"""Scores, intervals, predictions, plots and reports: knows tasks, arrays and files, and no model."""
