"""Nodes and what they offer.

A Node is an enrolled machine that runs an engine. An Offer is its statement to serve one model,
valid for a bounded time. A node's slots are shared by all of its offers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, Flag, auto

from anser.core.errors import InvalidField
from anser.core.limits import MODEL_NAME_CHARS_MAX, NODE_MODELS_MAX, NODE_SLOTS_MAX
from anser.core.members import ANONYMOUS, check_member_id

__all__ = [
    "SLOTS_DEFAULT",
    "Ability",
    "Endpoint",
    "EngineKind",
    "EngineReport",
    "Node",
    "Offer",
    "ServedModel",
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
    member: str = ""  # the organisation that owns it; none: the platform

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
    cache_tokens: int | None = None  # how much of the prompts it has read it keeps, if it tells
    listed: int = 0  # models that it has; `models` may be fewer
    platform: str | None = None  # the public key in hex, if it is an Anser platform


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
    member: str = ""  # the node's owner


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
    if node.member:
        _check_owner(node.member)
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
        member=node.member,
    )


def _check_owner(member: str) -> None:
    organisation, slash, _ = check_member_id(member).partition("/")
    if slash:
        message = f"A node is owned by an organisation, not by a part of it: say {organisation}."
        raise _invalid("member", message)
    if member == ANONYMOUS:
        raise _invalid("member", "The anonymous member owns no nodes: leave the owner out.")


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MODEL_NAME_CHARS_MAX and name.isprintable()


def _id_of(endpoint: Endpoint) -> str:
    host = f"ip6-{endpoint.host.replace(':', '-')}" if ":" in endpoint.host else endpoint.host
    path = re.sub(r"[^a-z0-9._-]", "-", endpoint.prefix.lower())
    return f"{host.lstrip('_')}:{endpoint.port}{path}"[:127]


def _invalid(field_: str, message: str) -> InvalidField:
    return InvalidField(message, param=field_)
