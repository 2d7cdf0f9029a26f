"""What nobody expected: logged with its way through the code, and told as the platform's fault."""

from __future__ import annotations

import traceback
from typing import cast

import structlog

from anser.core.errors import AnserError

__all__ = ["bug"]

_log = structlog.get_logger("anser.api")


def bug(error: BaseException | None, *, request: str = "") -> AnserError:
    """Log it, and return what its client is told."""
    _log.error("request failed", request=request, exception=_trace(error))
    return AnserError("The platform failed; its log tells more.")


def _trace(error: BaseException | None) -> str:
    """Where an error has come through; not its message, which could quote a prompt."""
    if error is None:
        return "cancelled"
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return "".join(map(_trace, group.exceptions))
    return "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__
