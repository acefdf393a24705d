"""Logging: one logger tree, a console handler on stderr, a file handler per run, secrets removed from both."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

from ollatune.base.files import make_folder, storage_error

LOGGER_NAME = "ollatune"

_SECRET_KEY = re.compile(r"(token|api_?key|password|passwd|secret|credential)", re.IGNORECASE)
_ASSIGNED_SECRET = re.compile(
    r"(?i)\b([\w.-]*(?:token|api_?key|password|passwd|secret)[\w.-]*\s*[=:]\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&]+)"
)
_URL_CREDENTIALS = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^/\s@]+@")
_BEARER = re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]{6,}")
MASK = "***"


def get_logger(name: str = "") -> logging.Logger:
    """The project's logger, or a child of it: `get_logger("training")`."""
    return logging.getLogger(f"{LOGGER_NAME}.{name}" if name else LOGGER_NAME)


def redact(text: str) -> str:
    """`text` without credentials: URL user-info, bearer tokens, `key=value` secrets, and the values of secret
    environment variables wherever they stand."""
    for name, value in os.environ.items():
        if len(value) >= 6 and _SECRET_KEY.search(name):
            text = text.replace(value, MASK)
    text = _URL_CREDENTIALS.sub(rf"\1{MASK}@", text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    return _ASSIGNED_SECRET.sub(rf"\1{MASK}", text)


class _RedactingFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def configure_logging(*, level: int = logging.INFO, is_main_process: bool = True) -> None:
    """Send our log records to stderr (warnings only from other ranks). Calling it again replaces the handler."""
    logger = get_logger()
    for handler in list(logger.handlers):
        if getattr(handler, "ollatune_console", False):
            logger.removeHandler(handler)
    console = logging.StreamHandler(sys.stderr)
    console.ollatune_console = True  # type: ignore[attr-defined]
    console.setLevel(level if is_main_process else logging.ERROR)
    console.setFormatter(_RedactingFormatter("%(message)s"))
    logger.addHandler(console)
    logger.setLevel(min(level, logging.DEBUG))
    logger.propagate = False


def add_log_file(path: Path) -> logging.Handler:
    """Also write every record, with time and level, to `path`. Raises StorageError.

    The caller removes the returned handler with `remove_log_file`.
    """
    make_folder(path.parent)
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise storage_error(error, path) from error
    handler.setFormatter(
        _RedactingFormatter(
            "%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S%z"
        )
    )
    handler.setLevel(logging.DEBUG)
    get_logger().addHandler(handler)
    return handler


def remove_log_file(handler: logging.Handler) -> None:
    """Close a handler made by `add_log_file`."""
    get_logger().removeHandler(handler)
    handler.close()
