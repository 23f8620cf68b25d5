"""Errors that vidkv raises on purpose.

    VidkvError
    ├── InputError          a value the user gave cannot be used (also a ValueError)
    │   ├── PromptError     the text cannot be turned into a prompt for this model
    │   └── CacheSpecError  a cache setting that contradicts itself or the model
    ├── CheckpointError     weights or configuration missing, damaged or of the wrong shape
    ├── StateError          a saved rollout cannot be used here
    ├── OutputError         a file or folder cannot be written
    ├── ResourceError       the machine has too little memory
    ├── CacheStateError     the cache was driven in an order its contract forbids
    ├── NumericsError       NaN or Inf in the latents
    └── Cancelled           the caller asked the rollout to stop

Every message names the offending value and says what to do about it; the command line prints the
message alone and exits with 2.
"""

from __future__ import annotations


class VidkvError(Exception):
    """Base of every error that vidkv raises on purpose."""


class InputError(VidkvError, ValueError):
    """A value given by the user cannot be used."""


class PromptError(InputError):
    """The text cannot be turned into a prompt for this model."""


class CacheSpecError(InputError):
    """A cache setting contradicts itself, another setting or the model."""


class CheckpointError(VidkvError):
    """Weights or a configuration are missing, damaged or of the wrong shape."""


class StateError(VidkvError):
    """A saved rollout cannot be used here."""


class OutputError(VidkvError):
    """A file or folder cannot be written."""


class ResourceError(VidkvError):
    """The machine has too little memory."""


class CacheStateError(VidkvError):
    """The cache was driven in an order that its contract forbids."""


class NumericsError(VidkvError):
    """NaN or Inf appeared in the latents."""


class Cancelled(VidkvError):
    """The caller asked the rollout to stop."""
