"""core.schema: no schema whatever takes it long, and a cycle never passes."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from anser.core import limits
from anser.core.errors import InvalidField
from anser.core.schema import check_schema
from tests.cost import measured

NAMES = ["a", "b", "c", "d"]
REFERENCES = st.sampled_from(["#", "#/$defs/x", "#/anyOf/0", *(f"#/$defs/{n}" for n in NAMES)])
KEYS = ["allOf", "anyOf", "items", "properties", "not", "if", "additionalProperties", "enum"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=20,
)


def schemas(leaf: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.fixed_dictionaries({"anyOf": st.lists(leaf, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"allOf": st.lists(leaf, min_size=1, max_size=3)}),
        st.fixed_dictionaries({"items": leaf}),
        st.fixed_dictionaries({"properties": st.dictionaries(st.sampled_from(NAMES), leaf)}),
        st.fixed_dictionaries({"not": leaf}),
    )


NODES = st.recursive(
    st.just({"type": "string"}) | REFERENCES.map(lambda reference: {"$ref": reference}),
    schemas,
    max_leaves=8,
)
GRAPHS = st.fixed_dictionaries(
    {"$ref": st.just("#/$defs/a"), "$defs": st.fixed_dictionaries(dict.fromkeys(NAMES, NODES))}
)


@given(JSON | NODES | GRAPHS)
def test_every_json_value_is_passed_or_refused_at_once(value: object) -> None:
    """Whatever JSON comes, the answer is None or InvalidField, in bounded time."""
    with measured() as cost, contextlib.suppress(InvalidField):
        check_schema(value)
    assert cost.million_steps < 100


def grounded(schema: Any, root: dict[str, Any], fuel: int) -> bool:
    """Whether what is said of one value ends within `fuel` steps, without going into parts."""
    if fuel == 0:
        return False
    if not isinstance(schema, dict):
        return True
    same = [*schema.get("anyOf", []), *schema.get("allOf", []), schema.get("not")]
    if "$ref" in schema:
        target: Any = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[int(part)] if isinstance(target, list) else target.get(part, {})
        same.append(target)
    return all(grounded(each, root, fuel - 1) for each in same)


@given(GRAPHS)
def test_what_passes_ends(graph: dict[str, Any]) -> None:
    """In a schema that passes, every subschema can be written out at its value in finite steps."""
    try:
        check_schema(graph)
    except InvalidField:
        return
    longest = 4 * limits.JSON_DEPTH_MAX
    assert all(grounded(each, graph, longest) for each in graph["$defs"].values())
