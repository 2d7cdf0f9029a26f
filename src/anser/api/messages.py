"""The messages of a conversation, role by role, as OpenAI documents them.

Engines get less than what is accepted: plain text for content, `system` for `developer`, and no
field that only other services have a use for. Parts other than text are refused: nothing that
runs behind this platform fetches, hears or sees.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

__all__ = ["Message", "engine_message"]

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class _Part(msgspec.Struct, forbid_unknown_fields=True, tag_field="type"):
    """A piece of a message's content."""


class TextPart(_Part, tag="text"):
    """Text."""

    text: str
    cache_control: object = None  # some stacks mark what another service shall cache


class RefusalPart(_Part, tag="refusal"):
    """An earlier answer's refusal, handed back."""

    refusal: str


class FunctionCall(msgspec.Struct, forbid_unknown_fields=True):
    """The function that a model has called, and its arguments as JSON text."""

    name: _Name
    arguments: str
    parsed_arguments: object = None  # openai-python adds it when it parses


class ToolCall(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A call that an earlier answer made."""

    id: _Name
    function: FunctionCall
    type: Literal["function"] = "function"
    index: int | None = None


class _Message(msgspec.Struct, forbid_unknown_fields=True, tag_field="role", kw_only=True):
    """What is common to all roles."""

    id: object = None  # some stacks hand back the answer's own
    name: _Name | None = None


class System(_Message, tag="system"):
    """Instructions."""

    content: str | list[TextPart]


class Developer(_Message, tag="developer"):
    """Instructions, by their newer name."""

    content: str | list[TextPart]


class User(_Message, tag="user"):
    """What a person says."""

    content: str | list[TextPart]


class Assistant(_Message, tag="assistant"):
    """An earlier answer, handed back as it came; what only some servers send is passed over."""

    content: str | list[TextPart | RefusalPart] | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    reasoning_details: object = None
    function_call: None = None
    audio: None = None
    annotations: object = None
    parsed: object = None


class Tool(_Message, tag="tool"):
    """What a tool has answered."""

    content: str | list[TextPart]
    tool_call_id: _Name


Message = System | Developer | User | Assistant | Tool
"""A message of any role."""


def engine_message(message: Message) -> dict[str, object]:
    """The message as every engine's chat template understands it."""
    role = "system" if isinstance(message, Developer) else str(message.__struct_config__.tag)
    plain: dict[str, object] = {"role": role}
    text = _text(message.content)
    if text is None and isinstance(message, Assistant):
        text = message.refusal or (None if message.tool_calls else "")
    if text is not None:
        plain["content"] = text
    if message.name is not None:
        plain["name"] = message.name
    if isinstance(message, Tool):
        plain["tool_call_id"] = message.tool_call_id
    if isinstance(message, Assistant):
        plain |= _engine_answer(message)
    return plain


def _engine_answer(message: Assistant) -> dict[str, object]:
    """Tool calls, and reasoning under both of the names that engines read."""
    plain: dict[str, object] = {}
    if message.tool_calls:
        plain["tool_calls"] = [_engine_call(call) for call in message.tool_calls]
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        plain |= {"reasoning_content": reasoning, "reasoning": reasoning}
    return plain


def _engine_call(call: ToolCall) -> dict[str, object]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _text(content: str | list[TextPart] | list[TextPart | RefusalPart] | None) -> str | None:
    """Parts become lines of one text."""
    if content is None or isinstance(content, str):
        return content
    return "\n".join(part.text if isinstance(part, TextPart) else part.refusal for part in content)
