"""Tool calls that must be made: llama.cpp does not enforce them, a grammar does.

Where the caller requires a call, the tools go into the system message, the answer is forced by a
JSON schema, and the forced JSON is translated into OpenAI's tool-call chunks as it comes. For one
named function the answer is its arguments; otherwise it is {"name": ..., "arguments": {...}}, whose
name is known before the first byte of the arguments.

Whether the model chooses well is another matter; that the shape is right is certain.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

from anser.core.errors import EngineRefused

__all__ = ["ForcedCall", "ForcedCallTranslator", "dump", "is_list", "is_object"]


def is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Whether it is a JSON object."""
    return isinstance(value, dict)


def is_list(value: object) -> TypeGuard[list[Any]]:
    """Whether it is a JSON array."""
    return isinstance(value, list)


def dump(value: object) -> bytes:
    """JSON in one line."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedCall:
    """The functions of which one must be called; `named` if it is known which."""

    functions: tuple[dict[str, Any], ...]
    named: str | None

    @classmethod
    def of(cls, body: dict[str, Any]) -> ForcedCall | None:
        """What `tool_choice` forces, if anything. Raises EngineRefused."""
        choice = body.get("tool_choice")
        functions = tuple(tool["function"] for tool in body.get("tools") or ())
        if choice == "required" and functions:
            named = functions[0]["name"] if len(functions) == 1 else None
            return cls(functions=functions, named=named)
        if not is_object(choice):
            return None
        wanted: str = choice["function"]["name"]
        chosen = tuple(function for function in functions if function["name"] == wanted)
        if not chosen:
            raise EngineRefused(f"There is no tool named {wanted!r}.", param="tool_choice")
        return cls(functions=chosen, named=wanted)

    def schema(self, rebased: Callable[[Any, str], Any]) -> dict[str, object]:
        """What the forced answer must fit; each function's parameters get a place of their own."""
        shelves = {
            f"f{index}": rebased(_parameters(function), f"#/$defs/f{index}")
            for index, function in enumerate(self.functions)
        }
        if self.named is not None:
            return {"$ref": "#/$defs/f0", "$defs": shelves}
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": {"$ref": f"#/$defs/f{index}"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for index, function in enumerate(self.functions)
        ]
        return {"anyOf": calls, "$defs": shelves}

    def messages(self, messages: Any) -> list[Any]:
        """The conversation with the functions in its system message."""
        listed = "\n".join(json.dumps(function) for function in self.functions)
        if self.named is None:
            form = 'Answer with one JSON object: {"name": ..., "arguments": {...}}.'
        else:
            form = f"Answer with the arguments of {self.named} as one JSON object."
        note = f"Call a function. The functions:\n{listed}\n{form}"
        first, *rest = messages
        if first.get("role") not in {"system", "developer"}:
            return [{"role": "system", "content": note}, *messages]
        content = first.get("content") or ""
        if isinstance(content, str):
            return [{**first, "content": f"{content}\n\n{note}"}, *rest]
        return [{**first, "content": [*content, {"type": "text", "text": note}]}, *rest]


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of the arguments, which are always an object."""
    parameters: dict[str, Any] = function.get("parameters") or {}
    if parameters.get("type", "object") != "object":
        raise EngineRefused("A function's parameters must be an object.", param="tools")
    if "type" not in parameters and "$ref" not in parameters:
        parameters = {**parameters, "type": "object"}
    return parameters


class ForcedCallTranslator:
    """Makes tool-call chunks of the chunks of a forced answer."""

    def __init__(self, named: str | None) -> None:
        self._scanner = _Scanner(named)
        self._id = f"call_{secrets.token_hex(12)}"
        self._called = False

    def __repr__(self) -> str:
        return f"<ForcedCallTranslator {self._scanner.name or 'undecided'}>"

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The chunks to deliver for this one."""
        value: dict[str, Any] = json.loads(chunk)
        if not value["choices"]:
            yield chunk
            return
        choice = value["choices"][0]
        delta: dict[str, Any] = choice["delta"]
        finish = choice["finish_reason"]
        if delta.get("role") is not None:
            yield chunk
        for call in self._calls(delta.get("content") or ""):
            yield _with(value, {"tool_calls": [call]}, None)
        if finish is not None:
            ended = finish == "stop" and self._called
            yield _with(value, {}, "tool_calls" if ended else finish)

    def _calls(self, text: str) -> Iterable[dict[str, Any]]:
        arguments = self._scanner.feed(text)
        if self._scanner.name is None:
            return
        if not self._called:
            self._called = True
            function = {"name": self._scanner.name, "arguments": ""}
            yield {"index": 0, "id": self._id, "type": "function", "function": function}
        if arguments:
            yield {"index": 0, "function": {"arguments": arguments}}


def _with(chunk: dict[str, Any], delta: dict[str, Any], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return dump({**chunk, "choices": [choice]})


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


class _Scanner:
    """Finds the name and then passes on the arguments, which end with their own object."""

    __slots__ = ("_depth", "_done", "_escaped", "_head", "_quoted", "name")

    def __init__(self, named: str | None) -> None:
        self.name = named
        self._head = ""
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self._done = False

    def feed(self, text: str) -> str:
        """What of `text` belongs to the arguments."""
        if self.name is None:
            self._head += text
            found = _HEAD.match(self._head)
            if found is None:
                return ""
            self.name = json.loads(found[1])
            text = self._head[found.end() :]
        if not self._depth:
            text = text.lstrip()
        if self._done:
            return ""
        end = next((at for at, char in enumerate(text, 1) if self._ends_at(char)), len(text))
        return text[:end]

    def _ends_at(self, char: str) -> bool:
        """Whether the arguments' object ends with this character."""
        if self._quoted:
            self._quoted = self._escaped or char != '"'
            self._escaped = char == "\\" and not self._escaped
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._done = self._depth == 0
        return self._done
