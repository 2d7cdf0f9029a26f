"""`/v1/blobs/{sha256}`: the files of models that run here, for other platforms.

Only what the hub knows by its digest is served, and only under licences that permit to pass it on.
The digest is the name, so who fetches need not trust this platform.
"""

from __future__ import annotations

import re

from starlette.responses import FileResponse

from anser.api.exchange import Exchange
from anser.core.errors import NotFound, RequestError
from anser.services.members import Principal

__all__ = ["LICENCES", "send_blob"]

LICENCES = frozenset({"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "CC-BY-4.0"})
"""SPDX identifiers of licences under which a model's files may be passed on as they are."""

_PREFIX = "/v1/blobs/"
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


async def send_blob(exchange: Exchange, _: Principal) -> None:
    """GET /v1/blobs/{sha256}: the file, or the one part that `range` asks for. Raises NotFound."""
    sha256 = exchange.scope["path"].removeprefix(_PREFIX)
    hub = exchange.services.hub
    known = [
        model
        for model in hub.models()
        if _SHA256.match(sha256) and model.file.sha256 == sha256 and model.licence in LICENCES
    ]
    path = hub.find(known[0]) if known else None
    if path is None:
        raise NotFound("There is no such file here.")
    if "," in (exchange.header(b"range") or ""):
        raise RequestError("Ask for one range at a time.")
    headers = {"etag": f'"{sha256}"', "cache-control": "public, max-age=31536000, immutable"}
    answer = FileResponse(path, media_type="application/octet-stream", headers=headers)
    await exchange.delegate(answer)
