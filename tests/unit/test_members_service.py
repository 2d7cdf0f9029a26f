"""services.members: who is asking, with which weight, within which limits."""

from __future__ import annotations

import asyncio

import pytest

from anser.adapters.memory import MemoryClock, MemoryStore
from anser.config import MemberSettings
from anser.core import limits
from anser.core.errors import (
    Conflict,
    LimitReached,
    NotFound,
    Overloaded,
    StoreFull,
    Unauthenticated,
)
from anser.core.members import ANONYMOUS, Key, Limits, Member, Scope
from anser.services.members import ANONYMOUS_KEY, OWNER, Members

pytestmark = pytest.mark.anyio


async def opened(
    *,
    store: MemoryStore | None = None,
    clock: MemoryClock | None = None,
    settings: MemberSettings | None = None,
    anonymous: bool = True,
) -> Members:
    members = Members(
        store or MemoryStore(),
        clock or MemoryClock(),
        b"p" * 32,
        settings or MemberSettings(),
        anonymous,
    )
    await members.load()
    return members


async def test_a_new_platform_has_an_owner_and_an_anonymous_member() -> None:
    """The first key needs a member; anonymous use has a weight of its own from the start."""
    members = await opened(settings=MemberSettings(anonymous_weight=250))
    names = [member.id for member in members.members()]
    assert names == ["anonymous", "local", "local/default", OWNER]
    assert members.weight(ANONYMOUS) == 250
    assert members.weight("anonymous/bucket-1") == 1_000
    members.validate()
    assert "Members 4" in repr(members)


async def test_a_key_opens_its_member_and_no_other() -> None:
    """A key's text is found by its keyed hash; one letter off opens nothing."""
    members = await opened()
    text, key = await members.create_key(OWNER, label="laptop")
    who = members.authenticate(text, peer="127.0.0.1")
    assert (who.member, who.key, who.scope, who.anonymous) == (OWNER, key.id, Scope.USE, False)
    for wrong in (text[:-1], text + "A", text[:-1] + chr(ord(text[-1]) ^ 1), "", "hf_", "a" * 300):
        with pytest.raises(Unauthenticated):
            members.authenticate(wrong, peer="127.0.0.1")


async def test_the_text_of_a_key_is_stored_nowhere() -> None:
    """Neither the store nor the members' memory holds what opens the door."""
    store = MemoryStore()
    members = await opened(store=store)
    text, _ = await members.create_key(OWNER)
    assert text not in repr(vars(store))
    assert text not in repr(members.keys())


async def test_a_key_ends_when_it_expires_or_is_revoked() -> None:
    """Expiry goes by the wall clock; revocation is at once and for good, also after a restart."""
    clock, store = MemoryClock(), MemoryStore()
    members = await opened(store=store, clock=clock)
    short, _ = await members.create_key(OWNER, lifetime_s=10.0)
    long, key = await members.create_key(OWNER)
    clock.advance(10.0)
    with pytest.raises(Unauthenticated):
        members.authenticate(short, peer="::1")
    assert members.authenticate(long, peer="::1").key == key.id
    revoked = await members.revoke_key(key.id)
    assert await members.revoke_key(key.id) == revoked
    with pytest.raises(Unauthenticated):
        members.authenticate(long, peer="::1")
    again = await opened(store=store, clock=clock)
    with pytest.raises(Unauthenticated):
        again.authenticate(long, peer="::1")
    assert again.keys() == members.keys()  # what no longer opens anything stays listed
    with pytest.raises(NotFound):
        await members.revoke_key("key_nobody")


async def test_keys_survive_a_restart() -> None:
    """What was shown once keeps opening the door."""
    store = MemoryStore()
    text, _ = await (await opened(store=store)).create_key(OWNER, scope=Scope.OPERATE)
    again = await opened(store=store)
    assert again.authenticate(text, peer="::1").scope is Scope.OPERATE
    assert len(again.keys(OWNER)) == 1
    assert again.keys("local") == []


async def test_anonymous_use_is_a_bucket_of_the_network_or_refused() -> None:
    """Without a key, or with the key `anonymous`, the network decides; where it is off, 401."""
    members = await opened()
    who = members.authenticate(None, peer="192.0.2.1")
    assert who.anonymous
    assert who.member.startswith("anonymous/bucket-")
    assert members.authenticate(ANONYMOUS_KEY, peer="192.0.2.9").member == who.member
    closed = await opened(anonymous=False)
    with pytest.raises(Unauthenticated, match="wants a key"):
        closed.authenticate(None, peer="192.0.2.1")


async def test_members_nest_below_those_that_exist() -> None:
    """A parent comes first, a name is taken once, and nobody joins the anonymous."""
    members = await opened()
    with pytest.raises(NotFound, match="Add lab first"):
        await members.add_member("lab/chat")
    await members.add_member("lab", weight=3_000)
    await members.add_member("lab/chat")
    with pytest.raises(Conflict):
        await members.add_member("lab")
    with pytest.raises(Conflict):
        await members.add_member("anonymous/x")
    with pytest.raises(NotFound):
        await members.create_key("nobody")
    with pytest.raises(NotFound):
        await members.create_key(ANONYMOUS)
    members.validate()


async def test_weights_are_told_to_who_listens() -> None:
    """The scheduler hears of each member that is there, and of each that is added."""
    members = await opened()
    heard: dict[str, int] = {}
    members.subscribe(heard.__setitem__)
    assert heard[OWNER] == 1_000
    await members.add_member("lab", weight=3_000)
    assert heard["lab"] == 3_000


async def test_a_changed_member_is_told_and_stored() -> None:
    """Weight and limits change one by one; what is not named stays, also after a restart."""
    store = MemoryStore()
    members = await opened(store=store)
    heard: dict[str, int] = {}
    members.subscribe(heard.__setitem__)
    await members.add_member("lab", member_limits=Limits(queued_max=7, tokens_per_day=9))
    await members.set_member("lab", weight=3_000, changes={"queued_max": None})
    changed = await members.set_member("lab", changes={"in_flight_max": 2})
    assert (changed.weight, heard["lab"]) == (3_000, 3_000)
    assert changed.limits == Limits(in_flight_max=2, tokens_per_day=9)
    assert changed in (await opened(store=store)).members()
    with pytest.raises(NotFound):
        await members.set_member("nobody", changes={})
    with pytest.raises(Conflict):
        await members.set_member(ANONYMOUS, weight=1, changes={})


async def test_a_changed_limit_holds_for_who_is_at_work() -> None:
    """It counts what is in flight already, for the member itself and for all below it."""
    members = await opened()
    await members.add_member("lab")
    await members.add_member("lab/a")
    held = members.reserve("lab/a", prompt_tokens=1, output_tokens_max=1)
    await members.set_member("lab", changes={"in_flight_max": 1})
    with pytest.raises(LimitReached):
        members.reserve("lab/a", prompt_tokens=1, output_tokens_max=1)
    held.settle(prompt_tokens=1, completion_tokens=1)
    members.reserve("lab/a", prompt_tokens=1, output_tokens_max=1)
    members.validate()


async def test_a_wrong_clock_at_the_start_costs_no_key() -> None:
    """A machine that boots a year ahead opens nothing then; set right, every key opens again."""
    clock, store = MemoryClock(), MemoryStore()
    text, _ = await (await opened(store=store, clock=clock)).create_key(OWNER, lifetime_s=86_400)
    clock.jump(365 * 86_400.0)
    members = await opened(store=store, clock=clock)
    with pytest.raises(Unauthenticated):
        members.authenticate(text, peer="::1")
    clock.jump(-365 * 86_400.0)
    for again in (members, await opened(store=store, clock=clock)):
        assert again.authenticate(text, peer="::1").member == OWNER


async def test_keys_have_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the limit the key that ended first gives way; where none has ended, none is made."""
    monkeypatch.setattr(limits, "KEYS_MAX", 3)
    clock, store = MemoryClock(), MemoryStore()
    members = await opened(store=store, clock=clock)
    _, lasting = await members.create_key(OWNER)
    _, short = await members.create_key(OWNER, lifetime_s=20.0)
    _, revoked = await members.create_key(OWNER)
    with pytest.raises(Overloaded, match="at most 3 keys"):
        await members.create_key(OWNER)
    clock.advance(10.0)
    await members.revoke_key(revoked.id)
    clock.advance(20.0)
    _, third = await members.create_key(OWNER)
    assert ids(members) == {lasting.id, short.id, third.id}
    _, fourth = await members.create_key(OWNER)
    again = await opened(store=store, clock=clock)
    assert ids(again) == {lasting.id, third.id, fourth.id}
    members.validate()


def ids(members: Members) -> set[str]:
    """The identifiers of all keys that are listed."""
    return {key.id for key in members.keys(None)}


async def test_what_the_store_refuses_does_not_exist() -> None:
    """A key or a member that could not be stored opens nothing and can be made later."""
    store = MemoryStore()
    members = await opened(store=store)
    _, key = await members.create_key(OWNER)
    store.fault = StoreFull("The disk is full.")
    with pytest.raises(StoreFull):
        await members.create_key(OWNER)
    with pytest.raises(StoreFull):
        await members.add_member("lab")
    with pytest.raises(StoreFull):
        await members.revoke_key(key.id)
    assert members.keys() == [key]
    store.fault = None
    await members.add_member("lab")
    members.validate()


class SlowStore(MemoryStore):
    """A store whose writes take a moment."""

    async def put_member(self, member: Member) -> None:
        """As any store does, later."""
        await asyncio.sleep(0)
        await super().put_member(member)

    async def put_key(self, key: Key) -> None:
        """As any store does, later."""
        await asyncio.sleep(0)
        await super().put_key(key)


async def test_changes_at_the_same_time_keep_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two members of one name one is added, and no limit is overshot while the store writes."""
    members = await opened(store=SlowStore())
    names = ("lab", "lab", "uni", "shop")
    monkeypatch.setattr(limits, "MEMBERS_MAX", 6)
    monkeypatch.setattr(limits, "KEYS_MAX", 1)
    added = await asyncio.gather(
        *(members.add_member(name, weight=weight) for weight, name in enumerate(names, start=1)),
        return_exceptions=True,
    )
    assert [type(each) for each in added] == [Member, Conflict, Member, Overloaded]
    assert members.weight("lab") == 1
    made = await asyncio.gather(
        *(members.create_key(OWNER) for _ in range(2)), return_exceptions=True
    )
    assert [type(each) for each in made] == [tuple, Overloaded]


async def test_a_name_that_begins_like_the_anonymous_member_is_a_name() -> None:
    """An organisation called anonymous-lab is told its own name."""
    members = await opened(settings=MemberSettings(in_flight_max=1))
    await members.add_member("anonymous-lab")
    members.reserve("anonymous-lab", prompt_tokens=1, output_tokens_max=1)
    with pytest.raises(LimitReached, match="anonymous-lab has 1"):
        members.reserve("anonymous-lab", prompt_tokens=1, output_tokens_max=1)


async def test_a_clock_that_jumps_changes_no_limit() -> None:
    """Limits go by monotonic time; an hour's jump of the wall clock refills nothing."""
    clock = MemoryClock()
    members = await opened(clock=clock, settings=MemberSettings(tokens_per_minute=100))
    members.reserve(OWNER, prompt_tokens=100, output_tokens_max=0)
    for jump in (3_600.0, -7_200.0):
        clock.jump(jump)
        with pytest.raises(LimitReached):
            members.reserve(OWNER, prompt_tokens=50, output_tokens_max=0)


async def test_idle_buckets_leave_nothing_behind() -> None:
    """Any number of anonymous networks costs memory only while they are active."""
    members = await opened()
    held = [
        members.reserve(f"anonymous/bucket-{i}", prompt_tokens=1, output_tokens_max=1)
        for i in range(500)
    ]
    for each in held:
        each.settle(prompt_tokens=1, completion_tokens=1)
    assert "open=1>" in repr(members)  # the anonymous organisation itself
    for _ in range(MemberSettings().queued_max):
        members.reserve("anonymous/bucket-1", prompt_tokens=1, output_tokens_max=1)
    with pytest.raises(LimitReached, match="Anonymous use from your network"):
        members.reserve("anonymous/bucket-1", prompt_tokens=1, output_tokens_max=1)
