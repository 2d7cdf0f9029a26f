"""A schema as a grammar of llama.cpp: what it accepts, the schema accepts; the rest is refused."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anser.adapters.llamacpp_grammar import Grammar
from anser.adapters.llamacpp_numbers import Bounds, integers, numbers
from anser.adapters.llamacpp_pattern import pattern_shape
from anser.core.errors import EngineRefused, InvalidField
from anser.core.pattern import PatternError
from tests.gbnf import expression, matcher


def grammar_of(schema: dict[str, Any], *, strict: bool = True) -> str:
    grammar = Grammar()
    rule = grammar.add(schema, path="the.field", strict=strict)
    assert "Grammar of" in repr(grammar)
    return grammar.text(rule)


def tagged(tag: str) -> dict[str, Any]:
    return {"type": "object", "properties": {"k": {"const": tag}}, "required": ["k"]}


NULL = {"type": "null"}
TREE = {"anyOf": [NULL, {"type": "array", "items": {"$ref": "#"}}]}
A_OR_B = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]
TAGS = {"a": tagged("a"), "b": tagged("b")}

# schema, texts that fit, texts that do not
CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({}, ["1", "null", '"a"', '[1, {"a":true}]', "-1.5e3"], ["", "a", "01", "nul", "[1"]),
    ({"title": "T", "x-own": 1}, ["1", "{}"], ["x"]),
    ({"type": "object"}, ["{}", '{"a":1,"b":[]}', '{\n "a": 1\n}'], ["[]", '{"a"}', '{"a":1,}']),
    ({"type": "array"}, ["[]", "[1, 2]"], ["{}", "[1,]"]),
    ({"type": "boolean"}, ["true", "false"], ["null", '"true"']),
    ({"type": ["string", "null"], "maxLength": 1}, ["null", '"a"', '""'], ['"ab"', "1"]),
    ({"enum": ["a", 1, None, {"b": [1]}]}, ['"a"', "1", "null", '{"b": [1]}'], ["a", "2"]),
    ({"enum": ["a", 1], "type": "string"}, ['"a"'], ["1"]),
    ({"enum": [1.0, 1.5, True], "type": "integer"}, ["1.0"], ["1.5", "true"]),
    ({"const": "é\n"}, ['"é\\n"'], ['"é"']),
    ({"const": 1, "enum": [1, 2]}, ["1"], ["2"]),
    (TREE, ["null", "[null, [null]]"], ["[1]", "{}"]),
    ({"anyOf": [False, NULL]}, ["null"], ["1"]),
    ({"oneOf": A_OR_B, "$defs": TAGS}, ['{"k":"a"}', '{"k":"b"}'], ['{"k":"c"}', "{}"]),
    ({"oneOf": [{"type": "integer"}, {"type": ["string", "null"]}]}, ["1", "null"], ["1.5"]),
    ({"oneOf": [{"const": 1}, {"enum": [2, 3]}, False]}, ["1", "3"], ["4"]),
    ({"allOf": [{"$ref": "#/$defs/a"}], "title": "T", "$defs": TAGS}, ['{"k":"a"}'], ["{}"]),
    (
        {"allOf": [TAGS["a"], {"properties": {"z": NULL}}], "required": ["z"]},
        ['{"k":"a","z":null}'],
        ['{"k":"a"}', '{"z":null}'],
    ),
    ({"allOf": [{}, True]}, ["1"], ["x"]),
    # objects
    (
        {"properties": {"a": NULL, "b": {"type": "boolean"}, "c": False}, "required": ["b"]},
        ['{"b":true}', '{"a":null, "b":false}'],
        ["{}", '{"a":null}', '{"b":true,"a":null}', '{"b":true,"c":1}', '{,"b":true}'],
    ),
    ({"properties": {"a": NULL, "b": NULL}}, ["{}", '{"b":null}', '{"a":null,"b":null}'], ["[]"]),
    ({"properties": {"a": True}, "additionalProperties": True}, ['{"a":[1]}', "{}"], ['{"b":1}']),
    ({"required": ["a"], "additionalProperties": NULL}, ['{"a":null}'], ["{}", '{"a":1}']),
    ({"additionalProperties": NULL}, ["{}", '{"x":null}'], ['{"x":1}']),
    ({"type": "object", "additionalProperties": False}, ["{}", "{ }"], ['{"x":1}']),
    ({"type": "object", "minProperties": 1, "maxProperties": 2}, ['{"a":1}'], ["{}"]),
    ({"type": "object", "maxProperties": 0}, ["{}"], ['{"a":1}']),
    (
        {**tagged("a"), "minProperties": 1, "maxProperties": 1, "unevaluatedProperties": True},
        ['{"k":"a"}'],
        ["{}"],
    ),
    # arrays
    ({"items": NULL, "minItems": 1, "maxItems": 2}, ["[null]", "[null,null]"], ["[]", "[1]"]),
    ({"items": NULL, "maxItems": 1, "uniqueItems": False}, ["[]", "[null]"], ["[null,null]"]),
    ({"items": NULL, "maxItems": 0}, ["[]"], ["[null]"]),
    ({"items": False}, ["[]"], ["[1]"]),
    ({"items": NULL, "minItems": 2}, ["[null,null,null]"], ["[null]"]),
    ({"prefixItems": [NULL, True], "items": False}, ['[null, "a"]'], ["[null]", "[null,1,1]"]),
    ({"items": [NULL], "additionalItems": NULL, "minItems": 3}, ["[null,null,null]"], ["[null]"]),
    ({"prefixItems": [NULL, NULL], "maxItems": 1}, ["[null]"], ["[null,null]", "[]"]),
    # strings
    ({"type": "string"}, ['""', '"é😀"', '"\\""', '"\\u000a"'], ['"', '"\n"', '"\\ud83d"']),
    ({"minLength": 2, "maxLength": 3}, ['"ab"', '"a\\n"', '"abc"'], ['"a"', '"abcd"']),
    ({"minLength": 1}, ['"ab"'], ['""']),
    ({"minLength": 1500, "maxLength": 1501}, [f'"{"a" * 1500}"'], [f'"{"a" * 1499}"', '""']),
    ({"maxLength": 1001}, [f'"{"a" * 1001}"', '""'], [f'"{"a" * 1002}"']),
    ({"maxLength": 10_000}, [f'"{"a" * 8000}"'], [f'"{"a" * 10_001}"']),
    ({"pattern": "^a{2,3}$", "minLength": 2, "maxLength": 3}, ['"aaa"'], ['"a"']),
    ({"format": "date"}, ['"2024-02-28"'], ['"2024-02-30"', '"2024-13-01"', '"24-01-01"']),
    ({"format": "time"}, ['"23:59:59Z"', '"01:02:03.5+01:00"'], ['"24:00:00Z"', '"01:02"']),
    ({"format": "date-time"}, ['"2024-02-28T23:59:59Z"'], ['"2024-02-28"']),
    ({"format": "duration"}, ['"P1D"', '"PT5M"', '"P3W"'], ['"P"', '"5"', '"PT"']),
    ({"format": "email"}, ['"a.b@example.org"'], ['"a"', '"a@b"', '"a b@c.de"', '".a@b.cd"']),
    ({"format": "hostname"}, ['"a-b.example"'], ['"-a"', '"a..b"']),
    ({"format": "ipv4"}, ['"127.0.0.1"', '"255.255.255.255"'], ['"256.1.1.1"', '"1.1.1"']),
    ({"format": "ipv6"}, ['"0:0:0:0:0:0:0:1"'], ['"1"', '":::"']),
    ({"format": "uuid"}, ['"00000000-0000-4000-8000-000000000000"'], ['"0"']),
    ({"format": "uri", "minLength": 1}, ['"https://example.org/a"'], ['"example.org"', '"x:y"']),
    # numbers
    ({"type": "integer"}, ["0", "-12"], ["1.0", "01", "1e3"]),
    ({"type": "integer", "minimum": 1, "maximum": 150}, ["1", "99", "150"], ["0", "151", "-1"]),
    ({"type": "number"}, ["0.5", "-3", "1e9"], [".5", "1.", "+1"]),
    ({"minimum": 0, "maximum": 1}, ["0", "0.5", "1", "1.0"], ["1.5", "-0.5", "2"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "good", "bad"), CASES, ids=[str(c[0])[:60] for c in CASES])
def test_what_fits_is_what_the_schema_says(
    schema: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    """Each construct accepts what it should and nothing else, and is written in plain ASCII."""
    grammar = grammar_of(schema)
    assert grammar.isascii()
    assert grammar.replace("\n", "").isprintable()
    fits = matcher(grammar)
    assert [text for text in good if not fits(text)] == []
    assert [text for text in bad if fits(text)] == []


BEYOND: list[tuple[str, dict[str, Any]]] = [
    ("not", {"not": {"type": "null"}}),
    ("if", {"if": {}, "then": {}}),
    ("title", {"$ref": "#/$defs/a", "type": "object", "$defs": TAGS}),
    ("anyOf", {"anyOf": [NULL], "maxLength": 1}),
    ("oneOf", {"oneOf": [NULL, NULL]}),
    ("oneOf", {"oneOf": [{"type": "object"}, {"type": "object"}]}),
    ("oneOf", {"oneOf": [{"type": "string"}, True]}),
    ("oneOf", {"oneOf": [{"const": index} for index in range(65)]}),
    ("allOf", {"allOf": [{"type": "string"}, {"maxLength": 2}]}),
    ("allOf", {"allOf": [TAGS["a"], TAGS["b"]]}),
    ("minLength", {"enum": ["a"], "minLength": 1}),
    ("patternProperties", {"type": "object", "patternProperties": {"a": {}}}),
    ("propertyNames", {"type": "object", "propertyNames": {"maxLength": 1}}),
    ("minProperties", {"properties": {"a": {}}, "minProperties": 1}),
    ("maxProperties", {"properties": {"a": {}}, "maxProperties": 0}),
    ("minProperties", {"type": "object", "minProperties": 2}),
    ("uniqueItems", {"type": "array", "uniqueItems": True}),
    ("contains", {"type": "array", "contains": NULL}),
    ("minItems", {"type": "array", "minItems": 8_002}),
    ("minLength", {"type": "string", "minLength": 8_001}),
    ("minLength", {"pattern": "^a$", "minLength": 2}),
    ("maxLength", {"pattern": "^a+$", "maxLength": 2}),
    ("format", {"format": "regex"}),
    ("format", {"format": "date", "pattern": "^a$"}),
    ("pattern", {"pattern": "^(?=a)b$"}),
    ("multipleOf", {"type": "integer", "multipleOf": 5}),
    ("minimum", {"type": "number", "minimum": 0.5}),
]


@pytest.mark.parametrize(("keyword", "schema"), BEYOND)
def test_what_cannot_be_enforced_is_refused_by_name(keyword: str, schema: dict[str, Any]) -> None:
    """Nothing is silently dropped, unless the caller does not insist."""
    with pytest.raises(EngineRefused, match="strict") as caught:
        grammar_of(schema)
    keyword = "type" if keyword == "title" else keyword
    assert f"`{keyword}`" in caught.value.message or "`maxLength` beside" in caught.value.message
    assert caught.value.param == "the.field"
    matcher(grammar_of(schema, strict=False))


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "a", "type": "integer"},
        {"const": 1, "enum": [2]},
        {"anyOf": [False]},
        {"required": ["a"], "additionalProperties": False},
        {"items": False, "minItems": 1},
        {"type": "object", "additionalProperties": False, "minProperties": 1},
        {"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 3},
    ],
)
def test_what_nothing_fits_is_refused(schema: dict[str, Any]) -> None:
    """A grammar without an answer would stop the engine: it is never written."""
    with pytest.raises(EngineRefused, match="fits no value") as caught:
        grammar_of(schema)
    assert caught.value.param == "the.field"


def test_half_a_character_is_refused() -> None:
    """What cannot be sent as UTF-8 cannot be asked for."""
    with pytest.raises(EngineRefused, match="half a character"):
        grammar_of({"const": "\ud800"})


def test_what_is_dangerous_is_refused_first() -> None:
    """Everything that is written has been checked before."""
    with pytest.raises(InvalidField):
        grammar_of({"$ref": "#"})


def test_long_chains_are_written_without_recursion() -> None:
    """A thousand references one after the other are a thousand rules."""
    shelf: dict[str, Any] = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(900)}
    grammar = grammar_of({"$ref": "#/$defs/a0", "$defs": {**shelf, "a900": NULL}})
    assert grammar.count("::=") > 900


# ------------------------------------------------------------------------------ patterns

PATTERNS: list[tuple[str, list[str], list[str]]] = [
    (r"^\d{3}-[a-z]+$", ["123-ab"], ["12-ab", "x123-ab", "123-", "123-ab "]),
    (r"\d+", ["1", "a1b", "12"], ["", "abc"]),
    (r"^\w+@\w+\.com$", ["a@b.com"], ["a@bxcom", "@b.com"]),
    (r"^a|b$", ["ax", "xb", "a"], ["xa"]),
    (r"^a|^b$", ["ax", "b"], ["bx"]),
    ("", ["", "x"], []),
    ("^$", [""], ["x"]),
    (r"^(?:a|(b)|(?<n>c)|(?P<m>d))$", ["a", "d"], ["e", "ab"]),
    (r"^\S\s\D\W$", ["a x.", "b  -"], ["a 1.", "a xa", "axx."]),
    (r'^"\\\n\t[\b]$', ['"\\\n\t\b'], ["x"]),
    (r"^[^a\s]$", ["b"], ["a", " ", '"', "\\", "\n"]),
    (r"^[\]\-a-c\d-]$", ["]", "-", "b", "7"], ["d"]),
    (r"^\x41\u0042\u{43}[\x61-\u007a]$", ["ABCx"], ["ABCA"]),
    ("^é[à-ü]$", ["éà"], ["éa"]),
    (r"^a{2}b{1,}c{0,1}d*?e??f{0}$", ["aab", "aabbcdde"], ["ab", "aabf"]),
    (r"^.$", ["x", "é", "😀"], ["", "\n", "xx"]),
    (r"^[^]$", ["x"], [""]),
    (r"^\.\/\$$", ["./$"], ["a/$"]),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "good", "bad"), PATTERNS)
def test_patterns_mean_what_they_say(pattern: str, good: list[str], bad: list[str]) -> None:
    """Classes, escapes, anchors and repetitions, in the string as JSON has it."""
    shape = pattern_shape(pattern)
    assert shape.text.isascii()
    written = re.compile(expression(shape.text))
    for text in good:
        assert written.fullmatch(json.dumps(text, ensure_ascii=False)[1:-1])
        assert shape.least <= len(text) <= (len(text) if shape.most is None else shape.most)
    for text in bad:
        assert not written.fullmatch(json.dumps(text, ensure_ascii=False)[1:-1])


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (r"^(?=a)b$", "looks around"),
        (r"^(?<!a)b$", "looks around"),
        (r"^(?i:a)$", "looks around"),
        (r"\bx", r"has \\b"),
        (r"^(a)\1$", r"has \\1"),
        (r"^\p{L}$", r"has \\p"),
        ("^(a$|b)$", "anchor inside"),
        ("^a^b$", "anchor inside"),
        ("^(^a)$", "anchor inside"),
        ("^a$b$", "anchor inside"),
        ("^(a*)*$", "may be empty"),
        ("^(a?)+$", "may be empty"),
        ("^a**$", "cannot be repeated"),
        ("^{a}$", "cannot be repeated"),
        (r"^\x00$", "does not occur"),
        ("^[]$", "does not occur"),
        ("^[b-a]$", "range"),
        (r"^[a-\d]$", "range"),
        ("^a)$", "too many"),
    ],
)
def test_what_a_grammar_cannot_say_is_refused(pattern: str, words: str) -> None:
    """A pattern that would be taken by its letters, or differently, is not taken."""
    with pytest.raises(PatternError, match=words):
        pattern_shape(pattern)


TEXTS = st.text(alphabet='ab01d-=,."\\', max_size=4)


@given(st.text(alphabet='ab()[]|*+?\\^$d-."', max_size=12), st.lists(TEXTS, max_size=8))
def test_what_is_written_matches_no_more(pattern: str, texts: list[str]) -> None:
    """Any string that the written form matches, the pattern matches."""
    assume("[]" not in pattern and "[^]" not in pattern)  # which mean something else to Python
    try:
        shape = pattern_shape(pattern)
    except PatternError:
        return
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        meant = re.compile(pattern)
    written = re.compile(expression(shape.text))
    for text in texts:
        if written.fullmatch(json.dumps(text)[1:-1]):
            assert meant.search(text)
            assert shape.least <= len(text)
            assert shape.most is None or len(text) <= shape.most


# ------------------------------------------------------------------------------- numbers

END = st.none() | st.integers(-1_200, 1_200)


@given(END, END, st.booleans(), st.booleans(), st.integers(-1_500, 1_500))
def test_whole_numbers_keep_their_bounds(
    low: int | None, high: int | None, without_low: bool, without_high: bool, number: int
) -> None:
    """A number fits exactly where it lies within the bounds."""
    bounds = Bounds(low=low, high=high, without_low=without_low, without_high=without_high)
    inside = low is None or (number > low if without_low else number >= low)
    inside = inside and (high is None or (number < high if without_high else number <= high))
    for text, written in ((str(number), integers(bounds)), (f"{number}", numbers(bounds))):
        fits = written is not None and re.fullmatch(expression(written), text) is not None
        assert fits == inside


@given(END, END, st.booleans(), st.booleans(), st.decimals(-1_500, 1_500, places=2))
def test_decimal_numbers_keep_their_bounds(
    low: int | None, high: int | None, without_low: bool, without_high: bool, number: Any
) -> None:
    """The same for numbers with a fraction."""
    bounds = Bounds(low=low, high=high, without_low=without_low, without_high=without_high)
    inside = low is None or (number > low if without_low else number >= low)
    inside = inside and (high is None or (number < high if without_high else number <= high))
    written = numbers(bounds)
    fits = written is not None and re.fullmatch(expression(written), str(number)) is not None
    assert fits == inside or number == 0


@pytest.mark.parametrize(
    ("schema", "bounds"),
    [
        ({"minimum": 1, "exclusiveMinimum": 2}, (2, None, True, False)),
        ({"minimum": 2, "exclusiveMinimum": 1}, (2, None, False, False)),
        ({"maximum": 3, "exclusiveMaximum": True}, (None, 3, False, True)),
        ({"exclusiveMaximum": 3}, (None, 3, False, True)),
        ({"exclusiveMinimum": True}, (None, None, False, False)),
    ],
)
def test_the_tighter_bound_counts(schema: dict[str, Any], bounds: tuple[Any, ...]) -> None:
    """Both drafts' ways to leave a bound out are understood."""
    found = Bounds.of(schema)
    assert (found.low, found.high, found.without_low, found.without_high) == bounds
