"""services.seam: what a client has of an answer, and how another node is asked for the rest."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anser.core.errors import EngineRefused
from anser.core.fleet import EngineKind
from anser.core.limits import SEAM_CHARS_MAX
from anser.ports import Route
from anser.services.chunks import Piece, Tally
from anser.services.seam import Said, go_on, without_role

ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "q"}], "max_tokens": 10}


def piece(delta: dict[str, object], finish: str | None = None) -> Piece:
    """A chat chunk, as it is counted."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return Tally(1, 1).read(json.dumps({"choices": [choice]}).encode())[0]


def said(*texts: str, stop: object = None) -> Said:
    """What a client has that was sent these texts."""
    found = Said.of({**ASKED, "stop": stop})
    for text in texts:
        found.add(piece({"content": text}))
    found.validate()
    assert "secret" not in repr(found), "it may be in a log"
    return found


# What can be gone on with


def test_plain_text_is_kept() -> None:
    """All that was sent, in order, also what is no ASCII; a role or nothing is no text."""
    found = said("Wild ", "gänse 🪿", " secret")
    found.add(piece({"role": "assistant"}))
    assert (found.open, found.text) == (True, "Wild gänse 🪿 secret")


@pytest.mark.parametrize(
    "delta",
    [
        {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
        {"reasoning": "hm"},
        {"reasoning_content": "hm"},
        {"refusal": "no"},
    ],
)
def test_what_is_not_plain_text_is_not_gone_on_with(delta: dict[str, object]) -> None:
    """Nobody can be asked to go on with half a tool call; nothing is kept of such an answer."""
    found = said("a")
    found.add(piece(delta))
    found.add(piece({"content": "b"}))
    found.validate()
    assert (found.open, found.text) == (False, "")


@pytest.mark.parametrize("field", ["tools", "response_format"])
def test_a_grammar_that_would_start_anew_is_not_gone_on_with(field: str) -> None:
    """An engine holds to a form from the first character that it writes itself."""
    assert not Said.of({**ASKED, field: {}}).open


def test_what_is_kept_has_a_limit() -> None:
    """At SEAM_CHARS_MAX characters an answer can still be gone on with, one above it cannot."""
    found = said("x" * SEAM_CHARS_MAX)
    assert found.open
    found.add(piece({"content": "y"}))
    assert (found.open, found.text) == (False, "")


# Stop strings across the seam


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        ("one EN", ["D two"], True),
        ("one E", ["N", "D"], True),
        ("one ", ["END"], False),  # the engine itself finds that
        ("one EN", ["d"], False),
        ("one E", ["xND"], False),
        ("", ["END"], False),
        ("one EN", ["", "D"], True),
        ("one E", ["E", "N", "D"], False),
    ],
)
def test_a_stop_string_that_begins_before_the_seam_is_found(
    before: str, after: list[str], *, found: bool
) -> None:
    """The engine that goes on sees only the end of such a string."""
    text = said(before, stop=["END", "\n\n"])
    text.cut()
    assert any(text.stops_in(piece({"content": each})) for each in after) == found


def test_nothing_is_looked_for_without_a_seam() -> None:
    """An engine finds its stop strings itself."""
    assert not said("EN", stop="END").stops_in(piece({"content": "D"}))


# How the rest is asked for


def test_each_kind_of_engine_is_told_in_its_way() -> None:
    """llama.cpp and Ollama go on with a last turn of the assistant's, vLLM and SGLang if told."""
    turn = {"role": "assistant", "content": "half"}
    for kind, more in (
        (EngineKind.LLAMACPP, {}),
        (EngineKind.OLLAMA, {}),
        (EngineKind.VLLM, {"continue_final_message": True, "add_generation_prompt": False}),
        (EngineKind.SGLANG, {"continue_final_message": True}),
    ):
        body = go_on(ASKED, "half", tokens=4, route=Route.CHAT, kind=kind)
        assert body == {"messages": [*ASKED["messages"], turn], "max_tokens": 6, **more}
    assert ASKED["max_tokens"] == 10


@pytest.mark.parametrize("kind", [EngineKind.OPENAI, EngineKind.TGI, EngineKind.LMDEPLOY])
def test_who_would_begin_a_new_turn_is_not_asked(kind: EngineKind) -> None:
    """Of an unknown engine nobody knows whether it goes on; a text it can always complete."""
    with pytest.raises(EngineRefused, match="cannot go on"):
        go_on(ASKED, "half", tokens=4, route=Route.CHAT, kind=kind)
    body = {"prompt": "q", "max_tokens": 10, "min_tokens": 5}
    rest = go_on(body, " half", tokens=4, route=Route.COMPLETIONS, kind=kind)
    assert rest == {"prompt": "q half", "max_tokens": 6, "min_tokens": 1}


def test_what_the_caller_began_is_gone_on_with() -> None:
    """Where a last turn of the assistant's is a beginning, the answer is the rest of that turn."""
    messages = [*ASKED["messages"], {"role": "assistant", "content": "Once "}]
    body = {**ASKED, "messages": messages, "min_tokens": 2}
    rest: Any = go_on(body, "upon", tokens=4, route=Route.CHAT, kind=EngineKind.LLAMACPP)
    assert rest["messages"][1:] == [{"role": "assistant", "content": "Once upon"}]
    assert rest["min_tokens"] == 0
    rest = go_on(body, "upon", tokens=4, route=Route.CHAT, kind=EngineKind.VLLM)
    assert [turn["content"] for turn in rest["messages"][1:]] == ["Once ", "upon"]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "Once "}]}]
    with pytest.raises(EngineRefused, match="plain text"):
        go_on({**ASKED, "messages": parts}, "a", tokens=1, route=Route.CHAT, kind=EngineKind.OLLAMA)


def test_the_rest_begins_without_a_role() -> None:
    """The client has been told who speaks; a chunk that says nothing else is left out."""
    assert without_role(piece({"role": "assistant", "content": ""})) is None
    kept = without_role(piece({"role": "assistant", "content": "b"}))
    assert kept is not None
    assert json.loads(kept.data)["choices"][0]["delta"] == {"content": "b"}
    text = Tally(1, 1).read(b'{"choices":[{"index":0,"text":"c"}]}')[0]
    data = b'{"choices":[{"index":0,"text":"c"}]}'
    assert without_role(text) == Piece(data=data, text="c", tokens=1)
    ended = without_role(piece({"role": "assistant"}, "stop"))
    assert ended is not None
    assert ended.finish == "stop"
