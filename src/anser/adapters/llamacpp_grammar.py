"""A JSON schema as a grammar of llama.cpp (GBNF).

llama.cpp can turn a schema into a grammar by itself, but leaves out what it does not know, writes
what it does not understand to the error output, and takes patterns by their letters. So it never
sees a schema. What is written here accepts only what the schema accepts. It may accept less: a
closed set of properties in their order, no additional ones beside them. What cannot be written is
refused by name, or, where the caller does not insist (`strict` false), left out.

Theory of operation: a schema is a rule; rules that it needs are put on a list and written in turn,
so references may go round and no depth of them matters. Rules have numbers for names, and texts are
written in ASCII: nothing of the caller's is in a grammar but within its literals.
"""

from __future__ import annotations

import itertools
import json
from collections import deque
from dataclasses import dataclass
from typing import Any, NoReturn

from anser.adapters.llamacpp_json import is_list, is_object
from anser.adapters.llamacpp_numbers import Bounds, integers, numbers
from anser.adapters.llamacpp_pattern import Shape, in_quotes, pattern_shape
from anser.core.errors import EngineRefused
from anser.core.pattern import PatternError
from anser.core.schema import check_schema, referred

__all__ = ["Grammar"]

_PRIMITIVES = r"""
ws ::= | " " | "\n" [ \t]{0,20}
char ::= [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" ([0-9a-cA-Ce-fE-F] hex | [dD] [0-7]) hex{2})
hex ::= [0-9a-fA-F]
string ::= "\"" char* "\""
number ::= "-"? ("0" | [1-9] [0-9]{0,14}) ("." [0-9]{1,15})? ([eE] [+-]? [0-9]{1,2})?
array ::= "[" ws (value ("," ws value)* ws)? "]"
object ::= "{" ws (pair ("," ws pair)* ws)? "}"
pair ::= string ":" ws value
value ::= object | array | string | number | "true" | "false" | "null"
"""

_KINDS = ("object", "array", "string", "integer", "number", "boolean", "null")
_FIXED = {"boolean": '"true" | "false"', "null": '"null"', "any": "value"}
_SIGNS = {  # keywords that tell what is meant where no type is given
    "object": ("properties", "required", "additionalProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_BEYOND = {  # keywords that a grammar cannot express, by what they are about
    "object": (
        *("patternProperties", "dependentRequired", "dependentSchemas", "dependencies"),
        *("propertyNames", "unevaluatedProperties"),
    ),
    "array": ("uniqueItems", "contains", "unevaluatedItems"),
    "integer": ("multipleOf",),
    "number": ("multipleOf",),
}
_ANYWHERE = ("not", "if")
_COMBINED = ("$ref", "anyOf", "oneOf", "allOf")
_NOTES = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "$comment", "$defs", "definitions", "discriminator"),
}
_EMPTY = {"uniqueItems": (False,), "unevaluatedProperties": (True,), "unevaluatedItems": (True,)}
_CHUNK = 1_000  # llama.cpp takes counts up to 2,000, and any above for "as often as you like"
_COUNT_MAX = 8_000

_HOST = "[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?){0,4}"
_DATE = (
    "[12][0-9]{3}-((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)"
    "|02-(0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = (
    "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
)
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": _DATE + "T" + _TIME,
    "duration": "P([0-9]{1,4}D(T[0-9]{1,4}[HMS])?|T([0-9]{1,4}H)?[0-9]{1,4}M([0-9]{1,4}S)?"
    "|T[0-9]{1,4}[HS]|[0-9]{1,4}W)",
    "email": "[a-zA-Z0-9]([a-zA-Z0-9_+-]{0,30}[a-zA-Z0-9])?(\\.[a-zA-Z0-9]{1,20}){0,2}@"
    "([a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?\\.){1,3}[a-z]{2,10}",
    "hostname": _HOST,
    "ipv4": f"({_BYTE}\\.){{3}}{_BYTE}",
    "ipv6": "([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "uri": f"https?://{_HOST}(/[a-zA-Z0-9._~-]{{1,60}}){{0,6}}/?",
}


class _NothingFitsError(Exception):
    """No value fits."""


class Grammar:
    """Rules in the making; several schemas may share one grammar."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._count = 0

    def __repr__(self) -> str:
        return f"<Grammar of {self._count} rules>"

    def add(self, schema: dict[str, Any], *, path: str, strict: bool) -> str:
        """The name of a rule for this schema. Raises InvalidField, EngineRefused."""
        check_schema(schema, path=path)
        return _Writer(self, schema, path, strict=strict).write()

    def new(self, text: str) -> str:
        """The name of a rule that says `text`."""
        name = self.name()
        self.put(name, text)
        return name

    def name(self) -> str:
        """A name for a rule that is yet to be written."""
        self._count += 1
        return f"r{self._count}"

    def put(self, name: str, text: str) -> None:
        """Write a rule that has been named."""
        self._rules.append(f"{name} ::= {text}")

    def text(self, root: str) -> str:
        """The grammar, which begins with what `root` says."""
        return "\n".join((f"root ::= {root}", *self._rules)) + _PRIMITIVES


@dataclass(frozen=True, slots=True)
class _Kept:
    """A schema and the rule that it is; kept, so that its identity is not used again."""

    schema: dict[str, Any]
    rule: str


class _Writer:
    """Writes one schema into a grammar."""

    __slots__ = ("_grammar", "_known", "_path", "_root", "_strict", "_todo")

    def __init__(self, grammar: Grammar, root: dict[str, Any], path: str, *, strict: bool) -> None:
        self._grammar = grammar
        self._root = root
        self._path = path
        self._strict = strict
        self._known: dict[int, _Kept] = {}
        self._todo: deque[_Kept] = deque()

    def write(self) -> str:
        try:
            top = self._rule(self._root)
            while self._todo:
                kept = self._todo.popleft()
                self._grammar.put(kept.rule, self._value(kept.schema))
        except _NothingFitsError:
            raise EngineRefused(
                "A part of this JSON schema fits no value at all.", param=self._path
            ) from None
        return top

    def _rule(self, schema: Any) -> str:
        if schema is True or schema == {}:
            return "value"
        if schema is False:
            raise _NothingFitsError
        kept = self._known.get(id(schema))
        if kept is None:
            kept = self._known[id(schema)] = _Kept(schema, self._grammar.name())
            self._todo.append(kept)
        return kept.rule

    def _beyond(self, keyword: str, words: str = "") -> None:
        """Refuse what a grammar cannot express, unless it may be left out."""
        if self._strict:
            self._refuse(f"`{keyword}`{words}")

    def _refuse(self, what: str) -> NoReturn:
        raise EngineRefused(
            f"The engine in this process cannot enforce {what} of this JSON schema. Leave it out, "
            "or set `strict` to false, which lets what cannot be enforced go.",
            param=self._path,
        )

    # ------------------------------------------------------------------ one value

    def _value(self, schema: dict[str, Any]) -> str:
        for keyword in _ANYWHERE:
            if keyword in schema:
                self._beyond(keyword)
        if "allOf" in schema:
            return self._rule(self._merged(schema))
        for keyword in ("$ref", "anyOf", "oneOf"):
            if keyword in schema:
                self._check_alone(schema, keyword)
                return self._combined(schema, keyword)
        if "enum" in schema or "const" in schema:
            return self._literals(schema)
        kinds = schema.get("type")
        if is_list(kinds):
            return self._either([{**schema, "type": kind} for kind in kinds])
        return self._of_kind(kinds or _implied(schema), schema)

    def _check_alone(self, schema: dict[str, Any], keyword: str) -> None:
        beside = [key for key in schema if key != keyword and _constrains(key)]
        if beside:
            self._beyond(beside[0], f" beside `{keyword}`")

    def _combined(self, schema: dict[str, Any], keyword: str) -> str:
        if keyword == "$ref":
            return self._rule(referred(self._root, schema["$ref"]))
        if keyword == "oneOf" and not _apart([self._seen(each) for each in schema["oneOf"]]):
            self._beyond("oneOf", " whose choices may overlap (say `anyOf`)")
        return self._either(schema[keyword])

    def _seen(self, schema: Any) -> Any:
        """The schema that a mere reference stands for."""
        for _ in range(8):
            if not is_object(schema) or "$ref" not in schema:
                break
            schema = referred(self._root, schema["$ref"])
        return schema

    def _either(self, schemas: list[Any]) -> str:
        rules = [self._rule(schema) for schema in schemas if schema is not False]
        if not rules:
            raise _NothingFitsError
        return " | ".join(rules)

    def _merged(self, schema: dict[str, Any]) -> Any:
        """One schema that says what all of `allOf` say, where they are objects apart."""
        rest = {key: value for key, value in schema.items() if key != "allOf" and _constrains(key)}
        parts = [self._seen(part) for part in (rest, *schema["allOf"]) if part not in ({}, True)]
        if len(parts) < 2:
            return parts[0] if parts else {}
        whole: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        for part in parts:
            plain = is_object(part) and all(key in whole for key in part if _constrains(key))
            if not plain or part.get("type", "object") != "object":
                self._beyond("allOf", " (of other than objects with properties alone)")
                continue
            properties = part.get("properties", {})
            if set(properties) & set(whole["properties"]):
                self._beyond("allOf", " (with a property twice)")
            whole["properties"].update(properties)
            whole["required"] += part.get("required", [])
        return whole

    def _literals(self, schema: dict[str, Any]) -> str:
        for key in schema:
            if key not in {"enum", "const", "type"} and _constrains(key):
                self._beyond(key, " beside `enum` or `const`")
        values = [schema["const"]] if "const" in schema else schema["enum"]
        if "const" in schema and schema["const"] not in schema.get("enum", values):
            raise _NothingFitsError
        kinds = schema.get("type", list(_KINDS))
        kinds = kinds if is_list(kinds) else [kinds]
        fitting = [value for value in values if any(_is(value, kind) for kind in kinds)]
        if not fitting:
            raise _NothingFitsError
        return " | ".join(self._literal(value) for value in fitting)

    def _literal(self, value: Any) -> str:
        text = json.dumps(value, ensure_ascii=False, separators=(", ", ": "))
        if any(0xD800 <= ord(char) < 0xE000 for char in text):
            self._refuse("half a character in a text")
        return in_quotes(text)

    def _of_kind(self, kind: str, schema: dict[str, Any]) -> str:
        for keyword in _BEYOND.get(kind, ()):
            if keyword in schema and schema[keyword] not in _EMPTY.get(keyword, ()):
                self._beyond(keyword)
        if kind in _FIXED:
            return _FIXED[kind]
        writers = {"object": self._object, "array": self._array, "string": self._string}
        writer = writers.get(kind)
        return self._number(schema, kind) if writer is None else writer(schema)

    # ---------------------------------------------------------------- objects, arrays

    def _object(self, schema: dict[str, Any]) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not properties and not required:
            return self._dictionary(schema, others)
        wanted = {name: properties.get(name, others) for name in (*properties, *required)}
        if schema.get("minProperties", 0) > len(set(required)):
            self._beyond("minProperties")
        if schema.get("maxProperties", len(wanted)) < len(wanted):
            self._beyond("maxProperties")
        return f'"{{" ws {self._pairs(wanted, set(required))} ws "}}"'

    def _pairs(self, wanted: dict[str, Any], required: set[str]) -> str:
        """Properties in their order, each with a comma before it unless it is the first."""
        after, first = '""', '""'
        for name, inner in reversed(wanted.items()):
            if inner is False and name not in required:
                continue
            pair = self._grammar.new(f'{self._literal(name)} ":" ws {self._rule(inner)}')
            skip = name not in required
            follow = self._grammar.new(after)
            after = f'"," ws {pair} {follow}' + (f" | {follow}" if skip else "")
            first = f"{pair} {follow}" + (f" | {self._grammar.new(first)}" if skip else "")
        return self._grammar.new(first)

    def _dictionary(self, schema: dict[str, Any], others: Any) -> str:
        """An object whose names are free."""
        least, most = schema.get("minProperties", 0), schema.get("maxProperties")
        if least > 1:
            self._beyond("minProperties", " of free names")
        if others is False:
            if least:
                raise _NothingFitsError
            return '"{" ws "}"'
        pair = self._grammar.new(f'string ":" ws {self._rule(others)}')
        return f'"{{" ws {self._list(pair, min(least, 1), most, "minProperties")} "}}"'

    def _array(self, schema: dict[str, Any]) -> str:
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        prefix, others = schema.get("prefixItems", []), schema.get("items", True)
        if is_list(others):  # draft 4
            prefix, others = others, schema.get("additionalItems", True)
        if most is not None:
            prefix = prefix[:most]
        if prefix:
            return self._tuple([self._rule(each) for each in prefix], others, least)
        if others is False:
            if least:
                raise _NothingFitsError
            return '"[" ws "]"'
        return f'"[" ws {self._list(self._rule(others), least, most, "minItems")} "]"'

    def _tuple(self, rules: list[str], others: Any, least: int) -> str:
        """All of the prefix, and beyond it as few as may be."""
        missing = least - len(rules)
        if missing > 0:
            rest = self._grammar.new(f'"," ws {self._rule(others)}')
            tail = f" {self._times(rest, missing, missing, 'minItems')}"
        else:
            tail = ""
        first = ' "," ws '.join(rules)
        return f'"[" ws {first}{tail} ws "]"'

    def _list(self, rule: str, least: int, most: int | None, keyword: str) -> str:
        """From `least` to `most`, with commas between them, and space after the last."""
        if most == 0:
            return '""'
        rest = self._grammar.new(f'"," ws {rule}')
        fewest, many = max(least - 1, 0), None if most is None else most - 1
        some = f"{rule} {self._times(rest, fewest, many, keyword)} ws"
        return some if least else f"({some})?"

    def _times(self, rule: str, least: int, most: int | None, keyword: str) -> str:
        """Repetition by no more than llama.cpp counts at once; beyond the limit fewer do."""
        if least > _COUNT_MAX:
            self._beyond(keyword, f" above {_COUNT_MAX}")
            least = _COUNT_MAX
        most = most if most is None else min(most, _COUNT_MAX)
        if most is None and least <= _CHUNK:
            return f"{rule}{{{least},}}"
        if most is not None and most <= _CHUNK:
            return f"{rule}{{{least},{most}}}"
        further = None if most is None else most - _CHUNK
        tail = self._times(rule, max(least - _CHUNK, 0), further, keyword)
        whole = f"{rule}{{{_CHUNK},{_CHUNK}}} {tail}"
        if least >= _CHUNK:
            return whole
        return f"({whole} | {rule}{{{least},{_CHUNK - 1}}})"

    # --------------------------------------------------------------- strings, numbers

    def _string(self, schema: dict[str, Any]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength")
        shape = self._shape(schema)
        if shape is None:
            return f'"\\"" {self._times("char", least, most, "minLength")} "\\""'
        if shape.least < least:
            self._beyond("minLength", " beside `pattern` or `format`")
        if most is not None and (shape.most is None or shape.most > most):
            self._beyond("maxLength", " beside `pattern` or `format`")
        return f'"\\"" {shape.text} "\\""'

    def _shape(self, schema: dict[str, Any]) -> Shape | None:
        form = schema.get("format")
        if form is not None and form not in _FORMATS:
            self._beyond("format", f" {_shown(form)}")
            form = None
        if "pattern" not in schema:
            return None if form is None else pattern_shape(f"^({_FORMATS[form]})$")
        if form is not None:
            self._beyond("format", " beside `pattern`")
        try:
            return pattern_shape(schema["pattern"])
        except PatternError as error:
            self._beyond("pattern", f", which {error},")
            return None

    def _number(self, schema: dict[str, Any], kind: str) -> str:
        bounds = Bounds.of(schema)
        if kind == "integer":
            text = integers(bounds)
            if text is None:
                raise _NothingFitsError
            return text
        text = numbers(bounds)
        if text is None:
            keyword = next(key for key in _SIGNS["number"] if key in schema)
            self._beyond(keyword, " that is not whole, or leaves no number,")
            return "number"
        return text


def _constrains(key: str) -> bool:
    return key in _CONSTRAINTS


_CONSTRAINTS = {"type", "enum", "const", "then", "else", *_COMBINED, *_ANYWHERE}
_CONSTRAINTS.update(*_SIGNS.values(), *_BEYOND.values())


def _implied(schema: dict[str, Any]) -> str:
    """The type that the keywords are about, where none is given."""
    for kind, signs in _SIGNS.items():
        if any(sign in schema for sign in signs):
            return kind
    return "any"


_PYTHON: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def _is(value: Any, kind: str) -> bool:
    whole = isinstance(value, float) and value.is_integer()
    return type(value) in _PYTHON[kind] or (kind == "integer" and whole)


_CHOICES_MAX = 64


def _apart(schemas: list[Any]) -> bool:
    """Whether no value fits two of these, as far as types and fixed values tell."""
    if len(schemas) > _CHOICES_MAX:
        return False
    return all(_disjoint(one, other) for one, other in itertools.combinations(schemas, 2))


def _disjoint(one: Any, other: Any) -> bool:
    if not (is_object(one) and is_object(other)):
        return one is False or other is False
    kinds = [_kinds(schema) for schema in (one, other)]
    if not kinds[0] & kinds[1] or _differ(one, other):
        return True
    if kinds != [{"object"}, {"object"}]:
        return False
    tags = set(one.get("required", ())) & set(other.get("required", ()))
    return any(
        _differ(*(each.get("properties", {}).get(tag) for each in (one, other))) for tag in tags
    )


def _kinds(schema: dict[str, Any]) -> set[str]:
    kinds = schema.get("type", list(_KINDS))
    listed = kinds if is_list(kinds) else [kinds]
    return {"number" if kind == "integer" else kind for kind in listed}


def _differ(one: Any, other: Any) -> bool:
    """Whether both have fixed values, and none in common."""
    values: list[list[Any]] = []
    for schema in (one, other):
        if not is_object(schema) or not {"const", "enum"} & set(schema):
            return False
        values.append([schema["const"]] if "const" in schema else schema["enum"])
    return not any(value in values[1] for value in values[0])


def _shown(text: object) -> str:
    """A caller's word, fit to be repeated to that caller."""
    return ascii(text)[:40]
