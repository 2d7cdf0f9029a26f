"""What callers send, at random: nothing crashes, and nothing but checked fields comes through."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anser.api import sse
from anser.api.auth import bearer_of, check_site, network_of
from anser.api.checks import check_fields
from anser.api.decode import decode_object
from anser.api.errors import body_of, echo
from anser.api.fields import ChatFields, CompletionFields, EmbeddingFields
from anser.api.logprobs import TextLogprobs
from anser.api.messages import engine_message
from anser.api.tools import engine_format, engine_tools
from anser.core.errors import Forbidden, InvalidField, RequestError, Unauthenticated
from anser.core.limits import ECHO_CHARS_MAX

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
)
names = st.text(max_size=8) | st.sampled_from(
    ["role", "content", "type", "text", "function", "name", "id", "tools", "` - at `$.n", "a.b[0]"]
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=20,
)
objects = st.dictionaries(names, values, max_size=6)


@given(objects)
def test_json_is_read_as_the_standard_library_reads_it(value: dict[str, Any]) -> None:
    """Whatever is a JSON object without duplicate keys is read, and as what it is."""
    text = json.dumps(value)
    assert json.dumps(decode_object(text.encode())) == json.dumps(json.loads(text))


@given(objects, st.data())
def test_a_second_key_is_always_found(value: dict[str, Any], data: st.DataObject) -> None:
    """Wherever in an object a key is repeated, the body is refused and the key named."""
    inner: dict[str, Any] = {"one": 1, "two": value}
    spot = data.draw(st.sampled_from(["one", "two"]))
    pairs = [(name, json.dumps(entry)) for name, entry in inner.items()]
    pairs.insert(data.draw(st.integers(0, len(pairs))), (spot, "null"))
    text = ", ".join(f'"{name}": {entry}' for name, entry in pairs)
    depth = data.draw(st.integers(0, 5))
    body = '{"x": ' * depth + "{" + text + "}" + "}" * depth
    with pytest.raises(InvalidField) as caught:
        decode_object(body.encode())
    assert caught.value.param == spot


@given(st.binary(max_size=200) | st.text('{}[]":,\\u0123dex ', max_size=60).map(str.encode))
def test_no_bytes_crash_the_decoder(body: bytes) -> None:
    """Any bytes are an object or the caller's error, and never a third thing."""
    with suppress(RequestError):
        assert isinstance(decode_object(body), dict)


documented = st.sampled_from(
    sorted({*ChatFields.__struct_fields__, *CompletionFields.__struct_fields__})
)


@given(st.dictionaries(documented, values, max_size=5), values, st.booleans())
def test_no_fields_crash_the_checks(
    fields: dict[str, Any],
    messages: Any,
    drop: bool,
) -> None:
    """Any values of documented fields are taken or refused with a path; each refusal is short."""
    bodies: list[tuple[dict[str, Any], Any]] = [
        ({"model": "m", "messages": messages, **fields}, ChatFields),
        ({"model": "m", "prompt": messages, **fields}, CompletionFields),
        ({"model": "m", "input": messages}, EmbeddingFields),
    ]
    for body, kind in bodies:
        fault = fault_of(body, kind, drop_unknown=drop)
        if fault is not None:
            assert fault.param
            assert len(json.loads(body_of(fault))["error"]["message"]) < 500


def fault_of(body: dict[str, Any], kind: Any, *, drop_unknown: bool) -> RequestError | None:
    """Why a body is refused, or None if it is taken."""
    try:
        checked = check_fields(body, kind, drop_unknown=drop_unknown)
        if isinstance(checked, ChatFields):
            engine_tools(checked.tools, checked.tool_choice)
            engine_format(checked.response_format)
    except RequestError as error:
        return error
    return None


part = st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=10)})
content = st.text(max_size=10) | st.lists(part, max_size=3)
call = st.fixed_dictionaries(
    {"id": st.just("c"), "function": st.just({"name": "f", "arguments": "{}"})},
    optional={"type": st.just("function"), "index": st.integers(0, 3)},
)
message = st.one_of(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user"]), "content": content},
        optional={"name": st.text(min_size=1, max_size=5)},
    ),
    st.fixed_dictionaries(
        {"role": st.just("assistant")},
        optional={
            "content": content | st.none(),
            "tool_calls": st.lists(call, max_size=2) | st.none(),
            "reasoning": st.text(max_size=5) | st.none(),
            "reasoning_content": st.text(max_size=5) | st.none(),
            "annotations": values,
            "parsed": values,
            "refusal": st.text(max_size=5) | st.none(),
        },
    ),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": content, "tool_call_id": st.just("c")}
    ),
)
ENGINES = {
    "role",
    "content",
    "name",
    "tool_call_id",
    "tool_calls",
    "reasoning",
    "reasoning_content",
}


@given(st.lists(message, min_size=1, max_size=5))
def test_engines_get_plain_messages_only(messages: list[dict[str, Any]]) -> None:
    """Every documented message becomes text under known names, in a role that templates know."""
    fields = check_fields({"model": "m", "messages": messages}, ChatFields)
    for sent, given_ in zip(map(engine_message, fields.messages), messages, strict=True):
        assert sent.keys() <= ENGINES
        assert sent["role"] in ("system", "user", "assistant", "tool")
        assert isinstance(sent.get("content", ""), str)
        if isinstance(given_.get("content"), str):
            assert sent["content"] == given_["content"]


@given(st.text(max_size=300))
def test_an_echo_is_short_and_printable(text: str) -> None:
    """No caller's text makes an echo long, or unprintable."""
    shown = echo(text)
    assert shown.isprintable()
    assert len(shown) <= ECHO_CHARS_MAX + 3


heads = st.dictionaries(
    st.sampled_from([b"authorization", b"x-api-key", b"host", b"origin", b"sec-fetch-site"]),
    st.text(max_size=30) | st.sampled_from(["Bearer x", "http://[::", "null", "localhost:1"]),
)


@given(heads, st.booleans(), st.text(max_size=40) | st.ip_addresses().map(str))
def test_no_head_crashes_the_door(
    head: dict[bytes, str],
    on_loopback: bool,
    peer: str,
) -> None:
    """Any key, origin and address is let in or refused."""
    with suppress(Unauthenticated):
        bearer_of(head.get)
    with suppress(Forbidden):
        check_site(head.get, on_loopback=on_loopback)
    assert network_of(peer) == network_of(peer)


@given(st.binary(max_size=100))
def test_no_payload_ends_its_event(data: bytes) -> None:
    """Whatever bytes an event carries, it is one event, ended by its own blank line only."""
    event = sse.event(data)
    assert event.startswith(b"data: ")
    assert event.count(b"\n") == 2
    assert event.endswith(b"\n\n")
    assert b"\r" not in event


tokens = st.lists(st.tuples(st.text(max_size=4), st.floats(-20, 0)), max_size=12)


@given(tokens, st.lists(st.integers(1, 4), max_size=12))
def test_logprobs_are_the_same_however_they_are_cut(
    entries: list[tuple[str, float]], cuts: list[int]
) -> None:
    """The lists of a stream's chunks, put together, are the lists of the whole answer."""
    content = [{"token": token, "logprob": value} for token, value in entries]
    whole = TextLogprobs().add({"content": content})
    grown = TextLogprobs()
    rest, parts = content, list[dict[str, Any]]()
    for cut in [*cuts, len(content)]:
        part, rest = rest[:cut], rest[cut:]
        parts += [found] if (found := grown.add({"content": part})) else []
    assert grown.whole() == whole
    if whole is not None:
        offsets = [offset for part in parts for offset in part["text_offset"]]
        assert offsets == whole["text_offset"]
