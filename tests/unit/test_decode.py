"""api.decode: JSON from a client."""

from __future__ import annotations

import contextlib
import json

import pytest

from anser.api.decode import decode_object
from anser.core.errors import InvalidField, RequestError
from anser.core.limits import JSON_DEPTH_MAX, JSON_MARKS_MAX
from tests.cost import measured


def nested(depth: int) -> bytes:
    """An object whose JSON is `depth` levels deep."""
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


NOT_JSON = {
    "empty": b"",
    "cut off": b'{"a": 1',
    "trailing text": b'{"a": 1} x',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "a number out of range": b'{"a": 1e999}',
    "a number of 5,000 digits": b'{"a": 1' + b"0" * 5_000 + b"}",
    "a lone high surrogate": b'{"a": "\\ud800"}',
    "a high surrogate before a letter": b'{"a": "\\ud800\\u0041"}',
    "a lone low surrogate": b'{"a": "\\udc00"}',
    "bytes that are not UTF-8": b'{"a": "\xff"}',
    "UTF-8 of a surrogate": b'{"a": "\xed\xa0\x80"}',
    "an overlong NUL": b'{"a": "\xc0\x80"}',
    "a byte order mark": b'\xef\xbb\xbf{"a": 1}',
    "a raw line break in a string": b'{"a": "\n"}',
    "an array": b"[1]",
    "a string": b'"model"',
    "null": b"null",
    "single quotes": b"{'a': 1}",
    "a comment": b'{"a": 1} // why',
    "deep and never closed": b"[" * 100_000,
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    """Only a JSON object in UTF-8 passes; everything else is the caller's error."""
    with pytest.raises(RequestError):
        decode_object(body)


@pytest.mark.parametrize(
    ("body", "trouble"),
    [
        (b'{"a": "\\ud800"}', r"a \u escape is one half of a surrogate pair"),
        (b'{"a": "\\ud800 and more"}', "surrogate pair"),
        (b'{"a": "\\udc00"}', "surrogate pair"),
        (b'{"a": "\\ud800', "truncated"),
        (b'{"a": 1', "truncated"),
    ],
)
def test_half_a_surrogate_pair_is_named(body: bytes, trouble: str) -> None:
    """Half a pair is not taken for a body that was cut off, nor the other way round."""
    with pytest.raises(RequestError) as caught:
        decode_object(body)
    assert trouble in caught.value.message


def test_depth_is_refused_beyond_its_limit() -> None:
    """JSON nested JSON_DEPTH_MAX levels deep passes, one more is refused."""
    assert decode_object(nested(JSON_DEPTH_MAX))
    with pytest.raises(RequestError, match="deeper"):
        decode_object(nested(JSON_DEPTH_MAX + 1))


def test_brackets_in_strings_are_not_depth() -> None:
    """Only brackets outside of strings count, whatever is escaped in them."""
    text = '[{"' * 1_000 + '\\"' + "\\\\"
    assert decode_object(json.dumps({"a": text}).encode()) == {"a": text}


def test_marks_are_refused_beyond_their_limit() -> None:
    """A body has at most JSON_MARKS_MAX brackets, colons and commas; those in strings are free."""
    most = JSON_MARKS_MAX - 5
    assert decode_object(b'{"a":[' + b"0," * most + b'"' + b"," * JSON_MARKS_MAX + b'"]}')
    with pytest.raises(RequestError, match="values"):
        decode_object(b'{"a":[' + b"0," * (most + 1) + b"0]}")


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (b'{"model": "a", "model": "b"}', "model"),
        (b'{"a": {"b": 1, "b": 1}}', "b"),
        (b'{"a": [{"x": 0}, {"y": 1, "y": {}}]}', "y"),
        (b'{"\\u0061": 1, "a": 2}', "a"),
        (b'{"a:{}": 1, "b": 2, "a:{}": 3}', "a:{}"),
        (b'{"a" : 1, "b": 2, "b": 3}', "b"),
        (b'{"a": 1, "a"\n:2}', "a"),
        (b'{"a":1,"b":"\\":","a":2}', "a"),
        (b'{"a":1,"\\"":2,"\\"":3}', '"'),
    ],
)
def test_a_key_that_is_there_twice_is_named(body: bytes, name: str) -> None:
    """Duplicate keys are refused at every level, however they are spelled, and named."""
    with pytest.raises(InvalidField) as caught:
        decode_object(body)
    assert caught.value.param == name


def test_values_arrive_as_they_are() -> None:
    """Strings with escapes, colons and quotes, numbers and null are what json reads."""
    value = {"a": 'b"\\:{}[]\u2028\0', "c": [1, -2.5, True, None, {"d:": ""}], "": {}}
    assert decode_object(json.dumps(value).encode()) == value


HOSTILE = {
    "empty arrays": b'{"a":[' + b"[]," * 5_000_000 + b"0]}",
    "backslashes": b'{"a":"' + b"\\\\" * 7_500_000 + b'"}',
    "quotes": b'{"a":[' + b'"",' * 5_000_000 + b'""]}',
    "open brackets": b"[" * 15_000_000,
    "numbers": b'{"a":[' + b"0.1," * 3_700_000 + b"0]}",
    "small objects": b'{"a":[' + b'{"":0},' * 2_000_000 + b"0]}",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bodies_take_bounded_time(body: bytes) -> None:
    """15 MB made to be slow hold the loop for about a second of processor time at most."""
    with measured() as cost, contextlib.suppress(RequestError):
        decode_object(body)
    assert cost.million_steps < 100
