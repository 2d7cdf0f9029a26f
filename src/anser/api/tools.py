"""Tools and the shape of an answer: what a caller may ask an engine to keep to."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from anser.api.errors import echo
from anser.core.errors import InvalidField
from anser.core.limits import TOOLS_BYTES_MAX
from anser.core.schema import check_schema

__all__ = ["ResponseFormat", "Tool", "ToolChoice", "engine_format", "engine_tools"]

_Name = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_Mode = Literal["none", "auto", "required"]


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Objects that name each of their fields."""


class Function(_Strict):
    """A function that the model may call."""

    name: _Name
    description: str | None = None
    parameters: dict[str, object] | None = None
    strict: bool | None = None


class Tool(_Strict):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(_Strict):
    """A function by its name."""

    name: _Name


class ToolName(_Strict, tag_field="type", tag="function"):
    """The one tool to call."""

    function: FunctionName


class NamedTool(_Strict):
    """A tool in a list of those allowed."""

    type: Literal["function"]
    function: FunctionName


class AllowedList(_Strict):
    """Which tools, and whether one must be called."""

    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class AllowedTools(_Strict, tag_field="type", tag="allowed_tools"):
    """A choice among some of the tools."""

    allowed_tools: AllowedList


ToolChoice = _Mode | ToolName | AllowedTools
"""Which tool to call, if any."""


class _Format(_Strict, tag_field="type"):
    """The form of an answer."""


class TextFormat(_Format, tag="text"):
    """Free text."""


class JsonObjectFormat(_Format, tag="json_object"):
    """Any JSON object."""


class JsonSchema(_Strict):
    """A schema and its name."""

    name: _Name
    schema: dict[str, object]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(_Format, tag="json_schema"):
    """JSON that fits a schema."""

    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat
"""The form that an answer is to have."""


def engine_format(form: ResponseFormat | None) -> dict[str, object]:
    """The body's `response_format`, if it constrains anything. Raises InvalidField."""
    if form is None or isinstance(form, TextFormat):
        return {}
    if isinstance(form, JsonObjectFormat):
        return {"response_format": {"type": "json_object"}}
    schema = form.json_schema
    check_schema(schema.schema, path="response_format.json_schema.schema")
    named = {"name": schema.name, "schema": schema.schema, "strict": schema.strict is not False}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def engine_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> dict[str, object]:
    """The body's `tools` and `tool_choice`. Raises InvalidField."""
    tools = tools or []
    _check_tools(tools)
    if isinstance(choice, AllowedTools):
        tools, choice = _narrow(tools, choice.allowed_tools), choice.allowed_tools.mode
    if not tools:
        if choice in (None, "none", "auto"):
            return {}
        raise InvalidField("There are no tools to choose from.", param="tool_choice")
    plain: dict[str, object] = {"tools": [_engine_tool(tool) for tool in tools]}
    if len(msgspec.json.encode(plain)) > TOOLS_BYTES_MAX:
        raise InvalidField(f"All tools have at most {TOOLS_BYTES_MAX} bytes.", param="tools")
    if isinstance(choice, ToolName):
        name = _known(choice.function.name, tools, param="tool_choice.function.name")
        plain["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif choice is not None:
        plain["tool_choice"] = choice
    return plain


def _check_tools(tools: list[Tool]) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        path, function = f"tools[{index}].function", tool.function
        if function.name in seen:
            raise InvalidField(f"Two tools are named {echo(function.name)}.", param=f"{path}.name")
        seen.add(function.name)
        if function.parameters is not None:
            check_schema(function.parameters, path=f"{path}.parameters")


def _narrow(tools: list[Tool], allowed: AllowedList) -> list[Tool]:
    """The tools that are allowed, in their own order."""
    path = "tool_choice.allowed_tools.tools"
    names = {
        _known(each.function.name, tools, param=f"{path}[{index}].function.name")
        for index, each in enumerate(allowed.tools)
    }
    return [tool for tool in tools if tool.function.name in names]


def _known(name: str, tools: list[Tool], *, param: str) -> str:
    if all(tool.function.name != name for tool in tools):
        raise InvalidField(f"There is no tool named {echo(name)}.", param=param)
    return name


def _engine_tool(tool: Tool) -> dict[str, object]:
    function: dict[str, object] = {"name": tool.function.name}
    for field in ("description", "parameters", "strict"):
        value = getattr(tool.function, field)
        if value is not None:
            function[field] = value
    return {"type": "function", "function": function}
