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
    """A prior that is missing, cannot be read, does not match its own configuration, or cannot be used as asked.

    It counts as wrong usage (exit code 2): the same command would fail again, so a scheduler must not retry it.
    """

    exit_code = 2


class CheckpointError(DistvsdError):
    """A checkpoint that is missing, damaged, changed, or of another run."""


class RankError(DistvsdError):
    """Ranks that disagree, do not answer, or were started wrongly."""


class BackendError(DistvsdError):
    """A requested library or device that is missing or does not support the request."""


class RunError(DistvsdError):
    """A run directory that cannot be used: locked by another process, not writable, or holding something else."""


class DivergedError(DistvsdError):
    """Training that cannot go on: too many particles, or the score network, are not finite any more."""
