"""Errors that a user can mend: entry points print them in one message and exit with code 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake outside the program (a file, a value, a full disk) with a message that says how to mend it."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value that cannot work: the message names the field, the value and what is possible."""


class DataError(UserError):
    """A table or an example that cannot be used: the message names the file, the line and the reason."""


class ModelFileError(UserError):
    """A pretrained model that is missing, damaged or of another architecture."""


class ExportError(UserError):
    """A run that another library's format cannot carry: the message names the setting and what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read."""


class NonFiniteError(UserError):
    """A loss or a gradient became infinite or NaN: the message names the task, the step and the examples."""


class Interrupted(UserError):
    """Training was asked to stop (Ctrl-C, SIGTERM) and left a checkpoint to resume from."""

    exit_code = 130


class RankError(UserError):
    """Another rank of a run failed or is gone: the message names the rank and the cause."""
