"""Receipts for tests: plausible ones that differ where a test says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import strategies as st

from anser.core import tlog
from anser.core.ledger import (
    INTEGER_MAX,
    LeaseRecord,
    Outcome,
    Receipt,
    Usage,
    batch_message,
)
from anser.ports import SignedBatch, Signer
from anser.services.receipt_file import leaf_of

__all__ = ["by_node_of", "make_batch", "make_receipt", "receipts"]

_NOON_MS = 1_800_000_000_000


def make_receipt(
    number: int,
    *,
    member: str = "lab/ocean/mei",
    model: str = "smollm2-135m-instruct",
    outcome: Outcome = Outcome.FINISHED,
    ended_ms: int | None = None,
    usage: Usage | None = None,
) -> Receipt:
    """The receipt of request `number`; later numbers end later."""
    begun_ms = _NOON_MS + 1_000 * number
    used = usage or Usage(prompt_tokens=100 + number, cached_tokens=20, completion_tokens=50)
    failed = outcome is Outcome.FAILED
    lease = LeaseRecord(
        lease=f"request-{number}.1",
        node="builtin",
        started_ms=begun_ms,
        ended_ms=begun_ms + 900,
        completion_tokens=used.completion_tokens,
        error="engine_stalled" if failed else None,
    )
    return Receipt(
        request=f"request-{number}",
        member=member,
        model=model,
        outcome=outcome,
        error="engine_stalled" if failed else None,
        usage=used,
        leases=(lease,),
        queued_ms=begun_ms,
        first_token_ms=begun_ms + 100,
        ended_ms=begun_ms + 900 if ended_ms is None else ended_ms,
        owner="",
    )


def by_node_of(owner: str | None, receipt: Receipt) -> Receipt:
    """This receipt, of a request that a node of `owner` served."""
    return replace(receipt, owner=owner)


def make_batch(
    receipts: Sequence[Receipt], signer: Signer, *, signed_ms: int = _NOON_MS
) -> SignedBatch:
    """These receipts as one truly signed batch."""
    leaves = tuple(leaf_of(receipt) for receipt in receipts)
    root = tlog.root_hash([tlog.leaf_hash(leaf) for leaf in leaves])
    message = batch_message(root=root, size=len(leaves), signed_ms=signed_ms)
    return SignedBatch(
        leaves=leaves,
        receipts=tuple(receipts),
        root=root,
        public_key=signer.public_key,
        signature=signer.sign(message),
        signed_ms=signed_ms,
    )


_texts = st.text(max_size=20)
_integers = st.integers(min_value=0, max_value=INTEGER_MAX)
_usages = st.tuples(_integers, _integers, _integers).map(
    lambda three: Usage(
        prompt_tokens=max(three[:2]), cached_tokens=min(three[:2]), completion_tokens=three[2]
    )
)
_leases = st.builds(
    LeaseRecord,
    lease=_texts,
    node=_texts,
    started_ms=_integers,
    ended_ms=_integers,
    completion_tokens=_integers,
    error=st.none() | _texts,
)
_plain = st.builds(
    Receipt,
    request=_texts,
    member=_texts,
    model=_texts,
    outcome=st.sampled_from(Outcome),
    error=st.none() | _texts,
    usage=_usages,
    leases=st.lists(_leases, max_size=3).map(tuple),
    queued_ms=_integers,
    first_token_ms=st.none() | _integers,
    ended_ms=_integers,
)
_factors = st.integers(min_value=1, max_value=INTEGER_MAX)
receipts: st.SearchStrategy[Receipt] = _plain | st.builds(
    lambda receipt, owner, factor: replace(receipt, owner=owner, factor_milli=factor),
    _plain,
    _texts,
    _factors,
)
"""Any receipt at all, also absurd ones."""
