"""`anser member` and `anser key`: who may use the platform, and with what it opens."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from anser.cli.asking import ask
from anser.cli.common import ANYWHERE, OPTIONS, Anywhere, Duration, moment, quoted
from anser.cli.messages import tr
from anser.cli.output import print_json, print_line, print_table, safe
from anser.core.errors import InvalidField

__all__ = ["key_app", "member_app"]

member_app = App(
    name="member",
    help="Who may use the platform: organisations, projects, persons.",
    sort_key=10,
    group_parameters=OPTIONS,
)
key_app = App(
    name="key",
    help="Keys, which open the API for a member.",
    sort_key=10,
    group_parameters=OPTIONS,
)

_LIMITS = ("in_flight_max", "queued_max", "tokens_per_minute", "tokens_per_day")
_TIMES = ("created_at", "expires_at", "revoked_at")
_Count = Annotated[int | None, Parameter(validator=Number(gte=1))]
_CountOrNone = Annotated[int | None, Parameter(validator=Number(gte=0))]
_Weight = Annotated[float, Parameter(validator=Number(gte=0.001, lte=1_000_000))]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberLimits:
    """What a member and all below it may have; without an option, no limit of its own."""

    in_flight_max: _Count = None
    """Requests at once, waiting or running."""
    queued_max: _Count = None
    """Waiting requests at once."""
    tokens_per_minute: _Count = None
    """Tokens a minute."""
    tokens_per_day: _Count = None
    """Tokens a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberChanges:
    """The limits to change; 0 takes one away, and what is not given stays."""

    in_flight_max: _CountOrNone = None
    """Requests at once, waiting or running."""
    queued_max: _CountOrNone = None
    """Waiting requests at once."""
    tokens_per_minute: _CountOrNone = None
    """Tokens a minute."""
    tokens_per_day: _CountOrNone = None
    """Tokens a day."""


_NO_LIMITS = MemberLimits()
_NO_CHANGES = MemberChanges()


@member_app.command(name="add")
def add_member(
    member: str,
    /,
    *,
    weight: _Weight = 1.0,
    limits: Annotated[MemberLimits, Parameter(name="*")] = _NO_LIMITS,
    at: Anywhere = ANYWHERE,
) -> None:
    """Add an organisation, a project below one, or a person below that.

    Example: `anser member add physics/lattice --weight 2 --tokens-per-day 5000000`

    Parameters
    ----------
    member
        Its path: org, org/project or org/project/person.
    weight
        Its share among its siblings; 2 gets twice what 1 gets.
    """
    body = {"id": member, "weight": _thousandths(weight), "limits": asdict(limits)}
    added = ask(at, "POST", "/admin/v1/members", body=body)
    if at.json:
        print_json(added)
    else:
        print_line(tr("member.added", member=safe(str(added["id"]))))


@member_app.command(name="set")
def set_member(
    member: str,
    /,
    *,
    weight: _Weight | None = None,
    limits: Annotated[MemberChanges, Parameter(name="*")] = _NO_CHANGES,
    at: Anywhere = ANYWHERE,
) -> None:
    """Change a member's weight or limits, from now on; what is not given stays.

    A limit of 0 takes the limit away. What was used so far stays counted.

    Example: `anser member set physics --weight 3 --queued-max 0`

    Parameters
    ----------
    member
        Its path: org, org/project or org/project/person.
    weight
        Its share among its siblings; 2 gets twice what 1 gets.
    """
    changes = {name: most or None for name, most in asdict(limits).items() if most is not None}
    body: dict[str, object] = {"id": member, "limits": changes}
    if weight is not None:
        body["weight"] = _thousandths(weight)
    elif not changes:
        raise InvalidField(tr("member.nothing"), param="weight")
    changed = ask(at, "PATCH", "/admin/v1/members", body=body)
    if at.json:
        print_json(changed)
    else:
        print_line(tr("member.changed", member=safe(str(changed["id"]))))


def _thousandths(weight: float) -> int:
    """A weight as the API has it: whole thousandths, at least one."""
    return max(1, round(weight * 1_000))


@member_app.command(name="list")
def list_members(*, at: Anywhere = ANYWHERE) -> None:
    """List all members with their weights and limits.

    Example: `anser member list`
    """
    found = ask(at, "GET", "/admin/v1/members")
    if at.json:
        print_json(found)
        return
    columns = ("member", "weight", *(tr(f"member.{limit}") for limit in _LIMITS))
    rows = [
        (member["id"], member["weight"] / 1_000, *(member["limits"][limit] for limit in _LIMITS))
        for member in found["members"]
    ]
    print_table(columns, rows)


@key_app.command(name="create")
def create_key(
    member: str,
    /,
    *,
    label: Annotated[str, Parameter(show_default=False)] = "",
    expires: Duration | None = None,
    operator: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    at: Anywhere = ANYWHERE,
) -> None:
    """Make a key for a member. It is shown once, here, and stored only as a hash.

    Example: `anser key create physics/lattice --label laptop --expires 30d`

    Parameters
    ----------
    member
        Whose key it is.
    label
        A word to know it by.
    expires
        How long it opens: 90s, 15m, 12h, 30d, 2w. Without it, until it is revoked.
    operator
        Let it also operate the platform: members, keys, nodes, everybody's usage.
    """
    scope = "operate" if operator else "use"
    body = {"member": member, "label": label, "scope": scope, "expires_in_s": expires}
    made = ask(at, "POST", "/admin/v1/keys", body=body)
    if at.json:
        print_json(made)
    else:
        print_line(made["key"])
        print(tr("key.created", key=made["id"]), file=sys.stderr)


@key_app.command(name="list")
def list_keys(member: str | None = None, /, *, at: Anywhere = ANYWHERE) -> None:
    """List keys, without their texts.

    Example: `anser key list physics/lattice`

    Parameters
    ----------
    member
        Only the keys of this member.
    """
    found = ask(at, "GET", "/admin/v1/keys", query={} if member is None else {"member": member})
    if at.json:
        print_json(found)
        return
    columns = ("key", "member", "label", "scope", "created", "expires", "revoked")
    rows = [
        (
            key["id"],
            key["member"],
            key["label"],
            key["scope"],
            *(moment(key[at_]) for at_ in _TIMES),
        )
        for key in found["keys"]
    ]
    print_table(columns, rows)


@key_app.command(name="revoke")
def revoke_key(key_id: str, /, *, at: Anywhere = ANYWHERE) -> None:
    """Close a key for good.

    Example: `anser key revoke key_0f1e2d3c4b5a`

    Parameters
    ----------
    key_id
        The key's id, from `anser key list`; not its text.
    """
    revoked = ask(at, "DELETE", f"/admin/v1/keys/{quoted(key_id)}")
    if at.json:
        print_json(revoked)
    else:
        print_line(tr("key.revoked", key=safe(str(revoked["id"]))))
