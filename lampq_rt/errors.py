"""Everything that can go wrong because of what came in. One line each: the thing, what came, what is allowed.

`LampqError` is the root; the command line prints its text and exits with status 2. Each subclass is a `ValueError` too
where the caller passed a wrong value, so that `except ValueError` works as Python users expect.
"""

from __future__ import annotations


class LampqError(Exception):
    """Root of the errors that a user can cause and mend."""


class ModelError(LampqError, ValueError):
    """The model cannot be used: not a known architecture, unknown name, or nothing in it to quantise."""


class FormatError(LampqError, ValueError):
    """A number format that does not exist or that the backend does not execute at that site."""


class PlanError(LampqError, ValueError):
    """A plan that is malformed, or made for other weights or another model."""


class CheckpointError(LampqError, ValueError):
    """A checkpoint that is truncated, altered, hostile, or that cannot be written or rebuilt."""


class DataError(LampqError, ValueError):
    """Images or labels that are missing, unreadable or not finite."""


class BudgetError(LampqError, ValueError):
    """A budget that no assignment of bits can meet, or that has an unknown unit."""


class TableError(LampqError, ValueError):
    """A latency table that is malformed, cannot be written, or lacks what a prediction needs."""


class StorageError(LampqError, OSError):
    """The temporary folder cannot take what a calibration keeps there."""


class BackendError(LampqError, RuntimeError):
    """The machine cannot run what was asked: no GPU, too old a GPU, or a missing instruction set."""


class UnknownNameError(LampqError, ValueError):
    """A name that no registry entry carries."""
