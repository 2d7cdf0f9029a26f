"""Members and their keys: who may use the pool, and with which weight.

Members nest: an organisation holds projects, a project holds persons. A member's identifier is its
path, `org`, `org/project` or `org/project/person`, so a parent is known without a look-up. Each
member has a weight among its siblings. The anonymous member is an organisation of fixed weight
whose children are buckets of network addresses (`bucket_of`).
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from ipaddress import ip_address

from anser.core.errors import InvalidField

__all__ = [
    "ANONYMOUS",
    "BUCKETS",
    "KEY_PREFIX",
    "Key",
    "Limits",
    "Member",
    "Scope",
    "ancestry",
    "bucket_of",
    "check_member_id",
    "hash_key",
    "is_key_shaped",
    "key_text",
]

ANONYMOUS = "anonymous"
BUCKETS = 1_024
KEY_PREFIX = "hf_"
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_KEY_LETTERS = 43  # 62**43 > 2**256
_KEY = re.compile(rf"{KEY_PREFIX}[A-Za-z0-9]+\Z")
_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


class Scope(Enum):
    """What a key may do."""

    USE = "use"
    OPERATE = "operate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one member may have at once and over time; `None` is no limit."""

    in_flight_max: int | None = None
    queued_max: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A party that uses compute: an organisation, a project or a person. Weight is milli-shares."""

    id: str
    weight: int = 1_000
    limits: Limits = Limits()
    created_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key as it is stored: never its text, only its keyed hash. Times are Unix seconds."""

    id: str
    hash: bytes
    member: str
    label: str
    scope: Scope = Scope.USE
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None

    def valid(self, wall: float) -> bool:
        """Whether the key opens anything at Unix time `wall`."""
        return self.revoked_at is None and (self.expires_at is None or wall < self.expires_at)


def check_member_id(text: str) -> str:
    """Return `text` if it is one to three path parts of [a-z0-9._-], else raise InvalidField."""
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(_PART.match(part) for part in parts):
        message = (
            "A member is named organisation, organisation/project or organisation/project/person;"
            " each part has 1 to 63 of a-z, 0-9, dot, dash and underscore."
        )
        raise InvalidField(message, param="member")
    return text


@lru_cache(maxsize=16_384)  # asked many times for each request, of the same few members
def ancestry(member: str) -> tuple[str, ...]:
    """The path from the organisation down: `a/b/c` gives `a`, `a/b`, `a/b/c`."""
    parts = member.split("/")
    return tuple("/".join(parts[: depth + 1]) for depth in range(len(parts)))


def key_text(entropy: bytes) -> str:
    """A key's text from 32 random bytes: `hf_` and 43 alphanumerics, as Hugging Face clients want.

    >>> key_text(bytes(32)) == "hf_" + 43 * "A"
    True
    """
    assert len(entropy) == 32
    number, letters = int.from_bytes(entropy, "big"), list[str]()
    for _ in range(_KEY_LETTERS):
        number, digit = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[digit])
    return KEY_PREFIX + "".join(letters)


def is_key_shaped(text: str) -> bool:
    """Whether this could be a key's text: clients send placeholders, too.

    >>> is_key_shaped("hf_abc"), is_key_shaped("EMPTY"), is_key_shaped("hf_")
    (True, False, False)
    """
    return _KEY.match(text) is not None


def hash_key(text: str, *, pepper: bytes) -> bytes:
    """The keyed hash under which a key is stored and looked up (BLAKE2b, RFC 7693, 32 bytes)."""
    return blake2b(text.encode(errors="surrogateescape"), key=pepper, digest_size=32).digest()


def bucket_of(address: str, *, pepper: bytes) -> str:
    """The anonymous member's child for a client address: a keyed hash of its IPv4 /24 or IPv6 /48.

    Nothing that the client chooses decides it, so a new identity gains nothing.
    """
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return f"{ANONYMOUS}/bucket-local"
    mapped = getattr(ip, "ipv4_mapped", None)
    ip = mapped or ip
    network = ip.packed[:3] if ip.version == 4 else ip.packed[:6]
    digest = hmac.digest(pepper, network, "sha256")
    return f"{ANONYMOUS}/bucket-{int.from_bytes(digest[:8], 'big') % BUCKETS}"
