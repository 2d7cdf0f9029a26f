"""Fair shares: prices, keys, lifts, and whom the next slot belongs to."""

from __future__ import annotations

import pytest

from anser.core.account import Place
from anser.core.fairness import Shares, price
from anser.core.slots import Lane, Slots

MILLION = 1_000_000  # micro-credits


class Pool:
    """Shares with a lane or two, and short words for what happens."""

    def __init__(self) -> None:
        self.shares = Shares()
        slots = Slots()
        slots.change("n", slots=1, models=["m", "k"])  # so that both are of one pool
        self.lanes: dict[str, Lane] = {name: slots.lane(name) for name in ("m", "k")}
        self.pool = self.lanes["m"].pool
        self.turn = 0

    def wait(self, member: str, model: str = "m") -> Place:
        """A request of this member arrives and waits."""
        self.turn += 1
        leaf = self.shares.leaf(member)
        lane = self.lanes[model]
        place = Place(id=f"r{self.turn}", account=leaf, lane=lane, key=self.turn)
        self.shares.arrive(leaf, lane.pool)
        self.shares.enqueue(place)
        self.shares.validate()
        return place

    def run(self, member: str, credits: int) -> None:
        """A request of this member starts at once, and goes on running."""
        leaf = self.shares.leaf(member)
        self.shares.arrive(leaf, self.pool)
        self.shares.start(leaf, self.pool, credits)
        self.shares.validate()

    def charge(self, member: str, credits: int) -> None:
        """A request of this member goes on, and pays more or gets something back."""
        self.shares.charge(self.shares.leaf(member), self.pool, credits)

    def end(self, member: str) -> None:
        """A request of this member ends."""
        leaf = self.shares.leaf(member)
        self.shares.end(leaf)
        self.shares.retire(leaf)
        self.shares.validate()

    def first(self, *models: str) -> Place | None:
        """Who is next for these models, by the least key and nothing else."""
        lanes = [self.lanes[model] for model in models or ("m",)]
        leaf = next(self.shares.window(lanes, window=0, most=1), None)
        return None if leaf is None else leaf.oldest(lanes)

    def next(self, *models: str, credits: int = 10) -> str:
        """Start whoever is next for these models, and say who it was."""
        place = self.first(*models)
        assert place is not None
        self.shares.dequeue(place)
        self.shares.start(place.account, place.lane.pool, credits)
        self.shares.validate()
        return place.account.member

    def key(self, member: str) -> int | None:
        """The member's key, if it is known."""
        keys = {row.member: row.key for row in self.shares.standings()}
        return keys.get(member)


# Prices


def test_price_of_each_kind_of_token() -> None:
    """Fresh, cached and output tokens cost 1, 0.1 and 4 credits."""
    assert price(fresh=1, factor_milli=1_000) == MILLION
    assert price(cached=1, factor_milli=1_000) == MILLION // 10
    assert price(output=1, factor_milli=1_000) == 4 * MILLION
    assert price(fresh=2, cached=10, output=3, factor_milli=1_000) == 15 * MILLION


def test_price_is_exact_for_the_smallest_factor() -> None:
    """A thousandth of the reference model's factor still costs whole micro-credits."""
    assert price(cached=1, factor_milli=1) == 100


# The pick


def test_least_key_is_next() -> None:
    """A slot goes to the member that has had least for its weight."""
    pool = Pool()
    for member in ("a", "b", "b", "b"):
        pool.wait(member)
    assert [pool.next(credits=30), pool.next(credits=10)] == ["a", "b"]
    pool.wait("a")
    assert [pool.next(credits=10), pool.next(credits=10)] == ["b", "b"]


def test_oldest_request_of_a_member_is_next() -> None:
    """Inside one member's queue the turn decides."""
    pool = Pool()
    first, second = pool.wait("a"), pool.wait("a")
    assert pool.first() is first
    pool.shares.dequeue(first)
    assert pool.first() is second


def test_only_open_lanes_count() -> None:
    """A member of least key without a request for the node's models is passed over."""
    pool = Pool()
    pool.wait("a", "k")
    pool.wait("b", "m")
    pool.run("b", 100)
    assert pool.next("m") == "b"
    assert pool.first("m") is None
    assert pool.next("m", "k") == "a"


def test_several_lanes_are_compared_by_key() -> None:
    """Across the lanes of a node, the least key wins at each level."""
    pool = Pool()
    pool.wait("a/p/x", "m")
    pool.wait("a/p/y", "k")
    pool.wait("b/p/z", "k")
    pool.run("a/p/x", 100)
    pool.run("b/p/z", 200)
    assert [pool.next("m", "k", credits=200), pool.next("m", "k")] == ["a/p/y", "b/p/z"]


def test_nothing_waits_for_nothing() -> None:
    """Without open lanes there is nobody."""
    pool = Pool()
    pool.wait("a")
    assert pool.first("k") is None


def test_the_weight_of_who_is_awake() -> None:
    """Of one while it is awake, or of all organisations; who was never here has none."""
    pool = Pool()
    pool.shares.weigh("a", 3_000)
    assert [pool.shares.awake_weight(name) for name in (None, "a")] == [0, 0]
    pool.wait("a/p")
    pool.wait("b")
    weights = [pool.shares.awake_weight(name) for name in (None, "a", "a/p", "b", "c")]
    assert weights == [4_000, 3_000, 1_000, 1_000, 0]


def test_fairness_holds_at_each_level() -> None:
    """Two persons of one project share what one person of another organisation has alone."""
    pool = Pool()
    for _ in range(20):
        for member in ("a/p/x", "a/p/y", "b/p/z"):
            pool.wait(member)
    order = [pool.next() for _ in range(20)]
    assert {member: order.count(member) for member in order} == {
        "a/p/x": 5,
        "a/p/y": 5,
        "b/p/z": 10,
    }


def test_a_member_has_requests_beside_those_of_its_children() -> None:
    """An organisation's own requests wait in a leaf of weight 1,000 beside its projects."""
    pool = Pool()
    pool.shares.weigh("a/p", 3_000)
    for _ in range(8):
        pool.wait("a")
        pool.wait("a/p")
    order = [pool.next() for _ in range(8)]
    assert order.count("a") == 2
    assert order.count("a/p") == 6


@pytest.mark.parametrize("member", ["", "a/", "/a", "a//b", "a/b/c/d"])
def test_a_member_that_is_no_path_is_a_broken_invariant(member: str) -> None:
    """Members are one to three names; nothing else may open an account."""
    with pytest.raises(AssertionError):
        Shares().leaf(member)


# Keys


def test_key_is_price_per_share() -> None:
    """A member of twice the weight pays half as much key for the same service."""
    pool = Pool()
    pool.shares.weigh("a", 2_000)
    pool.run("a", 100)
    assert pool.key("a") == 50


def test_key_loses_nothing_to_rounding() -> None:
    """Many small charges give the same key as one large one."""
    pool = Pool()
    pool.shares.weigh("a", 3_000)
    pool.run("a", 0)
    for _ in range(100):
        pool.charge("a", 1)
    assert pool.key("a") == 33


def test_every_account_on_the_path_is_charged() -> None:
    """A charge is paid by the person, the project and the organisation."""
    pool = Pool()
    pool.run("a/p/x", 100)
    pool.charge("a/p/x", 20)
    assert [pool.key(name) for name in ("a", "a/p", "a/p/x")] == [120, 120, 120]
    assert pool.shares.service == 120


def test_refund_puts_a_waiting_member_forward() -> None:
    """A key that a refund has lowered counts at once."""
    pool = Pool()
    pool.run("a", 100)
    pool.wait("a")
    pool.run("b", 0)
    pool.wait("b")
    pool.charge("b", 40)
    assert (pool.key("a"), pool.key("b")) == (100, 140)
    pool.charge("b", -41)
    assert pool.next() == "b"


def test_new_weight_leaves_what_was_paid() -> None:
    """A change of weight moves no key; what comes is paid by the new weight."""
    pool = Pool()
    pool.run("a", 100)
    pool.shares.weigh("a", 4_000)
    assert pool.key("a") == 100
    pool.charge("a", 100)
    assert pool.key("a") == 125
    pool.shares.weigh("a", 1_000)
    pool.charge("a", 100)
    assert pool.key("a") == 225
    pool.shares.validate()


def test_a_weight_may_change_while_nobody_asks() -> None:
    """Whoever is idle, and kept because it is ahead, has its new weight when it returns."""
    pool = Pool()
    pool.run("a", 10)
    pool.charge("a", 90)
    pool.end("a")
    pool.shares.weigh("a", 2_000)
    pool.shares.validate()
    pool.run("a", 100)
    assert pool.key("a") == 150


def test_weight_outlives_the_account() -> None:
    """A weight holds for members that have no account now."""
    pool = Pool()
    pool.shares.weigh("a", 2_000)
    pool.run("a", 0)
    pool.end("a")
    assert pool.key("a") is None
    pool.run("a", 100)
    assert pool.key("a") == 50


# The lift


def test_newcomer_is_lifted_to_the_least_key_that_waits() -> None:
    """Who begins to wait starts level with the least of those that wait."""
    pool = Pool()
    pool.run("a", 100)
    pool.wait("a")
    pool.wait("b")
    assert pool.key("b") == 100
    pool.run("b", 50)
    pool.wait("c")
    assert pool.key("c") == 100


def test_newcomer_is_lifted_to_the_virtual_time_when_nobody_waits() -> None:
    """With nobody waiting, it is the largest key ever dispatched, not what came after that."""
    pool = Pool()
    pool.run("a", 100)
    pool.charge("a", 400)
    pool.wait("b")
    assert pool.key("b") == 100


def test_lift_never_lowers() -> None:
    """A key ahead of the others stays there."""
    pool = Pool()
    pool.run("a", 100)
    pool.charge("a", 400)
    pool.wait("b")
    pool.wait("a")
    assert pool.key("a") == 500


def test_who_waits_is_not_lifted() -> None:
    """Only the step from nothing waiting to something waiting lifts."""
    pool = Pool()
    pool.wait("a")
    pool.run("b", 100)
    pool.wait("a")
    assert pool.key("a") == 0


def test_lift_happens_at_each_level() -> None:
    """A person is lifted among its project's, a project among its organisation's."""
    pool = Pool()
    pool.run("a/p/x", 100)
    pool.run("b/q/z", 30)
    pool.wait("a/p/y")
    assert pool.key("a/p/y") == 100
    pool.wait("b/q/w")
    assert pool.key("b/q/w") == 30


# Forgetting


def test_idle_account_behind_the_others_is_forgotten() -> None:
    """An idle account that a return would lift anyhow costs nothing."""
    pool = Pool()
    pool.run("a", 10)
    pool.run("b", 100)
    pool.end("a")
    assert pool.key("a") is None
    assert pool.shares.running == 1


def test_idle_account_ahead_is_kept_until_the_others_pass_it() -> None:
    """Nobody resets a key by going away."""
    pool = Pool()
    pool.run("a", 10)
    pool.charge("a", 90)
    pool.end("a")
    assert pool.key("a") == 100
    pool.run("b", 80)
    assert pool.key("a") == 100
    pool.run("b", 80)
    assert pool.key("a") is None


def test_account_that_returns_in_time_is_not_forgotten() -> None:
    """Whoever waits or runs again is no longer among those to forget."""
    pool = Pool()
    pool.run("a", 10)
    pool.charge("a", 90)
    pool.end("a")
    pool.wait("a")
    pool.run("b", 1_000)
    assert pool.key("a") == 100
    pool.shares.validate()


def test_an_organisation_is_forgotten_with_all_below_it() -> None:
    """What was ahead inside an organisation goes with it, once others have passed the whole."""
    pool = Pool()
    pool.run("a/p/x", 10)
    pool.charge("a/p/x", 90)
    pool.end("a/p/x")
    assert pool.key("a/p/x") == 100
    pool.run("b", 200)
    assert [row.member for row in pool.shares.standings()] == ["b"]
    assert pool.shares.service == 300
    pool.shares.validate()


def test_person_is_forgotten_inside_an_active_organisation() -> None:
    """Below an organisation that goes on, each is forgotten by itself."""
    pool = Pool()
    pool.run("a/p/x", 10)
    pool.run("a/p/y", 100)
    pool.end("a/p/x")
    assert [row.member for row in pool.shares.standings()] == ["a", "a/p", "a/p/y"]


def test_many_are_forgotten_in_small_steps() -> None:
    """When many are overtaken at once, nobody waits until all of them are forgotten."""
    pool = Pool()
    for number in range(10):
        pool.run(f"u{number}", 0)
        pool.charge(f"u{number}", 100)
        pool.end(f"u{number}")
    counts = []
    for _ in range(4):
        pool.run("other", 1_000)
        counts.append(len(pool.shares.standings()) - 1)
    assert counts == [6, 2, 0, 0]


@pytest.mark.parametrize("shape", ["u{0}", "org{1}/p/u{0}"])
def test_memory_is_bounded_by_who_is_active_or_ahead(shape: str) -> None:
    """Ten thousand members who came once leave nothing behind but the few that are ahead."""
    pool = Pool()
    shares, known = pool.shares, 0
    for number in range(10_000):
        leaf = shares.leaf(shape.format(number, number % 20))
        shares.arrive(leaf, pool.pool)
        shares.start(leaf, pool.pool, 100)
        shares.charge(leaf, pool.pool, 800)
        shares.end(leaf)
        shares.retire(leaf)
        known = max(known, len(shares.standings())) if number % 50 == 0 else known
    assert known < 250
    shares.validate()


# What others see


def test_standings_tell_of_members_not_of_leaves() -> None:
    """Each member has one row, with all that waits and runs below it, parents first."""
    pool = Pool()
    pool.wait("a")
    pool.wait("a/p/x")
    pool.run("a/p/x", 10)
    rows = {row.member: (row.queued, row.running, row.service) for row in pool.shares.standings()}
    assert rows == {"a": (2, 1, 10), "a/p": (1, 1, 10), "a/p/x": (1, 1, 10)}
    assert (pool.shares.queued, pool.shares.running) == (2, 1)


def test_find_gives_no_account_for_who_is_not_known() -> None:
    """An unknown member, organisation or person, has no account."""
    pool = Pool()
    pool.wait("a/p/x")
    assert pool.shares.find("a/q/x") is None
    assert pool.shares.find("b/p/x") is None
    found = pool.shares.find("a/p")
    assert found is not None
    assert found.member == "a/p"


def test_reprs_tell_the_state_in_a_line() -> None:
    """Each class shows its state."""
    pool = Pool()
    place = pool.wait("a/p/x")
    assert repr(pool.shares) == "<Shares 1 queued 0 running 1 leaves>"
    assert repr(place.account) == "<Leaf a/p/x 0 had 1 queued 0 running>"


def test_validate_finds_a_wrong_count() -> None:
    """An invariant that is broken is found."""
    pool = Pool()
    place = pool.wait("a/p/x")
    place.account.queued = 2
    with pytest.raises(AssertionError):
        pool.shares.validate()
