"""Tool calls by grammar: llama.cpp enforces none, and small models' templates know no tools.

The tools go into the system message, earlier calls and results into messages that any template can
show. Where the caller requires a call, a grammar forces the answer to be one: the arguments of the
one function, or {"name": ..., "arguments": {...}}, whose name is known before the first byte of the
arguments. Where the choice is the model's ("auto"), an answer that begins with <tool_call> is held
to such an object by the same grammar, and any other answer is free.

Whether the model chooses well is another matter; that the shape is right is certain.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from anser.adapters.llamacpp_grammar import Grammar
from anser.adapters.llamacpp_json import dump, is_object
from anser.adapters.llamacpp_pattern import in_quotes
from anser.core.errors import EngineRefused

__all__ = [
    "ChosenCallTranslator",
    "ForcedCallTranslator",
    "Tools",
    "plain_messages",
]

_MARK = "<tool_call>"
_END = "</tool_call>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The functions that may be called; `named` if it is known which one will be."""

    functions: tuple[dict[str, Any], ...]
    forced: bool
    places: tuple[int, ...]  # in the caller's list
    named: str | None = None

    @classmethod
    def of(cls, body: dict[str, Any]) -> Tools | None:
        """The tools of a body, unless it has none or wants none called. Raises EngineRefused."""
        choice = body.get("tool_choice") or "auto"
        functions = tuple(tool["function"] for tool in body.get("tools") or ())
        if is_object(choice):
            wanted: str = choice["function"]["name"]
            names = [function["name"] for function in functions]
            if wanted not in names:
                raise EngineRefused(f"There is no tool named {wanted!r}.", param="tool_choice")
            place = names.index(wanted)
            return cls(functions=(functions[place],), forced=True, places=(place,), named=wanted)
        if not functions or choice == "none":
            return None
        forced = choice == "required"
        named = functions[0]["name"] if forced and len(functions) == 1 else None
        places = tuple(range(len(functions)))
        return cls(functions=functions, forced=forced, places=places, named=named)

    def call(self, grammar: Grammar) -> str:
        """What a call is, in this grammar. Raises InvalidField, EngineRefused."""
        rules = [
            grammar.add(
                _parameters(function),
                path=f"tools[{place}].function.parameters",
                strict=function.get("strict") is True,
            )
            for place, function in zip(self.places, self.functions, strict=True)
        ]
        if self.named is not None:
            return rules[0]
        names = [in_quotes(json.dumps(function["name"])) for function in self.functions]
        head, middle = in_quotes('"name":'), in_quotes('"arguments":')
        calls = [
            f'"{{" ws {head} ws {name} "," ws {middle} ws {rule} ws "}}"'
            for name, rule in zip(names, rules, strict=True)
        ]
        return grammar.new(" | ".join(calls))

    def choice(self, grammar: Grammar, otherwise: str | None) -> str:
        """A call behind its mark, or `otherwise`: if that is None, any text without the mark."""
        call = f"{in_quotes(_MARK)} ws {self.call(grammar)} ws {in_quotes(_END)}"
        return f"{call} | {otherwise or _unmarked(grammar)}"

    def messages(self, messages: list[Any]) -> list[Any]:
        """The conversation with the functions in its system message."""
        listed = "\n".join(json.dumps(function) for function in self.functions)
        form = '{"name": ..., "arguments": {...}}'
        if not self.forced:
            note = f"If a function helps, answer with {_MARK}{form}{_END} alone. Else just answer."
        elif self.named is None:
            note = f"Call a function. Answer with one JSON object: {form}."
        else:
            note = f"Call a function. Answer with the arguments of {self.named} as one JSON object."
        note = f"The functions:\n{listed}\n{note}"
        first, *rest = messages
        if first.get("role") not in {"system", "developer"}:
            return [{"role": "system", "content": note}, *messages]
        content = _text(first)
        return [{**first, "content": f"{content}\n\n{note}" if content else note}, *rest]


def _unmarked(grammar: Grammar) -> str:
    """Any text that does not begin with the mark."""
    rule = ""
    for char in reversed(_MARK):
        further = f" | {in_quotes(char)} {rule}" if rule else ""
        rule = grammar.new(f'"" | [^{char}] .*{further}')
    return rule


def _parameters(function: dict[str, Any]) -> dict[str, Any]:
    """The schema of the arguments, which are always an object; none are none."""
    parameters: dict[str, Any] | None = function.get("parameters")
    if parameters is None:
        return {"type": "object", "additionalProperties": False}
    if parameters.get("type", "object") != "object":
        raise EngineRefused("A function's parameters must be an object.", param="tools")
    if "type" not in parameters and "$ref" not in parameters:
        parameters = {**parameters, "type": "object"}
    return parameters


# ------------------------------------------------------------------ what has been called


def plain_messages(messages: list[Any]) -> list[Any]:
    """The conversation with calls and results as text, for templates that show only text."""
    plain: list[Any] = []
    for message in messages:
        if message.get("role") == "tool":
            result = f"The tool answered: {_text(message)}"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += f"\n{result}"
            else:
                plain.append({"role": "user", "content": result, "results": True})
        elif message.get("tool_calls"):
            said = [_text(message), *map(_called, message["tool_calls"])]
            plain.append({"role": "assistant", "content": "\n".join(filter(None, said))})
        else:
            plain.append(message)
    return [{key: each[key] for key in each if key != "results"} for each in plain]


def _called(call: dict[str, Any]) -> str:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    return f'{_MARK}{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}{_END}'


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or part.get("refusal") or "" for part in content)


# ------------------------------------------------------------------- what is being called


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
            ended = finish == "stop" and self._scanner.done
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


class ChosenCallTranslator:
    """Passes text on; makes tool-call chunks of an answer that begins with the mark."""

    def __init__(self) -> None:
        self._text = ""
        self._held: list[bytes] = []
        self._then: ForcedCallTranslator | None = None
        self._decided = False

    def __repr__(self) -> str:
        state = "undecided" if not self._decided else "text" if self._then is None else "call"
        return f"<ChosenCallTranslator {state}>"

    def feed(self, chunk: bytes) -> Iterable[bytes]:
        """The chunks to deliver for this one: none until it is clear what the answer is."""
        if self._decided:
            return (chunk,) if self._then is None else self._then.feed(chunk)
        value: dict[str, Any] = json.loads(chunk)
        choice = value["choices"][0]
        said = choice["delta"].get("content")
        if not said and choice["finish_reason"] is None:
            return (chunk,)
        self._text += said or ""
        if self._text.startswith(_MARK):
            self._decided, self._then = True, ForcedCallTranslator(None)
            delta = {"content": self._text.removeprefix(_MARK)}
            return self._then.feed(_with(value, delta, choice["finish_reason"]))
        self._held.append(chunk)
        if _MARK.startswith(self._text) and choice["finish_reason"] is None:
            return ()
        self._decided = True
        return self._held


def _with(chunk: dict[str, Any], delta: dict[str, Any], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return dump({**chunk, "choices": [choice]})


_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*')


class _Scanner:
    """Finds the name and then passes on the arguments, which end with their own object."""

    __slots__ = ("_depth", "_escaped", "_head", "_quoted", "done", "name")

    def __init__(self, named: str | None) -> None:
        self.name = named
        self._head = ""
        self._depth = 0
        self._quoted = False
        self._escaped = False
        self.done = False

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
        if self.done:
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
            self.done = self._depth == 0
        return self.done
