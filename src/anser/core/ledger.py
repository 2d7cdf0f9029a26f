"""Usage and receipts: what a request cost, and the record that it leaves.

Every request leaves exactly one Receipt, whether it finished, failed or was cancelled. A receipt
counts what was *delivered to the client*; the fairness key counts what was generated.

A receipt also has a form in JSON. Its canonical bytes (RFC 8785) are the leaf that is hashed into a
batch; whoever holds them can check the batch's signature. What is read back is checked field by
field, so that one receipt has exactly one form.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import cast

from anser.core.errors import ReceiptError

__all__ = [
    "INTEGER_MAX",
    "LeaseRecord",
    "Outcome",
    "Receipt",
    "Usage",
    "batch_message",
    "read_integer",
    "read_object",
    "read_text",
    "receipt_from_json",
    "receipt_json",
]

INTEGER_MAX = 2**53 - 1  # what JSON carries exactly: RFC 8785, section 3.2.2.3, after RFC 7493
_CONTEXT = b"anser receipt batch v1\n"


class Outcome(Enum):
    """How a request ended."""

    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one request or lease. `cached_tokens` are part of `prompt_tokens`."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.cached_tokens <= self.prompt_tokens <= INTEGER_MAX
        assert 0 <= self.completion_tokens <= INTEGER_MAX

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """One lease as the receipt keeps it. Times are Unix milliseconds."""

    lease: str
    node: str
    started_ms: int
    ended_ms: int
    completion_tokens: int
    error: str | None = None  # the error code, if the node failed

    def __post_init__(self) -> None:
        assert 0 <= self.started_ms <= INTEGER_MAX
        assert 0 <= self.ended_ms <= INTEGER_MAX
        assert 0 <= self.completion_tokens <= INTEGER_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """The record of one request. Times are Unix milliseconds; nothing of any prompt or answer."""

    request: str
    member: str
    model: str
    outcome: Outcome
    error: str | None  # the error code, if it failed
    usage: Usage
    leases: tuple[LeaseRecord, ...]
    queued_ms: int
    first_token_ms: int | None
    ended_ms: int
    owner: str | None = None  # of the node that served it; "": the platform. None: not noted yet
    factor_milli: int = 1_000  # the model's price factor then, in thousandths

    def __post_init__(self) -> None:
        assert 1 <= self.factor_milli <= INTEGER_MAX
        assert self.owner is not None or self.factor_milli == 1_000
        assert 0 <= self.queued_ms <= INTEGER_MAX
        assert 0 <= (self.first_token_ms or 0) <= INTEGER_MAX
        assert 0 <= self.ended_ms <= INTEGER_MAX


_USAGE_KEYS = frozenset({"prompt_tokens", "cached_tokens", "completion_tokens"})
_LEASE_KEYS = frozenset(
    {"lease", "node", "started_ms", "ended_ms", "completion_tokens", "error"},
)
_RECEIPT_KEYS = frozenset(
    {
        "request",
        "member",
        "model",
        "outcome",
        "error",
        "usage",
        "leases",
        "queued_ms",
        "first_token_ms",
        "ended_ms",
    }
)
_OWNER_KEYS = frozenset({"owner", "factor_milli"})  # both or none: receipts of before have neither


def receipt_json(receipt: Receipt) -> dict[str, object]:
    """The receipt as plain JSON values; `receipt_from_json` reads it back.

    Every field is present, but for those that receipts of before there were owners do not have.
    """
    usage = receipt.usage
    found: dict[str, object] = {
        "request": receipt.request,
        "member": receipt.member,
        "model": receipt.model,
        "outcome": receipt.outcome.value,
        "error": receipt.error,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        },
        "leases": [_lease_json(lease) for lease in receipt.leases],
        "queued_ms": receipt.queued_ms,
        "first_token_ms": receipt.first_token_ms,
        "ended_ms": receipt.ended_ms,
    }
    if receipt.owner is not None:
        found |= {"owner": receipt.owner, "factor_milli": receipt.factor_milli}
    return found


def receipt_from_json(value: object) -> Receipt:
    """Read a receipt from plain JSON values; ReceiptError names the first field that is wrong."""
    owned = _notes_owner(value)
    keys = _RECEIPT_KEYS | _OWNER_KEYS if owned else _RECEIPT_KEYS
    fields = read_object(value, keys=keys, where="receipt")
    leases = fields["leases"]
    if not isinstance(leases, list):
        raise ReceiptError("receipt.leases is not a list.")
    return Receipt(
        request=read_text(fields, key="request", where="receipt"),
        member=read_text(fields, key="member", where="receipt"),
        model=read_text(fields, key="model", where="receipt"),
        outcome=_read_outcome(fields),
        error=_read_text_or_none(fields, key="error", where="receipt"),
        usage=_read_usage(fields["usage"]),
        leases=tuple(
            _read_lease(lease, where=f"receipt.leases[{index}]")
            for index, lease in enumerate(cast("list[object]", leases))
        ),
        queued_ms=read_integer(fields, key="queued_ms", where="receipt"),
        first_token_ms=_read_integer_or_none(fields, key="first_token_ms", where="receipt"),
        ended_ms=read_integer(fields, key="ended_ms", where="receipt"),
        owner=read_text(fields, key="owner", where="receipt") if owned else None,
        factor_milli=_read_factor(fields) if owned else 1_000,
    )


def batch_message(*, root: bytes, size: int, signed_ms: int) -> bytes:
    """What is signed for a batch: a context that no other signature has, root, size and time."""
    assert len(root) == 32
    assert 0 < size <= INTEGER_MAX
    assert 0 <= signed_ms <= INTEGER_MAX
    return _CONTEXT + root + size.to_bytes(8, "big") + signed_ms.to_bytes(8, "big")


def read_object(value: object, *, keys: frozenset[str], where: str) -> dict[str, object]:
    """Return `value` if it is a JSON object with exactly these keys, else raise ReceiptError."""
    if not isinstance(value, dict):
        raise ReceiptError(f"{where} is not an object.")
    fields = cast("dict[str, object]", value)
    for key in sorted(keys - fields.keys()):
        raise ReceiptError(f"{where}.{key} is missing.")
    if fields.keys() != keys:
        raise ReceiptError(f"{where} has a field that does not belong there.")
    return fields


def read_integer(fields: dict[str, object], *, key: str, where: str) -> int:
    """Return the whole number under `key`, 0 to 2^53-1, else raise ReceiptError."""
    value = fields[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= INTEGER_MAX:
        raise ReceiptError(f"{where}.{key} is not a whole number from 0 to 2^53-1.")
    return value


def read_text(fields: dict[str, object], *, key: str, where: str) -> str:
    """Return the text under `key`, else raise ReceiptError."""
    value = fields[key]
    if not isinstance(value, str):
        raise ReceiptError(f"{where}.{key} is not text.")
    return value


def _lease_json(lease: LeaseRecord) -> dict[str, object]:
    return {
        "lease": lease.lease,
        "node": lease.node,
        "started_ms": lease.started_ms,
        "ended_ms": lease.ended_ms,
        "completion_tokens": lease.completion_tokens,
        "error": lease.error,
    }


def _read_lease(value: object, *, where: str) -> LeaseRecord:
    fields = read_object(value, keys=_LEASE_KEYS, where=where)
    return LeaseRecord(
        lease=read_text(fields, key="lease", where=where),
        node=read_text(fields, key="node", where=where),
        started_ms=read_integer(fields, key="started_ms", where=where),
        ended_ms=read_integer(fields, key="ended_ms", where=where),
        completion_tokens=read_integer(fields, key="completion_tokens", where=where),
        error=_read_text_or_none(fields, key="error", where=where),
    )


def _read_usage(value: object) -> Usage:
    where = "receipt.usage"
    fields = read_object(value, keys=_USAGE_KEYS, where=where)
    prompt = read_integer(fields, key="prompt_tokens", where=where)
    cached = read_integer(fields, key="cached_tokens", where=where)
    if cached > prompt:
        raise ReceiptError("receipt.usage has more cached than prompt tokens.")
    completion = read_integer(fields, key="completion_tokens", where=where)
    return Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)


def _read_outcome(fields: dict[str, object]) -> Outcome:
    try:
        return Outcome(fields["outcome"])
    except ValueError:
        raise ReceiptError("receipt.outcome is not an outcome.") from None


def _notes_owner(value: object) -> bool:
    return isinstance(value, dict) and bool(_OWNER_KEYS & cast("dict[str, object]", value).keys())


def _read_factor(fields: dict[str, object]) -> int:
    factor = read_integer(fields, key="factor_milli", where="receipt")
    if factor < 1:
        raise ReceiptError("receipt.factor_milli is not above 0.")
    return factor


def _read_text_or_none(fields: dict[str, object], *, key: str, where: str) -> str | None:
    return None if fields[key] is None else read_text(fields, key=key, where=where)


def _read_integer_or_none(fields: dict[str, object], *, key: str, where: str) -> int | None:
    return None if fields[key] is None else read_integer(fields, key=key, where=where)
