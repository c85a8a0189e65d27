"""Searches of hyper-parameters over many training runs."""
