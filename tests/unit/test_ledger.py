"""The form of a receipt, and what is signed for a batch."""

from __future__ import annotations

from typing import Any

import pytest

from anser.core.errors import ReceiptError
from anser.core.ledger import (
    INTEGER_MAX,
    Outcome,
    Usage,
    batch_message,
    receipt_from_json,
    receipt_json,
)
from tests.receipts import by_node_of, make_receipt


def test_usage_adds_up() -> None:
    """The usage of a request is the sum over its leases."""
    first = Usage(prompt_tokens=5, cached_tokens=2, completion_tokens=3)
    assert first + first == Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=6)


@pytest.mark.parametrize(
    ("prompt", "cached", "completion"),
    [(1, 2, 0), (1, -1, 0), (0, 0, -1), (INTEGER_MAX + 1, 0, 0), (0, 0, INTEGER_MAX + 1)],
)
def test_impossible_usage_cannot_be_made(prompt: int, cached: int, completion: int) -> None:
    """Cached tokens are part of the prompt's; no count is negative or beyond what JSON carries."""
    with pytest.raises(AssertionError):
        Usage(prompt_tokens=prompt, cached_tokens=cached, completion_tokens=completion)


@pytest.mark.parametrize("outcome", Outcome)
def test_receipt_survives_its_json_form(outcome: Outcome) -> None:
    """A receipt is read back from its JSON form as it was, however the request ended."""
    receipt = make_receipt(1, outcome=outcome)
    assert receipt_from_json(receipt_json(receipt)) == receipt


def test_receipts_of_before_there_were_owners_keep_their_form() -> None:
    """A receipt that notes no owner has the form that it was hashed in, and is read back so."""
    before = by_node_of(None, make_receipt(1))
    assert not {"owner", "factor_milli"} & receipt_json(before).keys()
    assert receipt_from_json(receipt_json(before)) == before


def form(**changes: object) -> dict[str, Any]:
    """A receipt's JSON form with some fields changed."""
    return receipt_json(make_receipt(1)) | changes


def old() -> dict[str, Any]:
    """The JSON form of a receipt of before there were owners."""
    return receipt_json(by_node_of(None, make_receipt(1)))


def lease(**changes: object) -> dict[str, Any]:
    """A receipt's JSON form whose lease has some fields changed."""
    leases: Any = receipt_json(make_receipt(1))["leases"]
    return form(leases=[leases[0] | changes])


def usage(**changes: object) -> dict[str, Any]:
    """A receipt's JSON form whose usage has some fields changed."""
    counts = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 0}
    return form(usage=counts | changes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "receipt is not an object."),
        ({}, "receipt.ended_ms is missing."),
        (form(extra=1), "receipt has a field that does not belong there."),
        (form(request=7), "receipt.request is not text."),
        (form(error=7), "receipt.error is not text."),
        (form(outcome="lost"), "receipt.outcome is not an outcome."),
        (form(outcome=[]), "receipt.outcome is not an outcome."),
        (form(leases={}), "receipt.leases is not a list."),
        (form(leases=[7]), "receipt.leases[0] is not an object."),
        (form(usage=None), "receipt.usage is not an object."),
        (form(ended_ms=1.0), "receipt.ended_ms is not a whole number from 0 to 2^53-1."),
        (form(ended_ms=True), "receipt.ended_ms is not a whole number from 0 to 2^53-1."),
        (form(queued_ms=-1), "receipt.queued_ms is not a whole number from 0 to 2^53-1."),
        (
            form(first_token_ms=2**53),
            "receipt.first_token_ms is not a whole number from 0 to 2^53-1.",
        ),
        ({**old(), "owner": ""}, "receipt.factor_milli is missing."),
        ({**old(), "factor_milli": 1}, "receipt.owner is missing."),
        (form(owner=None), "receipt.owner is not text."),
        (form(factor_milli=0), "receipt.factor_milli is not above 0."),
        (lease(node=None), "receipt.leases[0].node is not text."),
        (lease(error=False), "receipt.leases[0].error is not text."),
        (usage(cached_tokens=2), "receipt.usage has more cached than prompt tokens."),
    ],
)
def test_wrong_form_is_named(value: object, message: str) -> None:
    """What is not exactly the form of a receipt is refused, and the first wrong field named."""
    with pytest.raises(ReceiptError) as raised:
        receipt_from_json(value)
    assert raised.value.message == message


def test_a_receipt_may_lack_a_first_token() -> None:
    """A request that failed before its first token has a receipt without that time."""
    assert receipt_from_json(form(first_token_ms=None)).first_token_ms is None


def test_batch_message_tells_root_size_and_time_apart() -> None:
    """What is signed begins with its own context and has fixed places for root, size and time."""
    message = batch_message(root=bytes(range(32)), size=3, signed_ms=5)
    assert message == (
        b"anser receipt batch v1\n" + bytes(range(32)) + b"\0\0\0\0\0\0\0\3" + b"\0\0\0\0\0\0\0\5"
    )
