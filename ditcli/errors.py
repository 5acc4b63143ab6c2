"""The few exceptions whose message is written for the user.

The command line prints the message and exits with the code that the class names; any other exception is a bug.
"""

from __future__ import annotations

from typing import ClassVar


class DitcliError(Exception):
    """Something the user can mend: the message says what was wrong, with the value, and what to do next."""

    exit_code: ClassVar[int] = 1


class SettingError(DitcliError, ValueError):
    """A setting out of range, unknown, or at odds with another."""

    exit_code = 2


class UnreadableImageError(DitcliError):
    """A file that is not a whole picture."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class DataError(DitcliError):
    """A data folder that holds no pictures, or whose labels contradict its pictures."""


class ModelNotFoundError(DitcliError):
    """A name that leads to no model, codec or run."""


class CheckpointError(DitcliError):
    """A checkpoint that is damaged, or not of the model it is loaded into."""


class ResumeError(DitcliError):
    """A run folder made with other settings than those asked for."""


class SavingError(DitcliError):
    """A checkpoint that cannot be written."""


class RunInUseError(DitcliError):
    """A run folder that another process is training in."""


class Interrupted(DitcliError):
    """Stopped by Ctrl-C or SIGTERM after saving; the message says how to go on."""

    exit_code = 130
