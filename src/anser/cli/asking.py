"""One question to a platform, for commands that need no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anser.cli.common import Place, run

__all__ = ["ask"]


def ask(
    place: Place,
    method: str,
    path: str,
    *,
    query: Mapping[str, str | float] | None = None,
    body: Mapping[str, object] | None = None,
) -> dict[str, Any]:
    """The answer of the platform at `place` to one question. Raises AnserError."""
    from anser.cli.control import connect

    async def once() -> dict[str, Any]:
        async with connect(place) as control:
            return await control.ask(method, path, query=query, body=body)

    return run(once())
