"""Whether a JSON schema may be handed to an engine as a grammar.

Engines turn a schema into a grammar, and do so in their own process: a reference to itself crashes
one, a web of references fills another's memory, a remote reference makes a third one fetch.
`check_schema` refuses what is dangerous, in time linear in the schema's size; whether the rest
is supported is for the engine to say.

Theory of operation: three passes. The first bounds bytes and depth, so that the others may recurse.
The second visits each subschema once and checks its keywords. The third follows references, with
its own stack, along two kinds of edges: those that stay at the same value (`$ref`, `allOf`,
`anyOf`, ...) must not form a cycle, for such a schema says nothing and grammars recurse on it for
ever; and the size that the schema would have with every reference written out is bounded. A
reference to a schema that is still being measured counts as one: that is honest recursion, as of
a tree.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeGuard

from anser.core import limits
from anser.core.errors import InvalidField
from anser.core.pattern import PatternError, check_pattern

__all__ = ["check_schema", "referred"]

_SAME_VALUE_LISTS = ("allOf", "anyOf", "oneOf")
_SAME_VALUE_ONES = ("not", "if", "then", "else")
_SAME_VALUE_MAPS = ("dependentSchemas",)
_PART_LISTS = ("prefixItems", "items")
_PART_ONES = (
    "items",
    "additionalItems",
    "additionalProperties",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)
_PART_MAPS = ("properties", "patternProperties")
_SHELVES = ("$defs", "definitions")  # written out only where a reference asks for it

_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Written out, "at least 4 and at most 2" is 2^64 - 2 copies in one engine.
_ORDERED = (
    ("minItems", "maxItems"),
    ("minLength", "maxLength"),
    ("minProperties", "maxProperties"),
    ("minimum", "maximum"),
)
_FORBIDDEN = ("$dynamicRef", "$recursiveRef")  # their target depends on the way to them
_TOP_ONLY = ("$id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")  # they would move targets

_INDICES = frozenset(str(index) for index in range(limits.SCHEMA_NODES_MAX))
_Schema = dict[str, object]


def check_schema(schema: object, *, path: str = "response_format") -> None:
    """Raise InvalidField, naming the field at `path`, unless an engine can take it safely."""
    _Check(schema, path).run()


def referred(root: object, pointer: str) -> object:
    """What a reference points to: a JSON pointer (RFC 6901) behind "#"; or None."""
    target = root
    for part in pointer.split("/")[1:]:
        target = _step(target, part.replace("~1", "/").replace("~0", "~"))
    return target


class _Check:
    """One schema under examination."""

    __slots__ = ("_bytes", "_enum_values", "_path", "_root", "_schemas")

    def __init__(self, root: object, path: str) -> None:
        self._root = root
        self._path = path
        self._bytes = 0
        self._enum_values = 0
        self._schemas: dict[int, _Schema] = {}  # every subschema, by its identity

    def run(self) -> None:
        root = self._root
        if not _is_object(root):
            raise self._refusal("must be a JSON object")
        self._measure(root, depth=1)
        self._visit(root)
        self._refuse_cycles()
        self._refuse_explosion(root)

    def _refusal(self, words: str) -> InvalidField:
        return InvalidField(f"The JSON schema {words}.", param=self._path)

    # ------------------------------------------------------------------ first: its size

    def _measure(self, value: object, *, depth: int) -> None:
        if depth > limits.JSON_DEPTH_MAX:
            raise self._refusal(f"is nested deeper than {limits.JSON_DEPTH_MAX} levels")
        self._bytes += 4 + (len(value.encode("utf-8", "replace")) if isinstance(value, str) else 0)
        if self._bytes > limits.SCHEMA_BYTES_MAX:
            raise self._refusal(f"is larger than {limits.SCHEMA_BYTES_MAX} bytes")
        for item in _contents(value):
            self._measure(item, depth=depth + 1)

    # ---------------------------------------------------------- second: each subschema

    def _visit(self, schema: _Schema) -> None:
        self._schemas[id(schema)] = schema
        if len(self._schemas) > limits.SCHEMA_NODES_MAX:
            raise self._refusal(f"has more than {limits.SCHEMA_NODES_MAX} subschemas")
        self._check_shape(schema)
        self._check_texts(schema)
        self._check_values(schema)
        self._check_numbers(schema)
        self._check_names(schema)
        for child in (*_same_value(schema), *_parts(schema), *_mapped(schema, _SHELVES)):
            self._visit(child)

    def _check_shape(self, schema: _Schema) -> None:
        """Where a schema belongs there is one; engines fall over anything else."""
        for key in (*_SAME_VALUE_ONES, *_PART_ONES):
            lists = key in _PART_LISTS and _is_list(schema.get(key))
            if not lists and not _is_schema(schema.get(key, True)):
                raise self._refusal(f"has `{key}` that is not a schema")
        for key in (*_SAME_VALUE_LISTS, *_PART_LISTS):
            schemas = schema.get(key, [True])
            if not _are_schemas(schemas) and not (key in _PART_ONES and not _is_list(schemas)):
                raise self._refusal(f"has `{key}` that is not a list of schemas")
        for key in (*_SAME_VALUE_MAPS, *_PART_MAPS, *_SHELVES):
            schemas = schema.get(key, {})
            if not _is_object(schemas) or not all(map(_is_schema, schemas.values())):
                raise self._refusal(f"has `{key}` that is not an object of schemas")

    def _check_texts(self, schema: _Schema) -> None:
        """Names, types and formats: what they are, and that a terminal can show them."""
        required, kinds = schema.get("required", []), schema.get("type", "object")
        names = [*_object(schema.get("properties")), *_list(required)]
        if not _is_list(required) or not all(isinstance(name, str) for name in names):
            raise self._refusal("has `required` that is not a list of names")
        if any(not each.isprintable() for each in names if isinstance(each, str)):
            raise self._refusal("has a name with a character that cannot be printed")
        listed = kinds if _is_list(kinds) else [kinds]
        if not listed or any(kind not in _TYPES for kind in listed):
            raise self._refusal(f"has a `type` that is none of {', '.join(_TYPES)}")
        if not isinstance(schema.get("format", ""), str):
            raise self._refusal("has a `format` that is not a text")

    def _check_values(self, schema: _Schema) -> None:
        values = _list(schema.get("enum"))
        if "enum" in schema and not values:
            raise self._refusal("has an enum that is not a list of values")
        self._enum_values += len(values)
        if self._enum_values > limits.SCHEMA_ENUM_MAX:
            raise self._refusal(f"has more than {limits.SCHEMA_ENUM_MAX} enum values")
        pattern = schema.get("pattern", "")
        if not isinstance(pattern, str) or len(pattern) > limits.SCHEMA_PATTERN_CHARS_MAX:
            most = limits.SCHEMA_PATTERN_CHARS_MAX
            raise self._refusal(f"has a pattern that is not a text of at most {most} characters")
        try:
            check_pattern(pattern)
        except PatternError as error:
            raise self._refusal(f"has a pattern that {error}") from None

    def _check_numbers(self, schema: _Schema) -> None:
        for key in _COUNTS:
            count = schema.get(key, 0)
            if type(count) is not int or not 0 <= count < 1 << 31:
                raise self._refusal(f"has a {key} that is not a whole number below 2^31")
        for least, most in _ORDERED:
            low, high = schema.get(least), schema.get(most)
            if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
                raise self._refusal(f"has a {least} above its {most}")
        for key in _NUMBERS:
            number = schema.get(key, 0)
            draft_4 = isinstance(number, bool) and key.startswith("exclusive")
            fine = isinstance(number, int | float) and -(2.0**63) < number < 2.0**63
            if not fine or (isinstance(number, bool) and not draft_4):
                raise self._refusal(f"has a {key} that is not a number within 63 bits")

    def _check_names(self, schema: _Schema) -> None:
        for key in (*_FORBIDDEN, *(() if schema is self._root else _TOP_ONLY)):
            if key in schema:
                raise self._refusal(f"has {key} where it is not supported")

    # ------------------------------------------------------------ third: its references

    def _referred(self, schema: _Schema) -> Iterator[_Schema]:
        """The subschema that `$ref` points to: a JSON pointer (RFC 6901) into this document."""
        if "$ref" not in schema:
            return
        pointer = schema["$ref"]
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise self._refusal('has a $ref that does not point into itself ("#/...")')
        target = referred(self._root, pointer)
        found = self._schemas.get(id(target))
        if found is not None:
            yield found
        elif not isinstance(target, bool):
            raise self._refusal("has a $ref to a place where it has no schema")

    def _refuse_cycles(self) -> None:
        """No subschema may be reached from itself without going into a part of the value."""
        done: set[int] = set()
        for start in self._schemas.values():
            self._search(start, done)

    def _search(self, start: _Schema, done: set[int]) -> None:
        """Depth first from `start`; `open_` holds those on the way from it."""
        open_: set[int] = set()
        stack: list[tuple[_Schema, bool]] = [(start, True)]
        while stack:
            schema, entering = stack.pop()
            if not entering:
                open_.discard(id(schema))
                done.add(id(schema))
            elif id(schema) in open_:
                raise self._refusal("has a $ref that leads only back to itself")
            elif id(schema) not in done:
                open_.add(id(schema))
                stack.append((schema, False))
                next_ = (*_same_value(schema), *self._referred(schema))
                stack.extend((child, True) for child in next_)

    def _refuse_explosion(self, root: _Schema) -> None:
        """Bound the number of subschemas that there are once references are written out."""
        sizes: dict[int, int] = {}  # 1 while it is measured
        stack: list[tuple[_Schema, bool]] = [(root, True)]
        while stack:
            schema, entering = stack.pop()
            children = (*_same_value(schema), *_parts(schema), *self._referred(schema))
            if not entering:
                size = 1 + sum(sizes[id(child)] for child in children)
                sizes[id(schema)] = min(size, limits.SCHEMA_EXPANDED_MAX + 1)
            elif id(schema) not in sizes:
                sizes[id(schema)] = 1
                stack.append((schema, False))
                stack.extend((child, True) for child in children)
        if sizes[id(root)] > limits.SCHEMA_EXPANDED_MAX:
            most = limits.SCHEMA_EXPANDED_MAX
            raise self._refusal(f"has more than {most} subschemas once its $refs are written out")


def _is_schema(value: object) -> bool:
    return isinstance(value, bool | dict)


def _are_schemas(value: object) -> bool:
    return _is_list(value) and bool(value) and all(map(_is_schema, value))


def _is_object(value: object) -> TypeGuard[_Schema]:
    return isinstance(value, dict)


def _is_list(value: object) -> TypeGuard[list[object]]:
    return isinstance(value, list)


def _object(value: object) -> _Schema:
    return value if _is_object(value) else {}


def _list(value: object) -> list[object]:
    return value if _is_list(value) else []


def _contents(value: object) -> Iterator[object]:
    for key, item in _object(value).items():
        yield key
        yield item
    yield from _list(value)


def _same_value(schema: _Schema) -> Iterator[_Schema]:
    yield from _listed(schema, _SAME_VALUE_LISTS)
    yield from _single(schema, _SAME_VALUE_ONES)
    yield from _mapped(schema, _SAME_VALUE_MAPS)


def _parts(schema: _Schema) -> Iterator[_Schema]:
    yield from _listed(schema, _PART_LISTS)
    yield from _single(schema, _PART_ONES)
    yield from _mapped(schema, _PART_MAPS)


def _single(schema: _Schema, keys: tuple[str, ...]) -> Iterator[_Schema]:
    yield from _schemas(schema.get(key) for key in keys)


def _listed(schema: _Schema, keys: tuple[str, ...]) -> Iterator[_Schema]:
    for key in keys:
        yield from _schemas(_list(schema.get(key)))


def _mapped(schema: _Schema, keys: tuple[str, ...]) -> Iterator[_Schema]:
    for key in keys:
        yield from _schemas(_object(schema.get(key)).values())


def _schemas(values: Iterable[object]) -> Iterator[_Schema]:
    """Those that are objects; the schemas `true` and `false` need no check."""
    yield from (value for value in values if _is_object(value))


def _step(target: object, key: str) -> object:
    if _is_list(target):
        return target[int(key)] if key in _INDICES and int(key) < len(target) else None
    return _object(target).get(key)
