"""A request on its way through the scheduler: where it waits or runs, and what it was charged."""

from __future__ import annotations

from dataclasses import dataclass

from anser.core.account import Place
from anser.core.events import Request
from anser.core.fairness import price
from anser.core.ledger import Usage
from anser.core.prefix import BLOCK_BYTES
from anser.core.slots import NodeSlots

__all__ = ["Job"]


@dataclass(slots=True, eq=False, kw_only=True)
class Job(Place):
    """A request that waits (`node` is None) or runs. Times are monotonic seconds."""

    request: Request
    attempt: int = 0
    cancelled: bool = False
    hold_until: float | None = None  # it may wait so long for a node with its beginning

    # The present attempt:
    node: NodeSlots | None = None
    charged: int = 0  # micro-credits
    cached: int = 0  # prompt tokens expected in the node's cache
    reading: int = 0  # prompt tokens that the node still has to read
    ahead: int = 0  # what it had to read for others when this began
    ahead_whole: int = 0  # and would have, were nothing of it cached
    is_reading: bool = False  # it has had no token yet
    heavy: bool = False  # its member was above its share
    started_at: float = 0.0
    first_at: float | None = None  # when its first token came

    @property
    def lease(self) -> str:
        """The present lease."""
        return f"{self.id}.{self.attempt}"

    @property
    def factor_milli(self) -> int:
        """The price factor of its model, in thousandths."""
        return self.request.factor_milli

    def tokens_of(self, blocks: int) -> int:
        """How many tokens of its prompt the first so many blocks are."""
        request = self.request
        if not blocks:
            return 0
        return min(
            request.prompt_tokens,
            request.prompt_tokens * blocks * BLOCK_BYTES // max(1, request.text_bytes),
        )

    def cached_on(self, node: NodeSlots) -> int:
        """How much of its prompt the node is likely to have in its cache."""
        return self.hit if self.homes & node.bit else 0

    def price(self, usage: Usage) -> int:
        """What so much costs, in micro-credits."""
        return price(
            fresh=usage.prompt_tokens - usage.cached_tokens,
            cached=usage.cached_tokens,
            output=usage.completion_tokens,
            factor_milli=self.request.factor_milli,
        )
