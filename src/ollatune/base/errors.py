"""Every error a user can cause, and the exit code it ends with.

    OllatuneError                  1   internal
    ├── UsageError                 2   wrong flag, config key or value
    ├── InputError                 3   bad or unsafe input: data, model file, checkpoint, template
    │   └── GGUFError              3   damaged or unsupported GGUF file (path, offset, field, reason)
    ├── ServiceError               4   Ollama, or another service that was required, cannot be reached or refused
    ├── StorageError               5   disk full, no permission, not a folder
    ├── DivergedError              6   loss or gradient is no longer finite
    ├── OutOfMemoryError           7   does not fit even at the smallest micro-batch
    ├── LockedError                8   another run owns the output folder
    ├── VerificationError          9   what is served is not what was trained
    ├── Interrupted          130/143   Ctrl-C or SIGTERM, state saved
    └── EndedElsewhereError            another process of the same run failed; with its code

A message says what was found, what was expected, where, and what to do next. `hint` holds the last of these, so
that a caller that knows more can replace it. Raise these anywhere; only `ollatune.cli` turns them into text.
"""

from __future__ import annotations

from pathlib import Path


class OllatuneError(Exception):
    """Base of all our errors. `str(error)` is the whole paragraph a user sees, hint included."""

    exit_code = 1
    is_quiet = False
    """Whether the message has been said already, by another process of the same run."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class UsageError(OllatuneError, ValueError):
    exit_code = 2


class InputError(OllatuneError, ValueError):
    exit_code = 3


class GGUFError(InputError):
    """A GGUF file that cannot be read safely. Every parser failure ends here and nowhere else."""

    def __init__(
        self, path: str | Path, offset: int | None, field: str, reason: str, *, hint: str = ""
    ) -> None:
        where = f"{path}" if offset is None else f"{path} at byte {offset}"
        super().__init__(f"{where}: {field}: {reason}.", hint=hint)
        self.path = str(path)
        self.offset = offset
        self.field = field
        self.reason = reason


class ServiceError(OllatuneError, ConnectionError):
    exit_code = 4


class StorageError(OllatuneError, OSError):
    exit_code = 5

    def __str__(self) -> str:  # OSError.__str__ would win otherwise
        return OllatuneError.__str__(self)


class DivergedError(OllatuneError, ArithmeticError):
    exit_code = 6


class OutOfMemoryError(OllatuneError, MemoryError):
    exit_code = 7


class LockedError(OllatuneError):
    exit_code = 8


class VerificationError(OllatuneError):
    exit_code = 9


class Interrupted(OllatuneError):
    """The run was asked to stop and has saved what it had. `signal_number` is 2 or 15."""

    def __init__(self, message: str, *, signal_number: int, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.exit_code = 128 + signal_number


class EndedElsewhereError(OllatuneError):
    """Another process of this run failed first and has said why; this one ends with the same code, silently."""

    is_quiet = True

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
