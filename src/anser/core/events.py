"""What the scheduler is told and what it decides: requests, leases, events, decisions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from anser.core.ledger import Usage
from anser.core.prefix import Chain

__all__ = [
    "Abort",
    "Cancelled",
    "Decision",
    "Event",
    "Failed",
    "Finished",
    "Lease",
    "NodeChanged",
    "NodeGone",
    "Progressed",
    "Refused",
    "Request",
    "Rule",
    "Start",
    "Submitted",
    "Weighed",
    "Why",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One unit of demand: one answer from one model."""

    id: str
    member: str  # the leaf; its ancestors follow from the path (`members.ancestry`)
    model: str
    prompt_tokens: int  # an estimate until the engine answers
    output_tokens_max: int
    factor_milli: int = 1_000  # the model's price factor, in thousandths
    chain: Chain = ()  # its prompt's blocks, for `prefix`
    text_bytes: int = 0  # of the text that the chain was made of
    batch: bool = False  # it takes what nobody else wants
    deadline: float | None = None  # monotonic seconds: the first token is of no use after it

    def __post_init__(self) -> None:
        assert self.prompt_tokens >= 0
        assert self.factor_milli >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one request to one slot of one node until it ends."""

    id: str  # "<request>.<attempt>"
    request: str
    node: str
    model: str
    attempt: int  # from 1


# Events: what the world tells the scheduler.


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A request has arrived and passed its member's limits."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Progressed:
    """A lease has produced `tokens` more completion tokens (coalesced per 100 ms)."""

    lease: str
    tokens: int

    def __post_init__(self) -> None:
        assert self.tokens >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A lease ended by itself, or its abort was confirmed; `usage` is what it generated."""

    lease: str
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The node failed. `retry`: nothing has reached the client, so another node may take over."""

    lease: str
    delivered: Usage
    retry: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancelled:
    """The client no longer wants the answer."""

    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChanged:
    """A node serves these models with this many slots from now on (0: drains)."""

    node: str
    slots: int
    models: frozenset[str]
    cache_tokens: int | None = None  # of prompts, that it keeps; None: it does not tell

    def __post_init__(self) -> None:
        assert self.slots >= 0
        assert self.cache_tokens is None or self.cache_tokens >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGone:
    """A node is lost; its leases have been or will be reported as failed by their owner."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """A member's weight among its siblings, in thousandths, from now on."""

    member: str
    weight: int

    def __post_init__(self) -> None:
        assert self.weight >= 1


Event = Submitted | Progressed | Finished | Failed | Cancelled | NodeChanged | NodeGone | Weighed

# Decisions: what the caller has to do.


class Rule(Enum):
    """By which rule a request was given its slot."""

    FREE = "a slot was free and nobody waited for it"
    LIGHT = "its member had no more in flight than its share, and such go first"
    NEAREST = "of members about as entitled, it gained most from this node's cache"
    LEAST = "its member had had least for its weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why a request was given its slot. Keys are micro-credits per share."""

    rule: Rule
    key: int = 0  # of its member's account
    least_key: int = 0  # of the account that was first
    rivals: int = 0  # other members that were looked at for the slot
    cached_tokens: int = 0  # of its prompt, expected in the node's cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Open the stream of this request on this node."""

    lease: Lease
    request: Request
    why: Why


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The request will not run."""

    request: str
    code: str  # "overloaded" (the queue is full) | "deadline" | "retries_exhausted"
    retry_after_s: float | None = None  # when it would have been served, as far as can be told


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Stop this lease at its engine, then report Finished with what was generated."""

    lease: str


Decision = Start | Refused | Abort
