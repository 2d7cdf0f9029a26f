"""The log: on standard error, one line each, for people on a terminal and as JSON elsewhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

from anser.cli.output import STDERR, safe

__all__ = ["log_to_stderr"]


def log_to_stderr(*, quiet: bool = False) -> None:
    """Send the log to standard error; with `quiet`, only what is wrong."""
    people = sys.stderr.isatty()
    renderer: Any = structlog.processors.JSONRenderer()
    if people:
        renderer = structlog.dev.ConsoleRenderer(pad_event_to=0)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if people else "iso", utc=not people),
            structlog.processors.format_exc_info,
            _harmless,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.WARNING if quiet else logging.INFO
        ),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", STDERR)),
    )


def _harmless(_logger: Any, _name: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    """No text of others may forge a line or drive the terminal."""
    return {
        key: safe(value, lines=key == "exception") if isinstance(value, str) else value
        for key, value in event.items()
    }
