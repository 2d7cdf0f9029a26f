"""core.schema: which JSON schemas may reach an engine."""

from __future__ import annotations

import pytest

from anser.core import limits
from anser.core.errors import InvalidField
from anser.core.schema import check_schema

TREE = {
    "type": "object",
    "properties": {"children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["children"],
}
PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "https://example.org/person",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 10_000, "pattern": "^[A-Z].*$"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150.5},
        "pet": {"anyOf": [{"$ref": "#/$defs/pet"}, {"type": "null"}]},
        "home": {"$ref": "#/definitions/a~1b~0c"},
        "pair": {"prefixItems": [True, {"const": {"$ref": "http://not.a.reference/"}}]},
        "again": {"$ref": "#/properties/pair/prefixItems/1"},
        "anything": {"$ref": "#/properties/pair/prefixItems/0"},
    },
    "$defs": {"pet": {"enum": ["cat", "dog"]}},
    "definitions": {"a/b~c": {"type": "string"}},
    "dependentSchemas": {"age": {"required": ["name"]}},
    "additionalProperties": False,
}


@pytest.mark.parametrize("schema", [{}, TREE, PERSON])
def test_ordinary_schemas_pass(schema: object) -> None:
    """What people write passes: local references, recursion into parts, booleans, const."""
    check_schema(schema)


def web(depth: int) -> dict[str, object]:
    """Each definition refers twice to the next: 2^depth subschemas when written out."""
    twice = {
        f"a{i}": {
            "properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}, "y": {"$ref": f"#/$defs/a{i + 1}"}}
        }
        for i in range(depth)
    }
    return {"$ref": "#/$defs/a0", "$defs": {**twice, f"a{depth}": {"type": "string"}}}


def nested(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED = {
    "not an object": [1],
    "a remote reference": {"$ref": "http://169.254.169.254/"},
    "a file": {"properties": {"a": {"$ref": "file:///etc/passwd"}}},
    "a reference that is no text": {"$ref": 7},
    "an anchor": {"$ref": "#name"},
    "nothing there": {"$ref": "#/$defs/a"},
    "nothing in a list": {"$ref": "#/anyOf/7", "anyOf": [{}]},
    "no index": {"$ref": "#/anyOf/x", "anyOf": [{}]},
    "no schema there": {"$ref": "#/const", "const": {"type": "string"}},
    "a dynamic reference": {"$dynamicRef": "#/$defs/a"},
    "a base below the top": {"properties": {"a": {"$id": "http://example.org/"}}},
    "itself": {"$ref": "#"},
    "a circle": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
    },
    "an unused circle": {"$defs": {"a": {"$ref": "#/$defs/a"}}},
    "a circle through allOf": {
        "allOf": [{"$ref": "#/$defs/a"}],
        "$defs": {"a": {"$ref": "#/$defs/a"}},
    },
    "a circle through anyOf": {"anyOf": [{"type": "null"}, {"not": {"$ref": "#"}}]},
    "a web": web(40),
    "too deep": nested(limits.JSON_DEPTH_MAX),
    "too many": {"properties": {str(i): {} for i in range(limits.SCHEMA_NODES_MAX)}},
    "too large": {"const": "x" * limits.SCHEMA_BYTES_MAX},
    "an empty enum": {"enum": []},
    "an enum that is no list": {"enum": "ab"},
    "too many enum values": {"enum": list(range(limits.SCHEMA_ENUM_MAX + 1))},
    "a long pattern": {"pattern": "a" * (limits.SCHEMA_PATTERN_CHARS_MAX + 1)},
    "a pattern that is no text": {"pattern": ["a"]},
    "a huge count": {"maxItems": 1 << 31},
    "a negative count": {"minLength": -1},
    "a count that is no number": {"maxLength": "7"},
    "fewer than at least": {"items": {}, "minItems": 4, "maxItems": 2},
    "shorter than at least": {"properties": {"a": {"minLength": 2, "maxLength": 1}}},
    "less than at least": {"minimum": 3.5, "maximum": 3},
    "an exploding pattern": {"pattern": "^((a{0,50}){0,50}){0,50}$"},
    "a huge number": {"maximum": 10**30},
    "a number that is a text": {"minimum": "0"},
    "items that are no schema": {"items": None},
    "a list of no schemas": {"anyOf": []},
    "a list with a number": {"anyOf": [{}, 1]},
    "a choice that is no list": {"oneOf": {}},
    "a prefix that is no list": {"prefixItems": True},
    "properties that are null": {"properties": None},
    "a property that is null": {"properties": {"a": None}},
    "required that is true": {"required": True},
    "required with a number": {"required": [1]},
    "a name with a line end": {"properties": {"a\nb": {}}},
    "a required name that drives terminals": {"required": ["\x9b31m"]},
    "an unknown type": {"type": "nonsense"},
    "a list of no types": {"type": []},
    "a type that is no text": {"type": [{}]},
    "a format that is no text": {"format": 1},
    "a number that is true": {"minimum": True},
}


@pytest.mark.parametrize("schema", REFUSED.values(), ids=REFUSED.keys())
def test_dangerous_schemas_are_refused(schema: object) -> None:
    """What crashes, fills or sends an engine elsewhere is refused, and the field is named."""
    with pytest.raises(InvalidField, match="The JSON schema") as caught:
        check_schema(schema, path="tools[0].function.parameters")
    assert caught.value.param == "tools[0].function.parameters"


def test_a_long_chain_of_references_is_followed() -> None:
    """The check has a stack of its own: no chain exhausts Python's."""
    length = limits.SCHEMA_NODES_MAX - 2
    chain = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(length - 1)}
    check_schema({"$ref": "#/$defs/a0", "$defs": {**chain, f"a{length - 1}": {"type": "null"}}})


def test_a_shared_definition_may_be_used_often() -> None:
    """References to one definition are no circle and no explosion."""
    uses = {str(i): {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]} for i in range(100)}
    check_schema({"properties": uses, "$defs": {"a": {"type": "string"}}})


def test_draft_4_exclusive_bounds_pass() -> None:
    """Draft 4 wrote exclusive bounds as booleans."""
    check_schema({"minimum": 1, "exclusiveMinimum": True})
