"""Nodes, what they offer, and how well they are.

A Node is an enrolled machine that runs an engine. An Offer is its statement to serve one model,
valid for a bounded time. A node's slots are shared by all of its offers.

Theory of operation. `Health` is one node's state machine: it is told what was seen (an answer to
the question what it serves, the end of a whole stream, the passing of time) and says which state
the node is in and how many of its slots may be used. Its breaker opens after a few failures in a
row, or when too many of the last streams failed, so that a node which fails fast does not draw all
traffic; after a back-off that doubles each time it lets one request in at a time, and closes after
a few good ones. What the client did wrong is never told to it.

Invariants: the breaker is open exactly while `retry_at` is set; a node that is draining, down or
behind an open breaker has no slots.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum, Flag, auto

from anser.core.errors import InvalidField
from anser.core.limits import MODEL_NAME_CHARS_MAX, NODE_MODELS_MAX, NODE_SLOTS_MAX

__all__ = [
    "SLOTS_DEFAULT",
    "Ability",
    "Answered",
    "Drained",
    "Endpoint",
    "EngineKind",
    "EngineReport",
    "Health",
    "HealthEvent",
    "HealthRules",
    "Node",
    "NodeState",
    "Offer",
    "Resumed",
    "ServedModel",
    "Silent",
    "StreamFailed",
    "StreamFinished",
    "Ticked",
    "check_node",
    "offers",
    "parse_endpoint",
]


class EngineKind(Enum):
    """The engines that are told apart, because their dialects and extra fields differ."""

    LLAMACPP = "llamacpp"
    VLLM = "vllm"
    SGLANG = "sglang"
    OLLAMA = "ollama"
    LMDEPLOY = "lmdeploy"
    TGI = "tgi"
    MINDIE = "mindie"
    OPENAI = "openai"  # anything else that speaks the OpenAI API


class Ability(Flag):
    """What a model can be asked for."""

    CHAT = auto()  # and plain completions
    EMBEDDINGS = auto()
    BOTH = CHAT | EMBEDDINGS  # also where an engine does not tell: it will say so when asked

    @property
    def words(self) -> list[str]:
        """As the API writes it."""
        return [str(ability.name).lower() for ability in self]


class NodeState(Enum):
    """Where a node is in its life."""

    STARTING = "starting"  # not asked yet, or its engine still loads
    UP = "up"
    SUSPECT = "suspect"  # its breaker is open; let in again by trickle
    DRAINING = "draining"  # finishes what runs, takes nothing new
    DOWN = "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An enrolled machine, as its operator described it; `None` is "ask the engine"."""

    id: str
    url: str  # "builtin:" is the engine in this process
    model: str | None = None  # offer this one only, under this name
    slots: int | None = None
    key_file: str | None = None  # where the engine's own key is read from
    jurisdiction: str | None = None  # ISO 3166-1 alpha-2
    draining: bool = False

    @property
    def own(self) -> bool:
        """Whether it is the engine of the platform's own process."""
        return self.url == "builtin:"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model as an engine names it, with the longest context it takes, in tokens, if it tells."""

    name: str
    context_tokens: int | None = None
    ability: Ability = Ability.BOTH


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What an engine says of itself when asked."""

    kind: EngineKind
    version: str | None
    models: tuple[ServedModel, ...]
    slots: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A node's statement: this model, under this engine name, within these bounds."""

    node: str
    model: str  # as members ask for it
    engine_model: str  # as the engine names it
    engine: EngineKind
    context_tokens: int | None = None
    jurisdiction: str | None = None
    ability: Ability = Ability.BOTH


# How many answers at once each kind of engine gives when it does not tell: what they do as
# installed, or, where that is in the hundreds, as much as one mid-sized accelerator carries.
SLOTS_DEFAULT: Mapping[EngineKind, int] = {
    EngineKind.LLAMACPP: 1,
    EngineKind.VLLM: 32,
    EngineKind.SGLANG: 32,
    EngineKind.OLLAMA: 1,  # OLLAMA_NUM_PARALLEL
    EngineKind.LMDEPLOY: 32,
    EngineKind.TGI: 32,
    EngineKind.MINDIE: 32,
    EngineKind.OPENAI: 8,
}

# Where a node is


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A node's URL, taken apart. `pin` is the SHA-256 of its TLS certificate."""

    scheme: str
    host: str
    port: int
    prefix: str  # what stands before the version in its paths
    version: str  # "v1", of its OpenAI routes
    pin: bytes | None = None

    def path(self, route: str) -> str:
        """Where it answers an OpenAI route that is written with /v1."""
        assert route.startswith("/v1/"), route
        return f"{self.prefix}/{self.version}/{route[4:]}"

    @property
    def place(self) -> tuple[str, int, str]:
        """What two nodes may not share."""
        return self.host, self.port, self.prefix


_URL_CHARS_MAX = 2_048
_URL = re.compile(
    r"(?P<scheme>https?)://"
    r"(?:\[(?P<six>[0-9a-f:.]{2,45})\]|(?P<host>[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9])?))"
    r"(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<prefix>(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*?)(?:/(?P<version>v[0-9]{1,2}))?/?"
    r"(?:#sha256=(?P<pin>[0-9a-f:]{64,95}))?"
)
_ID = re.compile(r"[a-z0-9][a-z0-9._:-]{0,126}")


def parse_endpoint(url: str) -> Endpoint:
    """Take a node's URL apart; it may stand with or without /v1. Raises InvalidField."""
    scheme, mark, rest = url.partition("://")
    authority, slash, path = rest.partition("/")
    path, hash_, fragment = (slash + path).partition("#")
    plain = f"{scheme.lower()}{mark}{authority.lower()}{path}{hash_}{fragment.lower()}"
    match = _URL.fullmatch(plain[: _URL_CHARS_MAX + 1])
    if match is None or len(url) > _URL_CHARS_MAX:
        raise _invalid(
            "url",
            "A node's URL is http:// or https://, a host and perhaps a port and a path, without "
            "user, password or query; #sha256= and 64 hex digits may pin its certificate.",
        )
    pin = (match["pin"] or "").replace(":", "")
    port = int(match["port"] or {"http": 80, "https": 443}[match["scheme"]])
    if not 0 < port < 65_536:
        raise _invalid("url", f"{port} is not a port.")
    if pin and (len(pin) != 64 or match["scheme"] != "https"):
        raise _invalid("url", "A pin is the SHA-256 of an https certificate: 64 hex digits.")
    return Endpoint(
        scheme=match["scheme"],
        host=match["six"] or match["host"],
        port=port,
        prefix=match["prefix"],
        version=match["version"] or "v1",
        pin=bytes.fromhex(pin) or None,
    )


def check_node(node: Node) -> Node:
    """The node with its fields checked, and an id made from its URL if it has none.

    Raises InvalidField.
    """
    endpoint = parse_endpoint(node.url)
    id_ = node.id or _id_of(endpoint)
    if not _ID.fullmatch(id_):
        raise _invalid("id", "A node's id has lower-case letters, digits and . _ : - in it.")
    if node.slots is not None and not 1 <= node.slots <= NODE_SLOTS_MAX:
        raise _invalid("slots", f"Slots are a number from 1 to {NODE_SLOTS_MAX}.")
    if node.model is not None and not _is_name(node.model):
        raise _invalid("model", "A model's name is printable and not too long.")
    place = None if node.jurisdiction is None else node.jurisdiction.upper()
    if place is not None and not re.fullmatch(r"[A-Z]{2}", place):
        raise _invalid("jurisdiction", "A jurisdiction is two letters of ISO 3166-1, such as DE.")
    return replace(node, id=id_, jurisdiction=place)


def offers(node: Node, report: EngineReport) -> tuple[Offer, ...]:
    """What a node offers, given what its engine serves: all of it, or the one model it names."""
    served = [model for model in report.models if _is_name(model.name)][:NODE_MODELS_MAX]
    if node.model is None:
        return tuple(_offer(node, report.kind, model.name, model) for model in served)
    chosen = [model for model in served if model.name == node.model]
    if not chosen and len(served) == 1:
        chosen = served
    return tuple(_offer(node, report.kind, node.model, model) for model in chosen)


def _offer(node: Node, kind: EngineKind, name: str, model: ServedModel) -> Offer:
    return Offer(
        node=node.id,
        model=name,
        engine_model=model.name,
        engine=kind,
        context_tokens=model.context_tokens,
        jurisdiction=node.jurisdiction,
        ability=model.ability,
    )


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MODEL_NAME_CHARS_MAX and name.isprintable()


def _id_of(endpoint: Endpoint) -> str:
    host = f"ip6-{endpoint.host.replace(':', '-')}" if ":" in endpoint.host else endpoint.host
    path = re.sub(r"[^a-z0-9._-]", "-", endpoint.prefix.lower())
    return f"{host.lstrip('_')}:{endpoint.port}{path}"[:127]


def _invalid(field_: str, message: str) -> InvalidField:
    return InvalidField(message, param=field_)


# How well a node is


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRules:
    """When a breaker opens and closes."""

    failures_max: int = 3  # in a row
    window: int = 20  # streams that the ratio looks at
    window_min: int = 10  # and how many it needs to say anything
    ratio: float = 0.5  # of failed streams, at which the breaker opens
    backoff_s: float = 2.0  # the first, which then doubles
    backoff_max_s: float = 120.0
    trials: int = 3  # good streams in a row that close it
    silent_max: int = 2  # questions unanswered in a row that make a node down


@dataclass(frozen=True, slots=True)
class Answered:
    """Asked what it serves, it told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """Asked what it serves, it did not tell. `loading`: its engine is known to be starting."""

    loading: bool = False


@dataclass(frozen=True, slots=True)
class StreamFinished:
    """A stream came to its proper end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFailed:
    """A stream failed by the node's fault. `jitter`, 0 to 1, adds up to 1/4 to the back-off."""

    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Drained:
    """It shall take nothing new."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """It shall take requests again."""


@dataclass(frozen=True, slots=True)
class Ticked:
    """Time has passed."""


HealthEvent = Answered | Silent | StreamFinished | StreamFailed | Drained | Resumed | Ticked


class _Reach(Enum):
    UNKNOWN = "unknown"
    GOOD = "good"
    LOST = "lost"


class _Breaker(Enum):
    CLOSED = "closed"
    OPEN = "open"
    TRIAL = "trial"


@dataclass(slots=True)
class Health:
    """One node's health: `handle(event, now)`, with `now` in monotonic seconds."""

    rules: HealthRules = HealthRules()
    retry_at: float | None = None  # when an open breaker lets the first request in
    _draining: bool = False
    _reach: _Reach = _Reach.UNKNOWN
    _breaker: _Breaker = _Breaker.CLOSED
    _silent: int = 0  # questions unanswered in a row
    _failed: int = 0  # streams failed in a row
    _good: int = 0  # streams finished in a row
    _opened: int = 0  # times in a row that the breaker opened: the back-off's exponent
    _recent: deque[bool] = field(default_factory=deque[bool])

    def __repr__(self) -> str:
        return (
            f"<Health {self.state.value} breaker={self._breaker.value} silent={self._silent}"
            f" failed={self._failed} opened={self._opened} retry_at={self.retry_at}>"
        )

    def validate(self) -> None:
        """Assert the invariants."""
        assert (self._breaker is _Breaker.OPEN) == (self.retry_at is not None), self
        assert len(self._recent) <= self.rules.window, self
        assert self._breaker is _Breaker.CLOSED or not self._recent, self
        assert min(self._silent, self._failed, self._good, self._opened) >= 0, self
        assert not (self._failed and self._good), self

    @property
    def state(self) -> NodeState:
        """Where the node is in its life."""
        if self._draining:
            return NodeState.DRAINING
        if self._reach is _Reach.UNKNOWN:
            return NodeState.STARTING
        if self._reach is _Reach.LOST:
            return NodeState.DOWN
        return NodeState.UP if self._breaker is _Breaker.CLOSED else NodeState.SUSPECT

    def slots(self, slots: int) -> int:
        """How many of the node's slots may be used now."""
        match self.state, self._breaker:
            case NodeState.UP, _:
                return slots
            case NodeState.SUSPECT, _Breaker.TRIAL:
                return min(slots, 1)
            case _:
                return 0

    def handle(self, event: HealthEvent, now: float) -> NodeState:
        """Take what was seen at `now`; returns the state that follows."""
        if self.retry_at is not None and now >= self.retry_at:
            self._breaker, self.retry_at = _Breaker.TRIAL, None
            self._good = self._failed = 0
        match event:
            case Answered():
                self._reach, self._silent = _Reach.GOOD, 0
            case Silent(loading=loading):
                self._unanswered(loading=loading)
            case StreamFinished():
                self._finished()
            case StreamFailed(jitter=jitter):
                self._fail(now, jitter)
            case Drained():
                self._draining = True
            case Resumed():
                self._draining = False
            case _:  # Ticked: what time does has been done above
                pass
        return self.state

    def _unanswered(self, *, loading: bool) -> None:
        self._silent += 1
        if self._reach is _Reach.UNKNOWN:
            if not loading:
                self._reach = _Reach.LOST
        elif self._silent >= self.rules.silent_max:
            self._reach = _Reach.LOST

    def _finished(self) -> None:
        self._silent = 0  # who streams is alive, though too busy for questions
        if self._breaker is _Breaker.OPEN:
            return  # begun before it opened
        self._failed = 0
        self._good += 1
        if self._breaker is _Breaker.CLOSED:
            self._note(good=True)
            if self._good >= self.rules.window:
                self._opened = 0
        elif self._good >= self.rules.trials:
            self._breaker, self._good = _Breaker.CLOSED, 0

    def _fail(self, now: float, jitter: float) -> None:
        assert 0.0 <= jitter <= 1.0, jitter
        if self._breaker is _Breaker.OPEN:
            return
        self._good = 0
        self._failed += 1
        if self._breaker is _Breaker.CLOSED:
            self._note(good=False)
            if self._failed < self.rules.failures_max and not self._too_many():
                return
        doubled = self.rules.backoff_s * 2.0 ** min(self._opened, 32)
        self.retry_at = now + min(doubled, self.rules.backoff_max_s) * (1.0 + jitter / 4.0)
        self._breaker = _Breaker.OPEN
        self._opened += 1
        self._recent.clear()

    def _note(self, *, good: bool) -> None:
        self._recent.append(good)
        if len(self._recent) > self.rules.window:
            self._recent.popleft()

    def _too_many(self) -> bool:
        failed = self._recent.count(False)
        enough = len(self._recent) >= self.rules.window_min
        return enough and failed >= self.rules.ratio * len(self._recent)
