"""One seeded world: a whole gateway, its machines, its clients, and what befalls them.

At each event the scheduler is held against the rules (`checked`), and what a lease pays against
what its machine made; whenever all that could happen at a moment has happened, its invariants, and
now and then those of every other part; at the end, each client's story against the ledger's.
Nothing but the seed decides what happens.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from anser.adapters.memory import MemoryClock, MemoryStore
from anser.adapters.memory_engine import MemoryEngine, Pace
from anser.adapters.signer import KeyFileSigner
from anser.core.errors import AnserError, StoreFull
from anser.core.events import Failed, Finished, Lease
from anser.core.fairness import price
from anser.core.fleet import Node
from anser.core.job import Job
from anser.core.ledger import Usage
from anser.ports import Call, Engine, Route
from anser.services.fleet import Fleet
from anser.services.gateway import Gateway
from anser.services.ledger import Ledger
from anser.services.members import Members
from tests.simulation import virtual
from tests.simulation.checked import CheckedScheduler
from tests.simulation.clients import Client
from tests.simulation.machines import LIE_TOKENS, Machine
from tests.simulation.plan import MODELS, Act, Lie, Mishap, Plan, draw_plan

__all__ = ["World", "live", "simulate"]

_FACTORS = {"large": 3_000}
_TEMPLATE_WORDS = 8  # that an engine may add to a prompt
_LIFE_S = 3_600.0  # nobody may still wait then
_CHECK_EVERY = 20  # moments
_KNOWN = 20  # first tokens of each node, before the first client comes
_KNOWN_S = 0.05


@dataclass
class World:
    """What a seed makes."""

    seed: int
    clock: MemoryClock = field(default_factory=MemoryClock)
    story: list[str] = field(default_factory=list)
    moments: int = 0
    clients: list[Client] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan: Plan = draw_plan(self.seed)
        self.store = MemoryStore()
        self.scheduler = CheckedScheduler(
            self.plan.queued_max,
            self.plan.rules,
            limits_of=self._limits_of,
            audit=self._audit,
            tell=self.tell,
        )
        self.machines = {plan.node: Machine(plan, self.seed) for plan in self.plan.machines}
        self.clients = [
            Client(plan, self.clock, self.tell, self._receipted) for plan in self.plan.clients
        ]
        self._clients = {client.plan.id: client for client in self.clients}
        self.paid: dict[str, list[Usage]] = {client.plan.id: [] for client in self.clients}
        self._seen = 0  # events of the scheduler
        self.hedged = 0
        self.members: Members | None = None
        self.parts: list[Gateway | Members | Fleet | Ledger | MemoryStore | Machine] = []

    def tell(self, line: str) -> None:
        """Add a line to the story."""
        self.story.append(f"{self.clock.now():9.3f} {line}")

    def _receipted(self, request: str) -> bool:
        return request in self.store._places

    def _limits_of(self, job: Job) -> tuple[int, int]:
        """What it can come to on its node, and what its node may take back, in micro-credits."""
        assert job.node is not None
        lie, words = self.machines[job.node.id].plan.lie, self._client(job).plan.words
        prompt = words + _TEMPLATE_WORDS + LIE_TOKENS * (lie is Lie.PROMPT)
        most = price(
            fresh=max(prompt, job.request.prompt_tokens),
            output=job.request.output_tokens_max + LIE_TOKENS * (lie is Lie.MORE),
            factor_milli=job.factor_milli,
        )
        unsure = LIE_TOKENS * (lie is Lie.LESS)
        return most, price(output=unsure, factor_milli=job.factor_milli)

    def _client(self, job: Job) -> Client:
        """Whose lease this is, or whose second one."""
        return self._clients[job.id.removesuffix("+1")]

    def _audit(self, job: Job, event: Finished | Failed) -> None:
        """A lease pays for what its machine made or, if that failed, for what its client got."""
        assert job.node is not None
        machine, client = self.machines[job.node.id], self._client(job)
        made = machine.made.get(job.lease)
        self.paid[client.plan.id].append(
            event.usage if isinstance(event, Finished) else event.delivered
        )
        match event:
            case Failed(retry=False, delivered=usage) if usage == Usage():
                pass  # nothing came of it, or the client has what the other of its two leases made
            case Failed(retry=True, delivered=usage):
                got = Usage(completion_tokens=client.tokens - client.before)
                assert usage == got, f"{job.lease} pays {usage} where {got} was got"
                client.before = client.tokens
            case Failed(delivered=usage):
                got_tokens = client.tokens - client.before
                assert usage.completion_tokens == got_tokens, f"{job.lease} pays {usage}"
            case Finished(usage=usage) if made is None:  # gone before its engine was asked
                assert not usage.completion_tokens, f"{job.lease} pays {usage} for nothing"
            case Finished(usage=usage):
                assert made is not None
                estimate = job.request.prompt_tokens
                due = machine.credible(made, estimate=estimate, before=client.before)
                assert usage == due, f"{job.lease} pays {usage} for {due}"

    def jumped(self) -> None:
        """A moment is over: time goes on."""
        self.moments += 1
        if self.moments % _CHECK_EVERY == 0:
            self.validate()
        elif self.scheduler.events != self._seen:
            self.scheduler.validate()
        self._seen = self.scheduler.events

    def validate(self) -> None:
        """Assert the invariants of every part, and that they agree."""
        for part in (*self.parts, *self.machines.values()):
            part.validate()
        if self.members is not None:
            own = [books for (_, leaf), books in self.members._accounts.items() if leaf]
            assert sum(books.allowance.queued for books in own) == self.scheduler.queued

    async def live(self) -> None:
        """From the first client to the last receipt."""
        async with self._platform() as (gateway, members, fleet), asyncio.timeout(_LIFE_S):
            async with asyncio.TaskGroup() as group:
                for client in self.clients:
                    group.create_task(client.live(gateway))
                for mishap in self.plan.mishaps:
                    group.create_task(self._befall(mishap, members, fleet))
            self.store.fault = None
            await gateway.empty.wait()
            self.hedged = gateway.stats.hedged
            self.validate()
        await self._check_end(members)

    @asynccontextmanager
    async def _platform(self) -> AsyncGenerator[tuple[Gateway, Members, Fleet]]:
        plan, clock = self.plan, self.clock
        members = Members(self.store, clock, b"p" * 32, plan.member_settings, anonymous=True)
        await members.load()
        for member, weight in plan.weights.items():
            await members.add_member(member, weight=weight)
        fleet = Fleet(self.store, clock, plan.settings, self._engine_for)
        ledger = Ledger(self.store, KeyFileSigner(Ed25519PrivateKey.generate()), clock)
        gateway = Gateway(
            scheduler=self.scheduler,
            members=members,
            fleet=fleet,
            ledger=ledger,
            clock=clock,
            settings=plan.settings,
            factor_of=lambda model: _FACTORS.get(model, 1_000),
        )
        self.members = members
        self._teach(gateway)
        self.parts = [gateway, members, fleet, ledger, self.store]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(ledger.run())
            watching = tasks.create_task(fleet.run())
            for name in self.machines:
                await fleet.add(_node(name))
            try:
                yield gateway, members, fleet
            finally:
                watching.cancel()
                await ledger.aclose()
        await fleet.aclose()

    def _teach(self, gateway: Gateway) -> None:
        """As if all nodes had been up for long, and many requests had come before."""
        hedging = gateway._crew.hedging
        hedging.saved = 4.0
        for node in self.machines:
            for model in MODELS:
                lease = Lease(id="", request="", node=node, model=model, attempt=1)
                for _ in range(_KNOWN):
                    hedging.first_tokens.observe(lease, _KNOWN_S)

    def _engine_for(self, node: Node) -> Engine:
        return self.machines[node.id].connect()

    async def _befall(self, mishap: Mishap, members: Members, fleet: Fleet) -> None:
        await asyncio.sleep(mishap.at_s)
        self.tell(f"{mishap.node}: {mishap.act.value}")
        try:
            if not await self._befall_here(mishap):
                await _operate(mishap, members, fleet)
        except AnserError as error:
            self.tell(f"{mishap.node}: {mishap.act.value}: {error.code}")

    async def _befall_here(self, mishap: Mishap) -> bool:
        """What befalls machines and clocks; returns False for what operators do."""
        machine = self.machines[mishap.node]
        match mishap.act:
            case Act.CRASH:
                machine.crash()
            case Act.RECOVER:
                machine.recover()
            case Act.SLOW:
                machine.slow_down(mishap.slower)
                await asyncio.sleep(mishap.for_s)
                machine.slow_down(1.0)
                self.tell(f"{mishap.node}: as fast as before")
            case Act.SUSPEND:
                self.clock.advance(mishap.for_s)  # all that was due meanwhile is due at once
            case Act.JUMP:
                self.clock.jump(mishap.jump_s)
            case Act.DISK_FULL:
                self.store.fault = StoreFull("The disk is full.")
            case Act.DISK_FREE:
                self.store.fault = None
            case _:
                return False
        return True

    async def _check_end(self, members: Members) -> None:
        """Nothing is left behind, and each client's story agrees with the ledger's."""
        scheduler = self.scheduler
        assert (scheduler.queued, scheduler.running) == (0, 0), scheduler
        assert all(account.allowance.open == 0 for account in members._accounts.values())
        # Who is sent away after waiting is cancelled once more by the gateway; that is all.
        sent_away = scheduler.out_of_tries | scheduler.pushed_out
        assert scheduler.dropped == len(sent_away), scheduler
        out_of_tries, pushed_out = map(_requests, (scheduler.out_of_tries, scheduler.pushed_out))
        assert not any(machine.open for machine in self.machines.values())
        receipts = await self.store.recent(limit=1_000_000, member=None)
        counts = Counter(receipt.request for receipt in receipts)
        assert max(counts.values(), default=1) == 1, counts
        liars = {name for name, machine in self.machines.items() if machine.plan.lie}
        for client in self.clients:
            client.out_of_tries = client.plan.id in out_of_tries
            client.pushed_out = client.plan.id in pushed_out
            prompts = [paid for paid in self.paid[client.plan.id] if paid.prompt_tokens]
            assert len(prompts) <= 1, f"{client.plan.id} pays {prompts}"
            own = [receipt for receipt in receipts if receipt.request == client.plan.id]
            try:
                client.check(own, await _said(client), liars=liars)
            except AssertionError as error:
                raise AssertionError(f"{error}: {client} {own}") from error


def live(world: World) -> None:
    """Live through it. Raises AssertionError where an invariant is broken."""
    virtual.run(world.live, clock=world.clock, jumped=world.jumped)


def simulate(seed: int) -> World:
    """The world of this seed, lived through. Raises as `live` does."""
    world = World(seed)
    live(world)
    return world


async def _operate(mishap: Mishap, members: Members, fleet: Fleet) -> None:
    match mishap.act:
        case Act.DRAIN:
            await fleet.drain(mishap.node)
        case Act.REMOVE:
            await fleet.remove(mishap.node)
        case Act.ADD:
            await fleet.add(_node(mishap.node))
        case Act.REWEIGH:
            await members.set_member(mishap.member, weight=mishap.weight, changes={})
        case _:
            await members.add_member(f"late-{mishap.node}", weight=500)


def _requests(jobs: set[str]) -> set[str]:
    """The requests that these names at the scheduler are of."""
    return {job.removesuffix("+1") for job in jobs}


def _node(name: str) -> Node:
    return Node(id=name, url=f"http://{name}.example")


async def _said(client: Client) -> str:
    """The whole answer, as an engine without faults gives it."""
    demand = client.demand
    if demand.route is Route.EMBEDDINGS:
        return ""
    reference = Client(client.plan, client.clock, print, bool)
    engine = MemoryEngine(demand.model, pace=Pace(step_s=0.0, step_each_s=0.0))
    async with engine.generate(Call(lease="", route=demand.route, body=demand.body)) as chunks:
        async for chunk in chunks:
            reference._take(chunk)
    return reference.text
