"""services.members: who is asking, with which weight, within which limits."""

from __future__ import annotations

import pytest

from anser.adapters.memory import MemoryClock, MemoryStore
from anser.config import MemberSettings
from anser.core.errors import Conflict, InvalidField, LimitReached, NotFound, Unauthenticated
from anser.core.members import ANONYMOUS, Limits, Scope
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
    assert again.keys() == []  # what no longer opens anything is forgotten at the next start
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


async def test_the_last_place_is_given_once() -> None:
    """Reserving checks and takes at once: of two requests for the last place one is refused."""
    members = await opened(settings=MemberSettings(in_flight_max=1))
    held = members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    with pytest.raises(LimitReached):
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    held.settle(prompt_tokens=1, completion_tokens=1)
    held.settle(prompt_tokens=1, completion_tokens=1)
    members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    members.validate()


async def test_a_refusal_takes_nothing_anywhere() -> None:
    """If the organisation is at its limit, the person's own place is not taken either."""
    members = await opened()
    await members.add_member("lab", member_limits=Limits(in_flight_max=1))
    await members.add_member("lab/a")
    await members.add_member("lab/b")
    first = members.reserve("lab/a", prompt_tokens=1, output_tokens_max=1)
    for _ in range(3):
        with pytest.raises(LimitReached, match="lab has 1"):
            members.reserve("lab/b", prompt_tokens=1, output_tokens_max=1)
    first.settle(prompt_tokens=0, completion_tokens=0)
    second = members.reserve("lab/b", prompt_tokens=1, output_tokens_max=1)
    second.settle(prompt_tokens=0, completion_tokens=0)
    members.validate()


async def test_several_places_are_taken_together_or_not_at_all() -> None:
    """A request of several answers has all of its places, with their tokens, or none."""
    members = await opened(settings=MemberSettings(in_flight_max=3, tokens_per_minute=1_000))
    one = members.reserve(OWNER, prompt_tokens=100, output_tokens_max=0)
    before = members.limits_left(OWNER)
    for _ in range(3):
        with pytest.raises(LimitReached, match="in flight"):
            members.reserve_all(OWNER, [(10, 0)] * 3)
        assert members.limits_left(OWNER) == before
    one.settle(prompt_tokens=100, completion_tokens=0)
    places = members.reserve_all(OWNER, [(10, 0), (20, 30), (10, 0)])
    assert [place.tokens for place in places] == [10, 50, 10]
    left = members.limits_left(OWNER)
    assert left["x-ratelimit-remaining-requests"] == "0"
    assert left["x-ratelimit-remaining-tokens"] == str(1_000 - 100 - 70)
    for place in places:
        place.withdraw()
        place.withdraw()
    assert members.limits_left(OWNER)["x-ratelimit-remaining-tokens"] == "900"
    members.validate()


async def test_several_answers_fit_a_token_limit_as_one_request() -> None:
    """Answers that exceed a token limit together fit when it is full, as one long answer does."""
    members = await opened(settings=MemberSettings(tokens_per_minute=100))
    members.reserve_all(OWNER, [(80, 0), (80, 0)])
    with pytest.raises(LimitReached, match="about 2 ") as refused:
        members.reserve_all(OWNER, [(1, 0), (1, 0)])
    assert refused.value.retry_after_s == pytest.approx(62 * 60 / 100)


async def test_more_places_than_there_ever_are_is_a_wrong_field() -> None:
    """What waiting cannot mend is not called a limit reached, whoever's limit on the path it is."""
    members = await opened()
    await members.add_member("lab", member_limits=Limits(in_flight_max=2))
    await members.add_member("lab/a")
    held = members.reserve("lab/a", prompt_tokens=1, output_tokens_max=1)
    with pytest.raises(InvalidField) as refused:
        members.reserve_all("lab/a", [(1, 1)] * 3, param="n")
    assert refused.value.param == "n"
    with pytest.raises(LimitReached):
        members.reserve_all("lab/a", [(1, 1)] * 2)
    held.settle(prompt_tokens=1, completion_tokens=1)
    assert len(members.reserve_all("lab/a", [(1, 1)] * 2)) == 2


async def test_waiting_places_are_freed_by_starting_and_taken_by_a_retry() -> None:
    """The queue's limit counts who waits, not who runs."""
    members = await opened(settings=MemberSettings(queued_max=1))
    first = members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    with pytest.raises(LimitReached, match="waiting"):
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    first.started()
    first.started()
    second = members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    second.started()
    first.requeued()
    first.requeued()
    with pytest.raises(LimitReached, match="waiting"):
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    members.validate()


async def test_by_default_waiting_ends_at_its_own_limit() -> None:
    """Whatever runs, `queued_max` more may wait, and not one above; so both limits are met."""
    settings = MemberSettings()
    members = await opened(settings=settings)
    for _ in range(settings.in_flight_max - settings.queued_max):
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1).started()
    for _ in range(settings.queued_max - 1):
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    last = members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    with pytest.raises(LimitReached, match="in flight") as refused:
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    assert refused.value.retry_after_s
    last.settle(prompt_tokens=0, completion_tokens=0)
    held = members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    held.withdraw()
    members.validate()


async def test_waiting_is_refused_while_few_run() -> None:
    """With a few requests running, the member's queue is refused at its limit, no earlier."""
    settings = MemberSettings()
    members = await opened(settings=settings)
    for _ in range(4):
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1).started()
    for _ in range(settings.queued_max):
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    with pytest.raises(LimitReached, match="waiting, the most") as refused:
        members.reserve(OWNER, prompt_tokens=1, output_tokens_max=1)
    assert refused.value.retry_after_s
    members.validate()


async def test_places_are_taken_together_or_not_at_all() -> None:
    """Of several places either all are taken, or none; given back, none is lost."""
    members = await opened(settings=MemberSettings(queued_max=3, tokens_per_minute=1_000))
    places = members.reserve_all(OWNER, [(10, 10)] * 2)
    with pytest.raises(LimitReached, match="waiting"):
        members.reserve_all(OWNER, [(10, 10)] * 2)
    places += members.reserve_all(OWNER, [(10, 10)])
    for place in places:
        place.withdraw()
        place.withdraw()
        place.settle(prompt_tokens=10, completion_tokens=10)
    (again, *_) = members.reserve_all(OWNER, [(0, 1_000)] * 3)
    assert again.headers()["x-ratelimit-remaining-tokens"] == str(1_000 - 3 * 256)
    members.validate()


@pytest.mark.parametrize(
    "most", [MemberSettings(queued_max=3), MemberSettings(in_flight_max=3)], ids=repr
)
async def test_more_places_than_a_member_has_are_a_mistake(most: MemberSettings) -> None:
    """What no waiting could make fit is not the 429 that clients try again, but a 400."""
    members = await opened(settings=most)
    with pytest.raises(InvalidField, match="may have 3 requests waiting") as refused:
        members.reserve_all(OWNER, [(1, 1)] * 4)
    assert refused.value.status == 400
    assert len(members.reserve_all(OWNER, [(1, 1)] * 3)) == 3


async def test_tokens_are_taken_by_estimate_and_settled_by_fact() -> None:
    """A short answer gives back what was reserved; the headers tell what is left."""
    members = await opened(settings=MemberSettings(tokens_per_minute=1_000))
    held = members.reserve(OWNER, prompt_tokens=100, output_tokens_max=900)
    assert held.headers()["x-ratelimit-remaining-tokens"] == str(1_000 - 100 - 256)
    held.settle(prompt_tokens=100, completion_tokens=10)
    after = members.reserve(OWNER, prompt_tokens=0, output_tokens_max=0)
    assert after.headers()["x-ratelimit-remaining-tokens"] == "890"
    assert after.headers()["x-ratelimit-limit-tokens"] == "1000"
    assert after.headers()["x-ratelimit-reset-tokens"] == "6.600s"
    assert after.headers()["x-ratelimit-remaining-requests"] == "511"


async def test_the_usual_answer_is_learnt() -> None:
    """Reserving follows the member's own answers, so short ones leave room for more at once."""
    members = await opened(settings=MemberSettings(tokens_per_minute=10_000))
    for _ in range(40):
        held = members.reserve(OWNER, prompt_tokens=0, output_tokens_max=1_000)
        held.settle(prompt_tokens=0, completion_tokens=10)
    assert members.reserve(OWNER, prompt_tokens=0, output_tokens_max=1_000).tokens < 15


async def test_a_restart_does_not_renew_the_day() -> None:
    """Tokens of the last day are counted again against the daily limit."""
    members = await opened(settings=MemberSettings(tokens_per_day=100))
    members.restore_day(OWNER, 90)
    with pytest.raises(LimitReached, match="per day") as refused:
        members.reserve(OWNER, prompt_tokens=20, output_tokens_max=0)
    assert refused.value.retry_after_s == pytest.approx(8_640)


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
