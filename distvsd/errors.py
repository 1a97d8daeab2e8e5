"""The errors a user can meet. Each message is one paragraph: what, where, why, and what to do next."""

from __future__ import annotations

PREEMPTED = 3  # exit code of a run that was told to stop and can be continued


class DistvsdError(Exception):
    """Base of every error this program raises on purpose; the command line prints it without a traceback.

    exit_code: what the process ends with when the error reaches the command line.
    """

    exit_code: int = 1


class ConfigError(DistvsdError):
    """A configuration that cannot be run; the message holds every mistake that was found, one a line."""

    exit_code = 2


class UsageError(DistvsdError):
    """A command called in a way it does not understand."""

    exit_code = 2


class PriorError(DistvsdError):
    """A prior that is not there, cannot be read, does not hold what its configuration promises, or cannot be used as
    asked. Wrong usage: the same command with the same folder would end the same way, so nothing should try again."""

    exit_code = 2


class CheckpointError(DistvsdError):
    """A checkpoint that is missing, torn, altered, or belongs to another run."""


class RankError(DistvsdError):
    """Ranks that disagree, do not answer, or were started in a way that cannot work."""


class BackendError(DistvsdError):
    """An optional library or device that was asked for and is not there, or does not support what is asked."""


class RunError(DistvsdError):
    """A run directory that cannot be used: locked by another process, not writable, or holding something else."""


class DivergedError(DistvsdError):
    """Training that cannot go on: too many particles, or the score network, are no longer finite."""
