"""Reservations: every limit from person to organisation, taken at once and given back."""

from __future__ import annotations

import pytest

from anser.config import MemberSettings
from anser.core.errors import (
    InvalidField,
    LimitReached,
)
from anser.core.members import Limits
from anser.services.members import OWNER, Spent
from tests.unit.test_members_service import opened

pytestmark = pytest.mark.anyio


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
        held.settle(prompt_tokens=0, completion_tokens=10, typical=True)
    assert members.reserve(OWNER, prompt_tokens=0, output_tokens_max=1_000).tokens < 15


async def test_what_is_no_whole_answer_teaches_nothing() -> None:
    """Embeddings and answers cut off say nothing about how long the next answer will be."""
    members = await opened()
    for _ in range(40):
        held = members.reserve(OWNER, prompt_tokens=1, output_tokens_max=0)
        held.settle(prompt_tokens=1, completion_tokens=0)
    assert members.reserve(OWNER, prompt_tokens=0, output_tokens_max=1_000).tokens == 256


async def test_settling_corrects_the_whole_path() -> None:
    """What a person did not take comes back to its organisation's limit too."""
    members = await opened()
    await members.add_member("lab", member_limits=Limits(tokens_per_minute=1_000))
    await members.add_member("lab/a")
    held = members.reserve("lab/a", prompt_tokens=100, output_tokens_max=200)
    assert held.headers()["x-ratelimit-remaining-tokens"] == "700"
    held.settle(prompt_tokens=100, completion_tokens=10)
    assert members.limits_left("lab")["x-ratelimit-remaining-tokens"] == "890"


async def day_left(spent: list[tuple[int, float]], member: str = OWNER) -> int:
    """What a limit of 2400 tokens a day has left after a restart; (tokens, hours ago) were used."""
    members = await opened(settings=MemberSettings(tokens_per_day=2_400))
    members.restore_days(
        Spent(member=member, tokens=tokens, ago_s=hours * 3_600) for tokens, hours in spent
    )
    return int(members.limits_left(member)["x-ratelimit-remaining-tokens"])


async def test_a_restart_neither_renews_the_day_nor_takes_what_was_refilled() -> None:
    """A daily limit stands after a restart as it stood before."""
    assert await day_left([(2_400, 0)]) == 0
    assert await day_left([(2_400, 23)]) == 2_300
    assert await day_left([(240, 1)]) == 2_400 - 240 + 100
    assert await day_left([(100, hour) for hour in reversed(range(48))]) == 0
    assert await day_left([(2_400, 23), *((100, hour) for hour in reversed(range(23)))]) == 0
    assert await day_left([(5_000, 0)]) == 0


async def test_a_restart_counts_the_day_of_the_whole_path() -> None:
    """What one person spent is missing for its organisation after a restart."""
    members = await opened()
    assert not members.counts_days
    await members.add_member("lab", member_limits=Limits(tokens_per_day=100))
    await members.add_member("lab/a")
    await members.add_member("lab/b")
    assert members.counts_days
    members.restore_days([Spent(member="lab/a", tokens=90, ago_s=0)])
    with pytest.raises(LimitReached, match="lab may use 100 tokens per day") as refused:
        members.reserve("lab/b", prompt_tokens=20, output_tokens_max=0)
    assert refused.value.retry_after_s == pytest.approx(8_640)
