"""The few exceptions whose message is written for the user.

The command line prints the message as one sentence and exits with 1; anything else is a bug and keeps its traceback.
Wrong settings are plain ``ValueError`` raised by the config that holds them, and exit with 2.
"""


class DitcliError(Exception):
    """Something the user can mend: the message says what was wrong, with the value, and what to do next."""


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
