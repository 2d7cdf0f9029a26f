"""Examines a model's file before an engine is let near it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from anser.adapters.template_check import check_template
from anser.core import limits
from anser.core.errors import ModelFileError
from anser.core.gguf import Header, HeaderIncomplete, parse_header

__all__ = ["examine"]

_FIRST_BYTES = 2 * 1024 * 1024


async def examine(path: Path) -> Header:
    """The header of a GGUF file that can be loaded safely. Raises ModelFileError."""
    header = await asyncio.to_thread(_read, path)
    if header.chat_template is not None:
        await check_template(header.chat_template)
    return header


def _read(path: Path) -> Header:
    """Read as much as the header needs, and never more than a header may have."""
    try:
        file_bytes = path.stat().st_size
        wanted = _FIRST_BYTES
        with path.open("rb") as file:
            while True:
                prefix = file.read(wanted)
                try:
                    return parse_header(prefix, file_bytes=max(file_bytes, len(prefix)))
                except HeaderIncomplete:
                    if len(prefix) < wanted or wanted >= limits.GGUF_HEADER_BYTES_MAX:
                        break
                file.seek(0)
                wanted = min(wanted * 4, limits.GGUF_HEADER_BYTES_MAX)
    except OSError as error:
        raise ModelFileError(f"The model's file cannot be read: {error.strerror}.") from error
    raise ModelFileError("The model file's header is longer than any that is known.")
