"""Which request a free slot goes to, and which free slot a request: one decision, with its reason.

Theory of operation
-------------------
*A slot becomes free* (`next`). The leaves in the window are looked at, the least key first. A light
one, with no more waiting and running than its fair number of leases, takes the slot at once, unless
its request gains by waiting for the node that has its beginning, or its organisation is beyond its
share and another's is first. Otherwise the slot goes to the one
whose request gains most on this node. While the slot is an express one, or the node has much to
read for members that are not light, only light ones may have it, and it stays empty rather.

*A request arrives* (`place`). Of the free slots, it gets the one where it is likely to end first:
what the node has to read, what of the request's own prompt is fresh there, and how fast it writes.

*Batch* requests get what the others leave, and a twentieth of all service in any case (`bands`).

*Hold* is ski rental: a request waits for its home at most as long as its cached beginning would
save (so it never loses more than twice what the best choice in hindsight would have cost), and only
if the home is expected to have a slot by then.

Everything here chooses among those whom the window lets through; none of it moves a key.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from math import inf

from anser.core.account import Leaf, Place
from anser.core.bands import Bands
from anser.core.events import Rule, Why
from anser.core.fairness import Shares
from anser.core.job import Job
from anser.core.rules import Rules
from anser.core.slots import Lane, NodeSlots, Slots

__all__ = ["Picker"]

_FREE_NODES_MAX = 3  # compared for one request


@dataclass(slots=True)
class Picker:
    """The rules that choose, over the shares and the slots of one scheduler."""

    rules: Rules
    shares: Shares
    slots: Slots
    bands: Bands = field(default_factory=Bands)
    _held: list[tuple[float, int, Job]] = field(default_factory=list[tuple[float, int, Job]])

    def is_light(self, job: Job, *, more: int = 0) -> bool:
        """Whether what its member has in flight is within its share of the slots for its model."""
        lane = job.lane
        return not lane.batch and self._is_within(job.account, lane.supply.slots, more)

    def _slots_of(self, lane: Lane) -> int:
        return lane.supply.slots

    def _is_within(self, leaf: Leaf, slots: int, more: int = 0) -> bool:
        in_flight = leaf.queued + leaf.running + more
        return in_flight <= 1 or in_flight <= self.shares.share(leaf) * slots

    @staticmethod
    def _may_precede(light: Job, first: Leaf) -> bool:
        """Whether a light request may have a slot before that of the least key.

        Where their members' paths part, what stands above it must be within its share, too: many
        light members of one organisation are together no lighter than that is.
        """
        own = light.account
        if own is first:
            return True
        steps = zip(own.path, first.path, strict=False)
        (account, parent), (other, _) = next(steps)
        share = account.weight / parent.awake_weight
        while account is other:
            (account, parent), (other, _) = next(steps)
            share *= account.weight / parent.awake_weight
        in_flight = account.queued + account.running
        return account is own or in_flight <= max(1.0, share * light.lane.supply.slots)

    def is_closed(self, node: NodeSlots) -> bool:
        """Whether only light members may have a slot of this node now."""
        rules = self.rules
        if not rules.light_first or self.shares.awake <= 1:
            return False
        if node.reading_heavy > rules.gate_s * node.pace.prefill_tokens_s.value:
            return True
        if node.slots <= 1 or not rules.express:
            return False
        return node.free <= max(1, int(rules.express * node.slots))

    def next(self, node: NodeSlots, now: float) -> tuple[Job, Why] | None:
        """Who gets a free slot of `node`, and why; None leaves it empty."""
        lanes = self.slots.waiting_for(node)
        batch = [lane for lane in lanes if lane.batch]
        if not batch:
            return self._next(node, lanes, now)
        others = [lane for lane in lanes if not lane.batch]
        if self.bands.batch_share(now) < self.rules.batch_share:
            return self._next(node, batch, now) or self._next(node, others, now)
        return self._next(node, others, now) or self._next(node, batch, now)

    def _next(self, node: NodeSlots, lanes: list[Lane], now: float) -> tuple[Job, Why] | None:
        closed, best, gain_most, first, rivals = self.is_closed(node), None, 0, None, 0
        rules, impatient = self.rules, self._impatient(now)
        slots_most = max(map(self._slots_of, lanes), default=0)
        for leaf in self.shares.window(lanes, window=rules.window, most=rules.candidates):
            first = leaf if first is None else first
            rivals += 1
            if closed and not self._is_within(leaf, slots_most):
                continue  # whatever it has here is not light
            place, gain = leaf.choice(lanes, node.bit, oldest_first=impatient)
            assert isinstance(place, Job)
            if rules.light_first and self.is_light(place) and self._may_precede(place, first):
                if not self._holds(place, node, now):
                    _pass_over(place, lanes)
                    return place, self._why(Rule.LIGHT, place, first, gain, rivals)
            elif not closed and (best is None or gain > gain_most):
                best, gain_most = place, gain
        if best is None or first is None:
            return None
        _pass_over(best, lanes)
        rule = Rule.LEAST if best.account is first else Rule.NEAREST
        return best, self._why(rule, best, first, gain_most, rivals)

    def _impatient(self, now: float) -> Callable[[Place], bool]:
        waited_since, passed_max = now - self.rules.patience_s, self.rules.passed_max

        def oldest_first(oldest: Place) -> bool:
            if oldest.key < 0:  # a node has failed it
                return True
            return oldest.passed >= passed_max and oldest.since <= waited_since

        return oldest_first

    def place(self, job: Job, now: float, *, light: bool) -> NodeSlots | None:
        """The free slot that `job` should have, if there is one for it now."""
        nodes = self._open_nodes(job, light=light)
        if not nodes:
            return None
        node = nodes[0] if len(nodes) == 1 else self._quickest(job, nodes)
        return None if light and self._holds(job, node, now) else node

    def wait_s(self, member: str, lane: Lane) -> float:
        """How long one more request of this member would wait in `lane`, as far as can be told.

        Each free slot goes to the members by their weights, so about as many requests go before it
        as the member has waiting, for each share of all that are awake; slots become free as often
        as they have lately.
        """
        waiting = self.shares.queued
        if not waiting and next(self.slots.freest(lane), None) is not None:
            return 0.0
        queued, share = self.shares.standing_of(member)
        before = min(waiting, (queued + 1) / share)
        freed_s = sum(node.slots / node.pace.hold_s.value for node in lane.supply.nodes.values())
        return (before + 1) / freed_s if freed_s else inf

    def released(self, now: float) -> list[Job]:
        """Those whose time to wait for their home is over."""
        over: list[Job] = []
        while self._held and self._held[0][0] <= now:
            over.append(heapq.heappop(self._held)[2])
        return over

    def _open_nodes(self, job: Job, *, light: bool) -> list[NodeSlots]:
        free = self.slots.freest(job.lane)
        if not self.rules.nearest:
            return list(islice(free, 1))
        nodes = list(islice(free, _FREE_NODES_MAX))
        if job.homes and nodes:
            homes = self.slots.with_bits(job.homes)
            nodes += [n for n in homes if n.free and n not in nodes and self._serves(n, job.lane)]
        return nodes if light else [node for node in nodes if not self.is_closed(node)]

    @staticmethod
    def _quickest(job: Job, nodes: list[NodeSlots]) -> NodeSlots:
        """The node on which `job` is likely to end first; between equals the first of them."""
        output = min(job.account.output_tokens, job.request.output_tokens_max)
        prompt, homes, hit = job.request.prompt_tokens, job.homes, job.hit
        quickest, least_s = nodes[0], inf
        for node in nodes:
            fresh = prompt - hit if homes & node.bit else prompt
            pace = node.pace
            reading_s = (node.reading + fresh) / pace.prefill_tokens_s.value
            finish_s = reading_s + output / pace.decode_tokens_s.value
            if finish_s < least_s:
                quickest, least_s = node, finish_s
        return quickest

    def _holds(self, job: Job, node: NodeSlots, now: float) -> bool:
        """Whether `job` rather waits for a home of its beginning than to start on `node`."""
        if not self.rules.hold or not job.homes or job.homes & node.bit:
            return False
        homes = [n for n in self.slots.with_bits(job.homes) if self._serves(n, job.lane)]
        if not homes:
            return False
        if job.hold_until is None:
            job.hold_until = now + node.pace.read_s(job.hit)
            heapq.heappush(self._held, (job.hold_until, job.key, job))
        expected_s = min(home.pace.free_s(home.slots) for home in homes)
        return now + expected_s < job.hold_until

    @staticmethod
    def _serves(node: NodeSlots, lane: Lane) -> bool:
        return node.id in lane.supply.nodes and lane.open_to(node)

    @staticmethod
    def _why(rule: Rule, job: Job, first: Leaf, gain: int, rivals: int) -> Why:
        pool = job.lane.pool
        return Why(
            rule=rule,
            key=job.account.key_in(pool),
            least_key=first.key_in(pool),
            rivals=rivals - 1,
            cached_tokens=max(0, gain),
        )


def _pass_over(chosen: Job, lanes: list[Lane]) -> None:
    """Count for the oldest request of its member that `chosen` went before it."""
    oldest = chosen.account.oldest(lanes)
    if oldest is not chosen:
        oldest.passed += 1
