"""Members: who is asking, with which weight, and within which limits.

Theory of operation. All members and keys are held in memory; the store is written first, so what
is answered has lasted, and changes are made one after the other. A key is found by its keyed hash
in one dict look-up; no secret is ever compared. Keys that have ended stay listed until their place
is needed: a wall clock that is wrong takes nothing away for good. A reservation checks and takes on
the whole path from organisation to person between two awaits, so two requests can never both take
the last place; several places are taken together, or none of them.

What an organisation contributes adds to its weight (`contribution`); listeners, and whoever asks
for `weight`, are told the sum.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from anser.config import MemberSettings
from anser.core import limits
from anser.core.allowance import DAY_S, Allowance
from anser.core.errors import (
    Conflict,
    InvalidField,
    LimitReached,
    NotFound,
    Overloaded,
    Unauthenticated,
)
from anser.core.members import (
    ANONYMOUS,
    Key,
    Limits,
    Member,
    Scope,
    ancestry,
    bucket_of,
    check_member_id,
    hash_key,
    key_text,
)
from anser.ports import Clock, MemberStore
from anser.services.reservation import Account, Reservation

__all__ = ["ANONYMOUS_KEY", "OWNER", "Members", "Principal", "Reservation", "Spent"]

OWNER = "local/default/owner"
ANONYMOUS_KEY = "anonymous"  # for clients that cannot leave the key out
_WEIGHT = 1_000
_Path = tuple[Account, ...]  # from the organisation down, its own one with the defaults last


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who is asking: a member, by which key, if any."""

    member: str
    key: str | None
    scope: Scope
    anonymous: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Tokens that a member took before this platform started."""

    member: str
    tokens: int
    ago_s: float


@dataclass(slots=True)
class Members:
    """The members of this platform and what opens it for them."""

    store: MemberStore
    clock: Clock
    pepper: bytes
    settings: MemberSettings
    anonymous: bool
    _members: dict[str, Member] = field(default_factory=dict[str, Member])
    _keys: dict[str, Key] = field(default_factory=dict[str, Key])
    _by_hash: dict[bytes, Key] = field(default_factory=dict[bytes, Key])
    _accounts: dict[tuple[str, bool], Account] = field(
        default_factory=dict[tuple[str, bool], Account]
    )
    _paths: dict[str, _Path] = field(default_factory=dict[str, "_Path"])  # of known accounts
    _added: dict[str, int] = field(default_factory=dict[str, int])  # weight, by contribution
    _listeners: list[Callable[[str, int], None]] = field(
        default_factory=list[Callable[[str, int], None]]
    )
    _changing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __repr__(self) -> str:
        return f"<Members {len(self._members)} keys={len(self._keys)} open={len(self._accounts)}>"

    def validate(self) -> None:
        """Assert the invariants: every parent exists, every key's member exists."""
        for member in self._members:
            assert all(above in self._members for above in ancestry(member)), member
        assert all(key.member in self._members for key in self._by_hash.values())
        for account in self._accounts.values():
            account.allowance.validate()
        assert self._added.keys() <= self._members.keys()
        assert all(self._added.values())

    async def load(self) -> None:
        """Read the store; make the owner of a new platform."""
        for member in await self.store.members():
            self._members[member.id] = member
        anonymous = Member(id=ANONYMOUS, weight=self.settings.anonymous_weight)
        self._members[ANONYMOUS] = anonymous
        for key in await self.store.keys():
            self._remember(key)
        for member_id in ancestry(OWNER):
            if member_id not in self._members:
                await self.add_member(member_id)
        for member in self._members.values():
            self._tell(member)

    def subscribe(self, listener: Callable[[str, int], None]) -> None:
        """Have `listener(member, weight)` called now for each member and at each change."""
        self._listeners.append(listener)
        for member in self._members.values():
            listener(member.id, self.weight(member.id))

    def authenticate(self, bearer: str | None, *, peer: str) -> Principal:
        """Who asks with this key from this address. Raises Unauthenticated."""
        if bearer is None or bearer == ANONYMOUS_KEY:
            return self._anonymous(peer)
        if len(bearer) > limits.KEY_CHARS_MAX:
            raise Unauthenticated("That is not a key of this platform.")
        key = self._by_hash.get(hash_key(bearer, pepper=self.pepper))
        if key is None or not key.valid(self.clock.wall()):
            raise Unauthenticated("This key is unknown, revoked or expired.")
        return Principal(member=key.member, key=key.id, scope=key.scope, anonymous=False)

    def _anonymous(self, peer: str) -> Principal:
        if not self.anonymous:
            message = "This platform wants a key: send 'Authorization: Bearer hf_...'."
            raise Unauthenticated(message)
        member = bucket_of(peer, pepper=self.pepper)
        return Principal(member=member, key=None, scope=Scope.USE, anonymous=True)

    def members(self) -> list[Member]:
        """All members, by id."""
        return sorted(self._members.values(), key=lambda member: member.id)

    def check_known(self, member: str) -> None:
        """Raise NotFound unless there is such a member; all anonymous networks count as there."""
        if member not in self._members and not member.startswith(f"{ANONYMOUS}/"):
            raise NotFound(f"There is no member {member[:64]!r}.", param="member")

    def weight(self, member: str) -> int:
        """The member's weight among its siblings, in thousandths, with what it contributes."""
        known = self._members.get(member)
        own = _WEIGHT if known is None else known.weight
        return own + self.added_weight(member)

    def added_weight(self, member: str) -> int:
        """How much of the member's weight is for what it contributes, in thousandths."""
        return self._added.get(member, 0)

    def set_added_weight(self, member: str, added: int) -> None:
        """Let its contribution add so much to a member's weight; who is unknown is passed over."""
        known = self._members.get(member)
        if known is not None and added != self.added_weight(member):
            self._added[member] = added
            if not added:
                del self._added[member]
            self._tell(known)

    def check_owner(self, member: str) -> None:
        """Raise NotFound unless nodes may be of this member."""
        if member not in self._members:
            message = f"There is no member {member!r}. Add it first: anser member add {member}"
            raise NotFound(message, param="member")

    async def add_member(
        self, member: str, *, weight: int = _WEIGHT, member_limits: Limits | None = None
    ) -> Member:
        """Add a member below one that exists. Raises InvalidField, NotFound, Conflict."""
        added = Member(
            id=check_member_id(member),
            weight=weight,
            limits=member_limits or Limits(),
            created_at=self.clock.wall(),
        )
        async with self._changing:
            self._check_free(member)
            await self.store.put_member(added)
            self._members[member] = added
        self._forget(member)
        self._paths.clear()  # those below it began without it
        self._tell(added)
        return added

    def _check_free(self, member: str) -> None:
        """Whether a member of this name may be added. Raises NotFound, Conflict, Overloaded."""
        path = ancestry(member)
        if member in self._members:
            raise Conflict(f"The member {member} exists already.", param="member")
        if path[0] == ANONYMOUS:
            raise Conflict("The anonymous member has no named members.", param="member")
        if len(path) > 1 and path[-2] not in self._members:
            raise NotFound(f"Add {path[-2]} first: a member's parent must exist.", param="member")
        if len(self._members) >= limits.MEMBERS_MAX:
            raise Overloaded(f"This platform holds at most {limits.MEMBERS_MAX} members.")

    async def set_member(
        self, member: str, *, weight: int | None = None, changes: Mapping[str, int | None]
    ) -> Member:
        """Change a member's weight, and the limits that `changes` names; None takes one away.

        What its requests have used and hold stays counted. Raises NotFound, Conflict.
        """
        async with self._changing:
            before = self._members.get(member)
            if before is None:
                raise NotFound(f"There is no member {member}.", param="member")
            if member == ANONYMOUS:
                raise Conflict("The anonymous member is set by members.* settings.", param="member")
            changed = replace(
                before,
                weight=before.weight if weight is None else weight,
                limits=replace(before.limits, **changes),
            )
            await self.store.put_member(changed)
            self._members[member] = changed
        for leaf in (True, False):
            account = self._accounts.get((member, leaf))
            if account is not None:
                limits_now = self._limits(member, leaf=leaf)
                account.allowance.change(limits_now, self.clock.now())
        self._tell(changed)
        return changed

    def take_up_limits(self) -> None:
        """The settings' limits have changed; what requests have used and hold stays counted."""
        now = self.clock.now()
        for (member, leaf), account in self._accounts.items():
            account.allowance.change(self._limits(member, leaf=leaf), now)

    def keys(self, member: str | None = None) -> list[Key]:
        """The keys of one member, or all, the oldest first."""
        found = (key for key in self._keys.values() if member in (None, key.member))
        return sorted(found, key=lambda key: (key.created_at, key.id))

    async def create_key(
        self,
        member: str,
        *,
        label: str = "",
        scope: Scope = Scope.USE,
        lifetime_s: float | None = None,
    ) -> tuple[str, Key]:
        """Make a key; its text is returned here and never again. Raises NotFound, Overloaded."""
        if member not in self._members or member == ANONYMOUS:
            raise NotFound(f"There is no member {member}.", param="member")
        text, wall = key_text(secrets.token_bytes(32)), self.clock.wall()
        key = Key(
            id="key_" + secrets.token_hex(6),
            hash=hash_key(text, pepper=self.pepper),
            member=member,
            label=label,
            scope=scope,
            created_at=wall,
            expires_at=None if lifetime_s is None else wall + lifetime_s,
        )
        async with self._changing:
            await self._make_room(wall)
            await self.store.put_key(key)
            self._remember(key)
        return text, key

    async def _make_room(self, wall: float) -> None:
        """Where no more keys can be held, forget the one that ended first. Raises Overloaded."""
        if len(self._keys) < limits.KEYS_MAX:
            return
        ended = (key for key in self._keys.values() if not key.valid(wall))
        first = min(ended, key=_ended_at, default=None)
        if first is None:
            raise Overloaded(f"This platform holds at most {limits.KEYS_MAX} keys.")
        await self.store.forget_keys((first.id,))
        self._by_hash.pop(self._keys.pop(first.id).hash, None)

    async def revoke_key(self, key_id: str) -> Key:
        """Close a key for good; revoking it again changes nothing. Raises NotFound."""
        async with self._changing:
            key = self._keys.get(key_id)
            if key is None:
                raise NotFound(f"There is no key {key_id}.", param="key")
            if key.revoked_at is None:
                key = replace(key, revoked_at=self.clock.wall())
                await self.store.put_key(key)
                self._remember(key)
        return key

    def reserve(self, member: str, *, prompt_tokens: int, output_tokens_max: int) -> Reservation:
        """Take a place for one request in the limits of the whole path, or raise LimitReached.

        Tokens taken are the prompt's estimate and the shorter of the request's maximum and the
        member's usual answer; `Reservation.settle` corrects them.
        """
        now = self.clock.now()
        path = self._path(member)
        tokens = prompt_tokens + min(output_tokens_max, round(path[-1].output_tokens))
        for name, account in zip(_public_names(member), path, strict=True):
            account.allowance.check(name, tokens=tokens, now=now)
        for account in path:
            account.allowance.take(tokens, now)
        return Reservation(self, member, tokens, path)

    def reserve_all(
        self, member: str, tokens: Sequence[tuple[int, int]], *, param: str | None = None
    ) -> list[Reservation]:
        """A place for each request of one call, by its prompt and its longest answer; or none.

        Token limits take the call as one request: it fits when they are full, however long.
        Raises LimitReached, or InvalidField for `param` where so many can never have a place.
        """
        most = self._places_max(member)
        if len(tokens) > most:
            message = (
                f"{_public_name(member)} may have {most} requests waiting;"
                f" this call is {len(tokens)} of them. Send fewer in one call."
            )
            raise InvalidField(message, param=param)
        now, path = self.clock.now(), self._path(member)
        usual = round(path[-1].output_tokens)
        sizes = [prompt + min(output, usual) for prompt, output in tokens]
        for name, account in zip(_public_names(member), path, strict=True):
            account.allowance.check(name, tokens=sum(sizes), now=now)
        places: list[Reservation] = []
        try:
            while len(places) < len(sizes):
                places.append(self.reserve(member, prompt_tokens=0, output_tokens_max=0))
        except LimitReached:
            for place in places:
                place.withdraw()
            raise
        for place, size in zip(places, sizes, strict=True):
            place.tokens = size
            for account in path:
                account.allowance.adjust(size, now)
        return places

    def settle(self, reservation: Reservation, tokens: int) -> None:
        """Correct a reservation to what its request took; called once, by the reservation."""
        now, path = self.clock.now(), reservation.accounts()
        for account in path:
            account.allowance.open -= 1
            account.allowance.adjust(tokens - reservation.tokens, now)
        self._forget_idle(reservation.member, path[-1])

    def _places_max(self, member: str) -> int:
        """How many requests may wait at once, nothing else being in flight."""
        bounds = (
            most
            for account in self._path(member)
            for most in (
                account.allowance.limits.queued_max,
                account.allowance.limits.in_flight_max,
            )
            if most is not None
        )
        return min(bounds)

    @property
    def counts_days(self) -> bool:
        """Whether anybody has a daily limit."""
        own = any(member.limits.tokens_per_day for member in self._members.values())
        return own or self.settings.tokens_per_day > 0

    def restore_days(self, spent: Iterable[Spent]) -> None:
        """After a restart: take what was spent in the last days, the oldest first, once more.

        Nobody knows how full a bucket was before: it begins empty, two days ago, and since only
        what fitted was admitted, no more is taken than there is. So nobody gains by a restart.
        """
        now = self.clock.now()
        taken = [
            (bucket, each.tokens, now - each.ago_s)
            for each in spent
            for account in self._path(each.member)
            if (bucket := account.allowance.day) is not None
        ]
        for bucket, _, _ in taken:
            bucket.level, bucket.at = 0.0, now - 2 * DAY_S
        for bucket, tokens, at in taken:
            bucket.take(min(tokens, max(0, math.floor(bucket.available(at)))), at)

    def limits_left(self, member: str) -> dict[str, str]:
        """The x-ratelimit headers of this member's tightest limits."""
        return self.headers(self._path(member))

    def headers(self, path: tuple[Account, ...]) -> dict[str, str]:
        """The x-ratelimit headers for the tightest request and token limits on a path."""
        now, headers = self.clock.now(), dict[str, str]()
        rooms = [
            (most - account.allowance.open, most)
            for account in path
            if (most := account.allowance.limits.in_flight_max) is not None
        ]
        if rooms:
            remaining, most = min(rooms)
            headers["x-ratelimit-limit-requests"] = str(most)
            headers["x-ratelimit-remaining-requests"] = str(max(0, remaining))
        buckets = [
            (bucket.available(now) / bucket.limit, bucket)
            for account in path
            for bucket in (account.allowance.minute, account.allowance.day)
            if bucket is not None
        ]
        if buckets:
            _, bucket = min(buckets, key=lambda pair: pair[0])
            headers["x-ratelimit-limit-tokens"] = str(bucket.limit)
            headers["x-ratelimit-remaining-tokens"] = str(max(0, int(bucket.level)))
            headers["x-ratelimit-reset-tokens"] = f"{bucket.wait_s(bucket.limit, now):.3f}s"
        return headers

    def _path(self, member: str) -> tuple[Account, ...]:
        """The accounts that one request of `member` counts in, its own one with defaults last."""
        path = self._paths.get(member)
        if path is None:
            above = (self._account(each, leaf=False) for each in ancestry(member))
            path = self._paths[member] = (*above, self._account(member, leaf=True))
        return path

    def _account(self, member: str, *, leaf: bool) -> Account:
        account = self._accounts.get((member, leaf))
        if account is None:
            account = Account(Allowance(self._limits(member, leaf=leaf)))
            self._accounts[member, leaf] = account
        return account

    def _limits(self, member: str, *, leaf: bool) -> Limits:
        """A member's own limits, for itself and all below it; the settings' fill a leaf's gaps."""
        known, settings = self._members.get(member), self.settings
        own = Limits() if known is None else known.limits
        if not leaf:
            return own
        return Limits(
            in_flight_max=own.in_flight_max or settings.in_flight_max,
            queued_max=own.queued_max or settings.queued_max,
            tokens_per_minute=own.tokens_per_minute or settings.tokens_per_minute or None,
            tokens_per_day=own.tokens_per_day or settings.tokens_per_day or None,
        )

    def _forget_idle(self, member: str, account: Account) -> None:
        """An anonymous bucket without limits over time leaves nothing behind when it is idle."""
        allowance = account.allowance
        lasting = allowance.minute is not None or allowance.day is not None
        if not allowance.open and not lasting and member not in self._members:
            self._forget(member)

    def _forget(self, member: str) -> None:
        """Its own accounts begin anew when it asks again; those above it stay."""
        self._accounts.pop((member, True), None)
        self._accounts.pop((member, False), None)
        self._paths.pop(member, None)

    def _remember(self, key: Key) -> None:
        self._keys[key.id] = key
        if key.revoked_at is None:
            self._by_hash[key.hash] = key
        else:
            self._by_hash.pop(key.hash, None)

    def _tell(self, member: Member) -> None:
        for listener in self._listeners:
            listener(member.id, self.weight(member.id))


def _ended_at(key: Key) -> float:
    """When a key expired or was revoked, whichever came first."""
    return min(end for end in (key.revoked_at, key.expires_at, math.inf) if end is not None)


@lru_cache(maxsize=4_096)
def _public_names(member: str) -> tuple[str, ...]:
    """The names of the accounts on a member's path, its own one last, in messages."""
    return tuple(map(_public_name, (*ancestry(member), member)))


def _public_name(member: str) -> str:
    """A member's name in messages; an anonymous bucket's number is nobody's business."""
    anonymous = ancestry(member)[0] == ANONYMOUS
    return "Anonymous use from your network" if anonymous else member
