"""`anser why`: why a request waited, and why it went to the node that it went to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anser.cli.asking import ask
from anser.cli.common import ANYWHERE, Anywhere, quoted, run
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, safe
from anser.core.errors import Unavailable

__all__ = ["in_words", "why"]

_AT_ONCE_S = 0.001
_MICRO = 1_000_000


def why(request: str, /, *, at: Anywhere = ANYWHERE) -> None:
    """Tell why a request waited, and why it went to the node that it went to.

    Example: `anser why chatcmpl-1f2e`

    Parameters
    ----------
    request
        The request's id: the answer's `id`, or its x-request-id header.
    """
    from anser.cli.control import running

    if not at.url and not run(running(at.load().config)):
        raise Unavailable(tr("top.none"))
    found = ask(at, "GET", f"/v1/why/{quoted(request)}")
    if at.json:
        print_json(found)
        return
    for line in in_words(found):
        print_line(safe(line))


def in_words(found: dict[str, Any]) -> Iterator[str]:
    """What /v1/why says, line by line, for people."""
    yield tr("why.asked", request=found["request"], member=found["member"], model=found["model"])
    if found["waited_s"] < _AT_ONCE_S:
        yield tr("why.at_once")
    else:
        key = "why.waiting" if found["waiting"] else "why.waited"
        counts = {name: found[name] for name in ("queued", "queued_own")}
        yield tr(key, seconds=f"{found['waited_s']:,.3f}", **counts)
    for lease in found["leases"]:
        yield from _lease(lease, found["prompt_tokens"])
    if found["ended"] == "cancelled":
        yield tr("why.left")
    elif found["ended"] is not None:
        yield tr("why.refused", code=found["ended"])
        if found["retry_after_s"] is not None:
            yield tr("why.again", seconds=f"{found['retry_after_s']:,.0f}")


def _lease(lease: dict[str, Any], prompt_tokens: int) -> Iterator[str]:
    if lease.get("hedge"):
        yield tr("why.late")
    yield tr("why.node", node=lease["node"], reason=tr(f"why.rule_{lease['rule']}"))
    key, least = lease["key_micro_credits"], lease["least_key_micro_credits"]
    if key or least:
        credits = {"key": f"{key / _MICRO:,.3f}", "least": f"{least / _MICRO:,.3f}"}
        yield tr("why.keys", rivals=lease["rivals"], **credits)
    if lease["cached_tokens"]:
        yield tr("why.cached", cached=lease["cached_tokens"], prompt=prompt_tokens)
    else:
        yield tr("why.fresh")
    if lease["error"] == "hedged":
        yield tr("why.hedged")
    elif lease["error"] is not None and lease["delivered_tokens"]:
        yield tr("why.died", code=lease["error"], tokens=lease["delivered_tokens"])
    elif lease["error"] is not None:
        yield tr("why.failed", code=lease["error"])
