"""What can be set: each setting with its type, range, default and meaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from anser.config.timeouts import LONGEST_S, SHORTEST_S, Timeouts, read_timeouts
from anser.core import limits
from anser.core.errors import ConfigError

__all__ = [
    "SECTIONS",
    "Config",
    "EngineSettings",
    "GatewaySettings",
    "MemberSettings",
    "ServerSettings",
    "Setting",
    "Value",
    "settings",
]

Value = str | int | float | bool | tuple[str, ...]
"""What a setting may hold."""

_DAY_S = 86_400.0
_MANY = 1_000_000_000_000


def _setting(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices, "live": live}
    return field(default=default, metadata=metadata)


def _seconds(default: float, doc: str) -> Any:
    return _setting(default, doc, low=SHORTEST_S, high=LONGEST_S, live=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the platform listens and what it takes from clients."""

    host: str = _setting("127.0.0.1", "Address to listen on; loopback unless you say otherwise.")
    port: int = _setting(8000, "Port to listen on; 0 takes a free one.", low=0, high=65_535)
    admin_listen: str = _setting("", "host:port of a separate listener for admin and metrics.")
    trusted_proxies: tuple[str, ...] = _setting(
        (), "Addresses or CIDR blocks of proxies whose word on who asks is taken.", live=True
    )
    proxy_protocol: bool = _setting(
        default=False, doc="Whether trusted proxies say who asks in a PROXY header."
    )
    cors_origins: tuple[str, ...] = _setting(
        (),
        "Origins whose pages may ask with a key, like https://chat.example; * is all.",
        live=True,
    )
    tls_certificate: str = _setting(
        "",
        "PEM file of the certificate and its chain; with it the public address is https.",
        live=True,
    )
    tls_key: str = _setting("", "PEM file of the certificate's private key.", live=True)
    head_bytes_max: int = _setting(
        limits.HEAD_BYTES_MAX, "Longest request head, in bytes.", low=1_024, high=2**20, live=True
    )
    head_timeout_s: float = _seconds(limits.HEAD_TIMEOUT_S, "Longest wait for a head, seconds.")
    body_bytes_max: int = _setting(
        limits.BODY_BYTES_MAX, "Longest request body, in bytes.", low=1_024, high=2**30, live=True
    )
    body_timeout_s: float = _seconds(limits.BODY_TIMEOUT_S, "Longest wait for a body, seconds.")
    write_timeout_s: float = _seconds(
        limits.WRITE_TIMEOUT_S, "How long a client may leave its answer unread, seconds."
    )
    drain_s: float = _setting(
        30.0,
        "How long running answers may go on after SIGTERM, seconds.",
        low=0,
        high=_DAY_S,
        live=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """The engine in this process."""

    enabled: bool = _setting(default=True, doc="Whether to run a model in this process.")
    model: str = _setting(
        "smollm2-135m-instruct", "Model to run: a known name, a GGUF path, or hf:org/repo/file."
    )
    slots: int = _setting(4, "Answers at once.", low=1, high=1_024)
    context_tokens: int = _setting(4096, "Context of each slot, in tokens.", low=128, high=2**24)
    threads: int = _setting(
        0, "Threads for the model; 0 chooses by the machine's cores.", low=0, high=1_024
    )
    batch_tokens: int = _setting(
        128, "Prompt tokens per step; also how soon prefill can stop.", low=1, high=2**16
    )
    mirrors: tuple[str, ...] = _setting(
        (), "Addresses of other Anser platforms that may hold the model's file."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberSettings:
    """Who may use the platform, and how much."""

    anonymous: str = _setting(
        "auto",
        "Use without a key: on, off, or auto (on for loopback).",
        choices=("on", "off", "auto"),
        live=True,
    )
    anonymous_weight: int = _setting(
        1_000, "Weight of all anonymous use, in thousandths.", low=1, high=1_000_000_000
    )
    public_share: float = _setting(
        0.3,
        "Part of the pool that is shared by weights alone, whatever anybody contributes.",
        low=0.01,
        high=1,
        live=True,
    )
    in_flight_max: int = _setting(
        512,
        "Requests per member, waiting and running, unless its own limit is set.",
        low=1,
        high=1_000_000,
        live=True,
    )
    queued_max: int = _setting(
        256,
        "Waiting requests per member, unless its own limit is set.",
        low=1,
        high=1_000_000,
        live=True,
    )
    tokens_per_minute: int = _setting(
        0, "Tokens per minute per member; 0 is no limit.", low=0, high=_MANY, live=True
    )
    tokens_per_day: int = _setting(
        0, "Tokens per day per member; 0 is no limit.", low=0, high=_MANY, live=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """How a request is handled."""

    unknown_fields: str = _setting(
        "refuse",
        "Fields that no engine may see: refuse or drop.",
        choices=("refuse", "drop"),
        live=True,
    )
    queue_timeout_s: float = _seconds(limits.QUEUE_TIMEOUT_S, "Longest wait for a slot, seconds.")
    first_token_timeout_s: float = _seconds(
        limits.FIRST_TOKEN_TIMEOUT_S, "Longest wait for a first token, seconds."
    )
    token_gap_timeout_s: float = _seconds(
        limits.TOKEN_GAP_TIMEOUT_S, "Longest silence between tokens, seconds."
    )
    answer_timeout_s: float = _seconds(
        limits.ANSWER_TIMEOUT_S, "Longest time for a whole answer, from its first slot, seconds."
    )
    queued_max: int = _setting(
        limits.QUEUED_MAX,
        "Waiting requests on the whole platform.",
        low=1,
        high=1_000_000,
        live=True,
    )
    completion_tokens_default: int = _setting(
        limits.COMPLETION_TOKENS_DEFAULT,
        "Longest answer when the caller names none, in tokens.",
        low=1,
        high=2**24,
        live=True,
    )
    continue_answers: bool = _setting(
        default=True,
        doc="Whether another node goes on with an answer whose node has died.",
        live=True,
    )
    hedge: bool = _setting(
        default=False,
        doc="Whether a first token that is late may be asked of a second node.",
        live=True,
    )
    probe_interval_s: float = _seconds(10.0, "How often each node's health is asked, seconds.")
    cache_sharing: str = _setting(
        "platform",
        "Who shares the engines' prompt caches: the platform, or each organisation for itself.",
        choices=("platform", "organisation"),
        live=True,
    )
    model_timeouts: tuple[str, ...] = _setting(
        (), "Times of single models, like: llama-405b queue=600 first_token=900 gap=120.", live=True
    )

    def __post_init__(self) -> None:
        try:
            self._timeouts()
        except ValueError as error:
            path = "gateway.model_timeouts"
            raise ConfigError(f"{path}: {error}.", param=path) from error

    def timeouts(self, model: str) -> Timeouts:
        """How long each stage of a request for this model may take."""
        usual, by_model = self._timeouts()
        return by_model.get(model, usual)

    def _timeouts(self) -> tuple[Timeouts, Mapping[str, Timeouts]]:
        usual = (self.queue_timeout_s, self.first_token_timeout_s, self.token_gap_timeout_s)
        return _timeouts_of(*usual, self.answer_timeout_s, self.model_timeouts)


@lru_cache(maxsize=16)  # asked for each request, and changed by SIGHUP
def _timeouts_of(
    queue_s: float, first_token_s: float, gap_s: float, answer_s: float, entries: tuple[str, ...]
) -> tuple[Timeouts, Mapping[str, Timeouts]]:
    """What holds for all models, and for those that are named. Raises ValueError."""
    usual = Timeouts(
        queue_s=queue_s, first_token_s=first_token_s, token_gap_s=gap_s, answer_s=answer_s
    )
    return usual, read_timeouts(entries, usual)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that can be set."""

    data_dir: Path
    server: ServerSettings = field(default_factory=ServerSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    members: MemberSettings = field(default_factory=MemberSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that can be set: where, to what, and what for."""

    path: str  # "server.port"
    environment: str  # "ANSER_SERVER_PORT"
    default: Value
    doc: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    live: bool = False  # SIGHUP takes it up; else it waits for a restart

    @property
    def wanted(self) -> str:
        """The values that it takes, for people."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        between = f" from {self.low:,.12g} to {self.high:,.12g}" if self.low is not None else ""
        return _KINDS[type(self.default)] + between


SECTIONS: dict[str, type] = {
    "server": ServerSettings,
    "engine": EngineSettings,
    "members": MemberSettings,
    "gateway": GatewaySettings,
}
_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of texts",
}
_DATA_DIR = Setting(
    path="data_dir",
    environment="ANSER_DATA_DIR",
    default="",
    doc="Folder of everything that lasts.",
)


def settings() -> Iterator[Setting]:
    """Every setting, in the order of the reference."""
    yield _DATA_DIR
    for section, kind in SECTIONS.items():
        for item in (one for one in fields(kind) if one.init):
            yield Setting(
                path=f"{section}.{item.name}",
                environment=f"ANSER_{section}_{item.name}".upper(),
                default=cast("Value", item.default),
                doc=item.metadata["doc"],
                low=item.metadata["low"],
                high=item.metadata["high"],
                choices=item.metadata["choices"],
                live=item.metadata["live"],
            )
