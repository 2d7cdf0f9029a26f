"""api.errors: what a client sees of an error."""

from __future__ import annotations

import json

import pytest

from anser.api.errors import body_of, echo, headers_of, status_of
from anser.core import errors
from anser.core.errors import (
    AnserError,
    ConfigError,
    EngineBroken,
    EngineRefused,
    InvalidField,
    LimitReached,
    ModelNotFound,
    NoNode,
    StoreCorrupt,
)
from anser.core.limits import ECHO_CHARS_MAX

TREE = [getattr(errors, name) for name in errors.__all__]


def detail(error: AnserError) -> dict[str, object]:
    found: dict[str, object] = json.loads(body_of(error))["error"]
    return found


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: str(kind.__name__))
def test_every_error_has_openais_envelope(kind: type[AnserError]) -> None:
    """Each error of the tree becomes {"message", "type", "param", "code"} and a status."""
    error = kind("It failed.")
    assert detail(error) == {
        "message": "It failed.",
        "type": error.kind,
        "param": None,
        "code": error.code,
    }
    assert 400 <= status_of(error) < 600


def test_the_field_at_fault_is_named() -> None:
    """`param` names the field, for machines."""
    assert detail(InvalidField("No.", param="messages[2].role"))["param"] == "messages[2].role"


def test_control_characters_are_escaped() -> None:
    """No line break, escape sequence or other unprintable character leaves as it came."""
    error = ModelNotFound("\x1b[2Jno\nsuch\r\x00\u202emodel", param="a\x07")
    assert detail(error)["message"] == "\\x1b[2Jno\\nsuch\\r\\x00\\u202emodel"
    assert detail(error)["param"] == "a\\x07"


def test_lone_surrogates_in_a_message_are_escaped() -> None:
    """A message that has no UTF-8 still makes an envelope."""
    assert detail(AnserError("a\ud800"))["message"] == "a\\ud800"


def test_an_echo_is_short() -> None:
    """At most ECHO_CHARS_MAX of a caller's characters are repeated, escapes included."""
    assert echo("short") == "'short'"
    assert echo("x" * 10_000_000) == f"'{'x' * ECHO_CHARS_MAX}…'"
    assert len(echo("\n" * 10_000)) == ECHO_CHARS_MAX + 3


@pytest.mark.parametrize(("wait_s", "header"), [(0.0, b"1"), (1.2, b"2"), (60, b"60")])
def test_retry_after_is_whole_seconds(wait_s: float, header: bytes) -> None:
    """`retry-after` is rounded up to whole seconds, at least 1."""
    headers = dict(headers_of(LimitReached("Wait.", retry_after_s=wait_s)))
    assert headers[b"retry-after"] == header


@pytest.mark.parametrize("error", [LimitReached("Wait."), NoNode("None.")])
def test_what_passes_says_when_to_come_back(error: AnserError) -> None:
    """429 and 503 always have a `retry-after`."""
    assert dict(headers_of(error))[b"retry-after"] == b"5"


def test_other_errors_have_no_retry_after() -> None:
    """A caller's own fault does not pass by waiting."""
    assert headers_of(InvalidField("No.")) == []


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("Wrong."),
        StoreCorrupt("Damaged."),
        EngineRefused("No.", status=409),
        LimitReached("Tomorrow.", retry_after_s=80_000),
    ],
)
def test_futile_retries_are_forbidden(error: AnserError) -> None:
    """Clients are told not to try again what cannot succeed soon."""
    assert dict(headers_of(error))[b"x-should-retry"] == b"false"


@pytest.mark.parametrize(("own", "seen"), [(400, 400), (422, 422), (302, 502), (700, 502)])
def test_an_engines_status_is_believed_for_clients_errors_only(own: int, seen: int) -> None:
    """An engine that refuses with something that is no client's error has failed itself."""
    assert status_of(EngineRefused("No.", status=own)) == seen


def test_an_engines_words_are_for_who_asked() -> None:
    """What an engine says stands in the message, and never in the platform's own words."""
    error = EngineBroken.quoting("The engine answered with status 500", "you said secret")
    assert error.message == "The engine answered with status 500: you said secret"
    assert error.own_words == "The engine answered with status 500."
    silent = EngineBroken.quoting("The engine answered with status 500", "")
    assert silent.message == silent.own_words == "The engine answered with status 500."
    assert EngineBroken("It broke off.").own_words == "It broke off."
