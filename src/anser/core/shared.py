"""A scheduler that is one of several: its keys are everybody's, its slots are of one pool.

Theory of operation. The tree of accounts is this shard's own, as are its heaps and its window; but
where an account stands is written in `sums`, which all shards have in common, and copied from there
whenever it moves. So an account's key here is at any time its lift and what all shards have raised
it by, as far as this one has heard.

*Window*: nobody here is given a slot who is more than a sixteenth of it above the least key that
waits elsewhere for such a slot, as far as is known. When that is true of all, the slot stays free,
and is due to another shard. Whose a borrowed slot is, its owner has judged.

*Turns*: whoever is least is so at all shards where it waits, and they would all start a request of
it before they hear of each other. So where it is not this shard's turn (`gossip`), its next request
is taken to have started elsewhere: its key counts as what it will be then.

*Lift*: who begins to wait here and waits at no other shard is lifted to the least key that waits
anywhere, or to the virtual time that is the maximum of all. Who waits elsewhere already has been
lifted there.

*Pool*: all models here are of one, whatever nodes this shard has now: what is compared across
shards must mean the same at each.

Invariant: the key of an account that is in the pool is its key in `sums`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from anser.core.account import Branch, Leaf, Node, Place
from anser.core.events import Decision, NodeChanged
from anser.core.fairness import Shares, price
from anser.core.gossip import CALLS_MAX, Call, Neighbours
from anser.core.job import Job
from anser.core.members import ancestry
from anser.core.picking import Picker
from anser.core.rules import Rules
from anser.core.scheduler import Scheduler
from anser.core.slots import Lane, NodeSlots, Slots, Supply
from anser.core.sums import Sums
from anser.core.virtual import Pool

__all__ = ["CommonShares", "OnePool", "ShardScheduler", "accounts_of"]

# Of the window, so much is for this shard's own members against others': were it all of it, each
# shard would prefer its own, and what is meant for caches would go into the difference. It is there
# twice: one member is ahead by it here, the other elsewhere.
_ELSEWHERE = 16


def accounts_of(member: str) -> tuple[str, ...]:
    """The names in `sums` of all accounts that a member's requests are charged to."""
    names = ancestry(member)
    return ("", *names) if len(names) == 3 else ("", *names, f"{member}/")


def _name(account: Node) -> str:
    """Its name in `sums`: a member's own leaf is one more level."""
    return account.member if account.name or account.parent is None else f"{account.member}/"


def _call(parent: Branch, child: Node, model: str, lanes: Sequence[Lane]) -> Call:
    return Call(
        parent=_name(parent),
        model=model,
        child=_name(child),
        key=child.key_in(lanes[0].pool),
        cost=_cost(child, lanes),
    )


def _cost(account: Node, lanes: Sequence[Lane]) -> int:
    """By how much its key grows when its next request starts."""
    leaf = account.first(lanes) if isinstance(account, Branch) else account
    oldest = leaf.oldest(lanes)
    assert isinstance(oldest, Job)
    request = oldest.request
    return account.growth(price(fresh=request.prompt_tokens, factor_milli=request.factor_milli))


class CommonShares(Shares):
    """Shares whose keys all shards have in common."""

    def __init__(self, rest_s: float, sums: Sums, neighbours: Neighbours) -> None:
        super().__init__(rest_s)
        self.models: Sequence[str] = ()  # that the slot which is being given away is for
        self._sums, self._neighbours = sums, neighbours

    def calls(self, lanes: Iterable[Lane], window: int, most: int) -> tuple[Call, ...]:
        """For each account and model, who is next below it; upper levels first."""
        by_model: dict[str, list[Lane]] = {}
        for lane in lanes:
            by_model.setdefault(lane.supply.model, []).append(lane)
        found: list[Call] = []
        parents = [self._root]
        for parent in parents:  # which grows meanwhile
            found += [
                _call(parent, next(iter(self._near(parent, open_, window, most))), model, open_)
                for model, open_ in by_model.items()
                if any(lane in parent.lanes for lane in open_)
            ]
            if len(found) >= CALLS_MAX:
                break
            parents += [one for one in parent.children.values() if isinstance(one, Branch)]
        return tuple(found[:CALLS_MAX])

    def is_due(self, leaf: Leaf, pool: Pool, window: int) -> bool:
        """Whether nobody who waits elsewhere is that far before this leaf."""
        pledged = self._neighbours.pledged()
        for account, parent in leaf.path:
            key = account.key_in(pool) + pledged[_name(account)]
            least = self._neighbours.least(_name(parent), self.models)
            if least is not None and key > least + window // _ELSEWHERE:
                return False
        return True

    def restate(self, names: Iterable[str], pool: Pool) -> None:
        """The keys of these accounts have moved in `sums`."""
        for name in names:
            account = self._account(name)
            if account is None or pool not in account.stands:
                continue
            grown = account.move(pool, self._sums.key(name))
            if grown < 0 and account.parent is not None:
                account.parent.reorder(account)

    def arrive(self, leaf: Leaf, pool: Pool) -> None:
        """A request of `leaf` is here: who waited nowhere is lifted, for all shards."""
        for account, parent in leaf.path:
            if not account.queued and not account.running:
                self._wake(account, parent)
            if not account.waits_in(pool):
                level = self._level(account, parent, pool)
                account.lift(pool, level, level)
                self._sums.lift(_name(account), account.key_in(pool))

    def enqueue(self, place: Place) -> None:
        """Let an arrived request wait; all shards will know who does."""
        new = [account for account, _ in place.account.path if not account.queued]
        super().enqueue(place)
        for account in new:
            self._sums.turn(_name(account), waits=True)
        self._sums.come(_name(place.account))

    def dequeue(self, place: Place) -> None:
        """Let a request wait no longer; all shards will know."""
        super().dequeue(place)
        self._sums.leave(_name(place.account))
        for account, _ in place.account.path:
            if not account.queued:
                self._sums.turn(_name(account), waits=False)

    def start(self, leaf: Leaf, pool: Pool, micro_credits: int, now: float = 0.0) -> None:
        """A request of `leaf` gets a slot, and all shards will know what it paid."""
        former = [account.measure for account, _ in leaf.path]
        super().start(leaf, pool, micro_credits, now)
        self._sums.come(_name(leaf))
        self._book(leaf, micro_credits, former)
        for account, parent in leaf.path:
            self._sums.advance(_name(parent), account.key_in(pool))
            self._sums.start(_name(account))

    def charge(self, leaf: Leaf, pool: Pool, micro_credits: int) -> None:
        """Charge a request of `leaf` that runs, or refund; all shards will know."""
        former = [account.measure for account, _ in leaf.path]
        super().charge(leaf, pool, micro_credits)
        self._book(leaf, micro_credits, former)

    def end(self, leaf: Leaf) -> None:
        """A request of `leaf` runs no longer; all shards will know."""
        super().end(leaf)
        self._sums.leave(_name(leaf))

    def in_flight_elsewhere(self, leaf: Leaf) -> int:
        """How many requests of `leaf` wait or run at other shards, as far as is known."""
        others = [one.name for one in self._neighbours.heard()]
        return self._sums.in_flight_at(_name(leaf), others)

    def leave(self, leaf: Leaf, pool: Pool) -> None:
        """Nothing: the pool is there as long as the shard is."""

    def _book(self, leaf: Leaf, micro_credits: int, former: list[int]) -> None:
        for (account, _), measure in zip(leaf.path, former, strict=True):
            raised = account.measure - measure
            self._sums.charge(_name(account), micro_credits=micro_credits, raised=raised)

    def _level(self, account: Node, parent: Branch, pool: Pool) -> int:
        """The key that `account` has at least when it begins to wait."""
        name, above = _name(account), _name(parent)
        key = self._sums.key(name)
        others = [one.name for one in self._neighbours.heard()]
        if self._sums.waits_at(name, others):
            return key
        lanes = [lane for lane in parent.lanes if lane.pool is pool]
        least = parent.least(lanes)
        known = [] if least is None else [least.key_in(pool)]
        known += self._neighbours.keys(above)
        return max(key, min(known) if known else self._sums.virtual(above))

    def _window(
        self, branch: Branch, lanes: Sequence[Lane], window: int, most: int
    ) -> Iterator[Leaf]:
        least = self._neighbours.least(_name(branch), self.models)
        limit = inf if least is None else least + window // _ELSEWHERE
        near = self._near(branch, lanes, window, most)
        children = [child for child, key in near.items() if key <= limit]
        for child in children:
            if isinstance(child, Leaf):
                yield child
            else:
                yield from self._window(child, lanes, window, -(-most // len(children)))

    def _near(
        self, branch: Branch, lanes: Sequence[Lane], window: int, most: int
    ) -> dict[Node, int]:
        """Children that may be next, the first one first, with the keys that they will have.

        Whose next request is for another shard to start is taken to have got it there.
        """
        lanes = [lane for lane in lanes if lane in branch.lanes]
        pool, pledged = lanes[0].pool, self._neighbours.pledged()
        keys: dict[Node, int] = {}
        for child in branch.near(lanes, window=window, most=most):
            name = _name(child)
            elsewhere = self._neighbours.starter(name) != self._neighbours.name
            expected = _cost(child, lanes) if elsewhere else 0
            keys[child] = child.key_in(pool) + pledged[name] + expected
        return dict(sorted(keys.items(), key=lambda item: item[1]))

    def _account(self, name: str) -> Node | None:
        account = self.find(name.removesuffix("/"))
        if not name.endswith("/"):
            return account
        return account.children.get("") if isinstance(account, Branch) else None

    def validate(self) -> None:
        """Assert the invariants of the module's docstring, and those of `fairness`."""
        super().validate()
        self._sums.validate()
        for leaf in self._leaves.values():
            for account, _ in leaf.path:
                for pool in account.stands:
                    assert account.key_in(pool) == self._sums.key(_name(account))


class OnePool(Slots):
    """Slots of one pool, also while no node joins its models."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(0)

    def node(self, id: str) -> NodeSlots | None:
        """What is known of this node."""
        return self._nodes.get(id)

    def callers(self) -> Iterator[Lane]:
        """Lanes for which a slot of another shard's node would do.

        Not those that only wait for another node than one that has failed them.
        """
        for lane in self.lanes():
            if not lane.excluded or lane.supply.nodes.keys() <= lane.excluded:
                yield lane

    def _pool(self) -> Pool:
        return self.pool

    def _regroup(self, supplies: Iterable[Supply]) -> None:
        """Nothing: there is one pool."""

    def _retire(self, *pools: Pool, former: tuple[Pool, ...], pool: Pool | None) -> None:
        """Nothing: there is one pool."""

    def _validate_pools(self) -> None:
        assert all(supply.pool is self.pool for supply in self._supplies.values())


@dataclass(slots=True, kw_only=True)
class _Picker(Picker):
    """Knows that light is who asks little of all shards, and that a borrowed slot has an owner.

    Whether that is for light members only, its owner says.
    """

    common: CommonShares
    neighbours: Neighbours
    owned: Counter[str] = field(default_factory=Counter[str])  # slots of this shard, by model
    borrowed: dict[str, bool] = field(default_factory=dict[str, bool])  # light? by node

    def is_light(self, job: Job, *, more: int = 0) -> bool:
        """Whether what its member has in flight anywhere is within its share of all slots."""
        lane = job.lane
        return not lane.batch and self._is_within(job.account, self._slots_of(lane), more)

    def _slots_of(self, lane: Lane) -> int:
        model = lane.supply.model
        return self.owned[model] + self.neighbours.slots(model)

    def _is_within(self, leaf: Leaf, slots: int, more: int = 0) -> bool:
        return Picker._is_within(self, leaf, slots, more + self.common.in_flight_elsewhere(leaf))

    def is_closed(self, node: NodeSlots) -> bool:
        """Whether only light members may have a slot of this node now."""
        light = self.borrowed.get(node.id)
        if light is not None:
            return light
        if Picker.is_closed(self, node):
            return True
        elsewhere = self.neighbours.reads(node.id) if self.rules.light_first else 0
        reading = node.reading_heavy + elsewhere
        return elsewhere > 0 and reading > self.rules.gate_s * node.pace.prefill_tokens_s.value


class ShardScheduler(Scheduler):
    """The scheduler of one shard."""

    _picker: _Picker
    _shares: CommonShares
    _slots: OnePool

    def __init__(
        self,
        queued_max: int,
        retries_max: int,
        rules: Rules,
        *,
        sums: Sums,
        neighbours: Neighbours,
    ) -> None:
        # What others' leases read on a node is not known here, so what it does proves nothing.
        rules = replace(rules, throttle=False)
        super().__init__(
            queued_max,
            retries_max,
            rules,
            shares=CommonShares(rules.awake_s, sums, neighbours),
            slots=OnePool(),
        )
        shares = self._shares
        self._picker = _Picker(rules, shares, self._slots, common=shares, neighbours=neighbours)

    def calls(self) -> tuple[tuple[Call, ...], Counter[str], Counter[str]]:
        """What this shard calls for, and how many requests wait for each model; the light ones."""
        waiting, light = Counter[str](), Counter[str]()
        lanes = list(self._slots.callers())
        for lane in lanes:
            model = lane.supply.model
            waiting[model] += lane.waiting
            self._shares.models = (model,)
            rules = self.rules
            for leaf in self._shares.window([lane], window=rules.window, most=rules.candidates):
                place = leaf.oldest([lane])
                light[model] += isinstance(place, Job) and self._picker.is_light(place)
        return self._shares.calls(lanes, self.rules.window, self.rules.candidates), waiting, light

    def own(self, slots: int, models: frozenset[str]) -> None:
        """So many slots for these models are this shard's, lent or not, or no more if negative."""
        for model in models:
            self._picker.owned[model] += slots

    def owned(self) -> dict[str, int]:
        """Slots of this shard, lent or not, by model."""
        return dict(+self._picker.owned)

    def reading_on(self, id: str) -> int:
        """Prompt tokens that this node has to read for members above their share."""
        node = self._slots.node(id)
        return node.reading_heavy if node else 0

    def waits_light(self, request: str) -> bool:
        """Whether this request waits and its member asks little."""
        job = self._jobs.get(request)
        return job is not None and job.node is None and self._picker.is_light(job)

    def heard(self, names: Iterable[str], nodes: Iterable[str], now: float) -> list[Decision]:
        """Other shards have told: the keys of these accounts, and what is due elsewhere."""
        assert now >= self._now
        self._now = now
        self._shares.restate(names, self._slots.pool)
        decisions: list[Decision] = []
        for id in nodes:
            node = self._slots.node(id)
            if node is not None:
                decisions += self._fill(node)
        return decisions

    def borrow(self, id: str, models: frozenset[str], now: float, *, light: bool) -> list[Decision]:
        """Another shard lends us one slot of its node, perhaps for a light member only.

        At most one request starts in it, and none follows when that ends.
        """
        slots = self.running_on(id) + 1
        self._picker.borrowed[id] = light
        decisions = self.handle(NodeChanged(node=id, slots=slots, models=models), now)
        del self._picker.borrowed[id]
        return decisions + self.handle(NodeChanged(node=id, slots=0, models=frozenset()), now)

    def spare(self, id: str, *, light: bool) -> bool:
        """Whether this node has a slot for nobody here; `light`: also one for light members."""
        node = self._slots.node(id)
        if node is None or not node.free or node.slots < node.claimed:
            return False
        return light or not self._picker.is_closed(node)

    def _fill(self, node: NodeSlots) -> list[Decision]:
        # Whose a borrowed slot is, its owner has judged: two that defer to each other fill none.
        borrowed = node.id in self._picker.borrowed
        self._shares.models = () if borrowed else _models(node)
        return super()._fill(node)

    def __repr__(self) -> str:
        return f"<ShardScheduler {self.queued} queued, {self.running} running, {self._slots!r}>"

    def _may_idle(self) -> bool:
        return True  # it may be due to another shard

    def _at_once(self, job: Job, node: NodeSlots) -> bool:
        if not super()._at_once(job, node):
            return False
        self._shares.models = _models(node)
        return self._shares.is_due(job.account, job.lane.pool, self.rules.window)


def _models(node: NodeSlots) -> tuple[str, ...]:
    return tuple(supply.model for supply in node.supplies)
