"""Shards that hear each other at once, and short words for what happens to them."""

from __future__ import annotations

from anser.core.events import (
    Decision,
    Event,
    Finished,
    NodeChanged,
    Request,
    Start,
    Submitted,
)
from anser.core.gossip import Message
from anser.core.ledger import Usage
from anser.core.rules import STRICT, Rules
from anser.core.shards import Gossip, Shard

MODELS = frozenset(("m",))
_GOSSIP = Gossip()


class Ring:
    """Shards that hear each other at once, unless they are to be silent; short words for events."""

    def __init__(self, *names: str, rules: Rules = STRICT, gossip: Gossip = _GOSSIP) -> None:
        self.now = 0.0
        self.gossip = gossip
        self.silent: set[str] = set()
        self.starts: dict[str, str] = {}  # lease to node
        self.shards = {
            name: Shard(
                name,
                [other for other in names if other != name],
                queued_max=1_000,
                retries_max=3,
                rules=rules,
                gossip=gossip,
            )
            for name in names
        }
        self.talk()

    def tell(self, name: str, event: Event) -> list[str]:
        """What starts at this shard by it, each lease with its node."""
        return self.started(name, self.shards[name].handle(event, self.now))

    def started(self, name: str, decisions: list[Decision]) -> list[str]:
        """The leases that start, each with its node."""
        self.shards[name].validate()
        starts = [one for one in decisions if isinstance(one, Start)]
        return [f"{start.lease.id} {start.lease.node}" for start in starts]

    def node(self, name: str, node: str, slots: int) -> list[str]:
        """A node of this shard has so many slots from now on."""
        return self.tell(name, NodeChanged(node=node, slots=slots, models=MODELS))

    def submit(self, name: str, id: str, member: str = "a", *, model: str = "m") -> list[str]:
        """A request of 100 prompt tokens comes to this shard."""
        request = Request(
            id=id, member=member, model=model, prompt_tokens=100, output_tokens_max=100
        )
        return self.tell(name, Submitted(request=request))

    def finish(self, name: str, lease: str, *, output: int = 0) -> list[str]:
        """A lease of this shard ends."""
        usage = Usage(prompt_tokens=100, completion_tokens=output)
        return self.tell(name, Finished(lease=lease, usage=usage))

    def messages(self, name: str) -> list[Message]:
        """What this shard says a round later."""
        self.now += self.gossip.every_s
        return self.shards[name].speak(self.now)

    def hear(self, message: Message) -> list[str]:
        """What starts by a message."""
        shard = self.shards[message.receiver]
        return self.started(message.receiver, shard.hear(message, self.now))

    def talk(self, rounds: int = 3) -> list[str]:
        """All say how things are, and all hear it, some times over; what starts by it."""
        found: list[str] = []
        for _ in range(rounds):
            self.now += self.gossip.every_s
            talking = [shard for name, shard in self.shards.items() if name not in self.silent]
            for message in [one for shard in talking for one in shard.speak(self.now)]:
                if message.receiver not in self.silent:
                    found += self.hear(message)
        return found
