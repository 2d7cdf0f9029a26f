"""`anser usage` and `anser receipt`: what was used, and proof of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from anser.cli.asking import ask
from anser.cli.common import (
    ANYWHERE,
    OPTIONS,
    PLAIN,
    STANDARD_INPUT,
    Anywhere,
    Duration,
    Place,
    Shaped,
    quoted,
    run,
)
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, print_table, safe
from anser.core.errors import InvalidField, Unavailable

__all__ = ["receipt_app", "usage"]

receipt_app = App(
    name="receipt",
    help="Receipts: the signed record that each request leaves.",
    sort_key=10,
    group_parameters=OPTIONS,
)
_SUMS = (
    "requests",
    "failed",
    "cancelled",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
)
_WEEK_S = 604_800.0
_MICRO = 1_000_000
_Since = Annotated[Duration, Parameter(show_default=False)]
_Output = Annotated[Path | None, Parameter(alias="-o")]


def usage(
    member: str | None = None,
    /,
    *,
    since: _Since = _WEEK_S,
    fairness: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    at: Anywhere = ANYWHERE,
) -> None:
    """Show requests and tokens by member and model, or how fairly the pool is shared now.

    Example: `anser usage physics --since 30d`

    Parameters
    ----------
    member
        Only this member and all below it.
    since
        How far back: 90s, 15m, 12h, 30d, 2w; one week if not given.
    fairness
        Instead: shares against entitlements, of the last five minutes.
    """
    if fairness:
        _show_fairness(at)
        return
    query: dict[str, str | float] = {"since_s": since}
    if member is not None:
        query["member"] = member
    found = ask(at, "GET", "/v1/usage", query=query)
    if at.json:
        print_json(found)
        return
    names = ("member", "model", *_SUMS)
    rows = [tuple(row[name] for name in names) for row in found["usage"]]
    print_table(tuple(name.replace("_tokens", "") for name in names), rows)


def _show_fairness(at: Place) -> None:
    """Every row for operators, one's own path for others, and all in one figure."""
    from anser.cli.control import running

    if not at.url and not run(running(at.load().config)):
        raise Unavailable(tr("top.none"))
    found = ask(at, "GET", "/v1/fairness")
    if at.json:
        print_json(found)
        return
    rows = found.get("members", found["levels"])
    names = ("member", "weight", "contributed", "share", "due", "queued", "running")
    print_table(names, [_fair_row(row) for row in rows])
    print_line()
    whole = found["all"]
    jain, gap, bound = whole["jain"], whole["gap_micro_credits"], whole["bound_micro_credits"]
    even = "-" if jain is None else f"{jain:.3f}"
    print_line(tr("usage.even", members=whole["members"], jain=even))
    if gap is not None:
        print_line(tr("usage.gap", gap=f"{gap / _MICRO:,.0f}", bound=f"{bound / _MICRO:,.0f}"))


def _fair_row(row: dict[str, Any]) -> tuple[object, ...]:
    share = None if row["share"] is None else f"{row['share']:.1%}"
    due, weight = f"{row['entitlement']:.1%}", f"{row['weight'] / 1_000:g}"
    given = row["contribution"]
    contributed = None if given is None else f"+{given['weight'] / 1_000:g} ({given['part']:.1%})"
    places = row.get("queued"), row.get("running")
    return row["member"], weight, contributed, share, due, *places


@receipt_app.command(name="get")
def get(request: str, /, *, output: _Output = None, at: Anywhere = ANYWHERE) -> None:
    """Fetch the receipt of one request, to keep or to check elsewhere.

    Example: `anser receipt get chatcmpl-1f2e --output receipt.json`

    Parameters
    ----------
    request
        The request's id: the answer's `id`, or its x-request-id header.
    output
        File to write it to; without it, to standard output.
    """
    found = ask(at, "GET", f"/v1/receipts/{quoted(request)}")
    if output is None:
        print_json(found)
        return
    import json

    output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if at.json:
        print_json({"file": str(output)})
    else:
        print_line(tr("receipt.written", file=safe(str(output))))


@receipt_app.command(name="verify")
def verify(file: Path, /, *, public_key: str | None = None, at: Shaped = PLAIN) -> None:
    """Check a receipt file, offline: that nothing in it changed since it was signed.

    Example: `anser receipt verify receipt.json --public-key 3b6a27bc...`

    Parameters
    ----------
    file
        The receipt, as `anser receipt get` wrote it; - reads standard input.
    public_key
        The platform's key in hex, from its /v1/signing-key. Without it the file is checked against
        the key that it names itself, which shows that it is whole, not who signed it.
    """
    from anser.core.limits import RECEIPT_BYTES_MAX
    from anser.services.receipt_file import verify as check

    named = None if public_key is None else _key_bytes(public_key)
    if str(file) == STANDARD_INPUT:
        document = sys.stdin.buffer.read(RECEIPT_BYTES_MAX + 1)
    else:
        with file.open("rb") as opened:
            document = opened.read(RECEIPT_BYTES_MAX + 1)
    receipt = check(document, public_key=named)
    signer = "given" if named is not None else "own"
    if at.json:
        shown = {"request": receipt.request, "member": receipt.member, "model": receipt.model}
        print_json({"valid": True, "checked_against": signer, **shown})
        return
    tokens = receipt.usage.prompt_tokens + receipt.usage.completion_tokens
    text = tr(f"receipt.valid_{signer}", request=safe(receipt.request), member=safe(receipt.member))
    print_line(text)
    print_line(tr("receipt.says", model=safe(receipt.model), tokens=tokens))


def _key_bytes(text: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise InvalidField(tr("receipt.public_key"), param="public_key")
    return key
