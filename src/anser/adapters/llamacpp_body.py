"""From an OpenAI body to what llama.cpp takes, and back from its chunks.

What it takes differs in little: schemas may refer only to "#/$defs/..." and have no `true` in them;
a control token that a bias forces makes no chunk, so such an answer could not be aborted; the role
does not always come; and `/v1/completions` puts its usage into the last chunk instead of one of its
own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from anser.adapters.llamacpp_stream import Translator
from anser.adapters.llamacpp_tools import (
    ForcedCall,
    ForcedCallTranslator,
    dump,
    is_list,
    is_object,
)
from anser.core.errors import EngineRefused
from anser.core.schema import check_schema
from anser.ports import Call, Route

__all__ = ["prepare", "rebased", "split_inputs"]


def prepare(call: Call, model_id: str, control_tokens: frozenset[int]) -> tuple[bytes, Translator]:
    """The body for the library, and what makes OpenAI chunks of its answer.

    Raises EngineRefused, InvalidField.
    """
    body = dict(call.body)
    body.update(
        model=model_id,
        stream=True,
        stream_options={"include_usage": True},
        return_progress=True,
        cache_prompt=True,
    )
    body.pop("n", None)
    _check_bias(body.get("logit_bias"), control_tokens)
    is_chat = call.route is Route.CHAT
    translator = _prepare_chat(body) if is_chat else _prepare_completion(body)
    return json.dumps(body).encode(), translator


class _RoleFirst:
    """Chat chunks are OpenAI's already, except that the role is left out where the first token
    is not a whole character and so makes no chunk of its own."""

    def __init__(self, then: Translator | None = None) -> None:
        self._begun = False
        self._then = then

    def feed(self, chunk: bytes) -> Iterable[bytes]:
        chunks = self._with_role(chunk)
        if self._then is None:
            return chunks
        return [made for each in chunks for made in self._then.feed(each)]

    def _with_role(self, chunk: bytes) -> tuple[bytes, ...]:
        if self._begun or b'"role":"assistant"' in chunk:
            self._begun = True
            return (chunk,)
        self._begun = True
        frame: dict[str, Any] = json.loads(chunk)
        for late in ("usage", "timings"):
            frame.pop(late, None)
        delta = {"role": "assistant", "content": None}
        frame["choices"] = [{"index": 0, "delta": delta, "finish_reason": None}]
        return (dump(frame), chunk)


class _UsageApart:
    """Gives the usage in the last chunk of a text completion a chunk of its own."""

    def feed(self, chunk: bytes) -> Iterable[bytes]:
        if b'"usage":{' not in chunk:
            return (chunk,)
        last: dict[str, Any] = json.loads(chunk)
        last.pop("timings", None)
        usage: dict[str, Any] = dict(last, choices=())
        del last["usage"]
        return (dump(last), dump(usage))


def _check_bias(bias: object, control_tokens: frozenset[int]) -> None:
    """A control token renders as nothing: an answer of such tokens would go on unseen."""
    for token, weight in bias.items() if is_object(bias) else ():
        number = int(token) if token.isdecimal() else -1
        if number in control_tokens and isinstance(weight, int | float) and weight > 0:
            raise EngineRefused(
                f"Token {number} is a control token of this model: it cannot be favoured.",
                param="logit_bias",
            )


def _prepare_completion(body: dict[str, object]) -> Translator:
    prompt = body.get("prompt")
    if is_list(prompt) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise EngineRefused("One prompt at a time.", param="prompt")
    if body.get("logprobs") == 0:
        body["logprobs"] = 1  # the chosen token alone; 0 would mean none
    return _UsageApart()


def _prepare_chat(body: dict[str, object]) -> Translator:
    tools: Any = body.get("tools")
    for index, tool in enumerate(tools or ()):
        parameters = tool["function"].get("parameters")
        if parameters is not None:
            check_schema(parameters, path=f"tools[{index}].function.parameters")
    forced = ForcedCall.of(body)
    if forced is not None:
        form = forced.schema(rebased)
        body["messages"] = forced.messages(body["messages"])
        for field in ("tools", "tool_choice", "parallel_tool_calls", "logprobs", "top_logprobs"):
            body.pop(field, None)
        body["response_format"] = _schema_format(form)
        return _RoleFirst(ForcedCallTranslator(forced.named))
    form_of_answer: Any = body.get("response_format")
    if form_of_answer is not None and form_of_answer.get("type") == "json_schema":
        schema = form_of_answer["json_schema"]["schema"]
        check_schema(schema, path="response_format.json_schema.schema")
        body["response_format"] = _schema_format(
            {"$ref": "#/$defs/answer", "$defs": {"answer": rebased(schema, "#/$defs/answer")}}
        )
    return _RoleFirst()


def _schema_format(schema: dict[str, object]) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


# --------------------------------------------------------------------------------- schemas

_MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
_LITERAL = {"const", "enum", "default", "examples"}


def rebased(schema: Any, base: str) -> Any:
    """The schema as it is written when it does not lie at "#" but at `base`."""
    if schema is True:
        return {}
    if is_list(schema):
        return [rebased(each, base) for each in schema]
    if not is_object(schema):
        return schema
    return {key: _rebased_value(key, value, base) for key, value in schema.items()}


def _rebased_value(key: str, value: Any, base: str) -> Any:
    if key == "$ref" and isinstance(value, str):
        return base + value.removeprefix("#")
    if key in _LITERAL or isinstance(value, bool):
        return value
    if key in _MAPS and is_object(value):
        return {name: rebased(each, base) for name, each in value.items()}
    return rebased(value, base)


# ------------------------------------------------------------------------------ embeddings


def split_inputs(body: Mapping[str, object]) -> list[object]:
    """The inputs of an embeddings body, one by one. Raises EngineRefused."""
    if body.get("dimensions") is not None:
        raise EngineRefused("This model's embeddings cannot be shortened.", param="dimensions")
    given: Any = body.get("input")
    if is_list(given) and given and not isinstance(given[0], int):
        return given
    return [given]
