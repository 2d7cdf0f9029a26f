"""From an OpenAI body to what llama.cpp takes, and back from its chunks.

What it takes differs in little: forms and tools become a grammar; one seed means "any"; a control
token that a bias forces makes no chunk, so such an answer could not be aborted; the role does not
always come; and `/v1/completions` puts its usage into the last chunk instead of one of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from anser.adapters.llamacpp_grammar import Grammar
from anser.adapters.llamacpp_json import dump, is_list, is_object
from anser.adapters.llamacpp_stream import Translator
from anser.adapters.llamacpp_tools import (
    ChosenCallTranslator,
    ForcedCallTranslator,
    Tools,
    plain_messages,
)
from anser.core.errors import EngineRefused
from anser.ports import Call, Route

__all__ = ["prepare", "split_inputs"]


_ANY_SEED = 0xFFFFFFFF


def prepare(call: Call, model_id: str, control_tokens: frozenset[int]) -> tuple[bytes, Translator]:
    """The body for the library, and what makes OpenAI chunks of its answer.

    Raises EngineRefused, InvalidField.
    """
    body: dict[str, Any] = dict(call.body)
    body.update(
        model=model_id,
        stream=True,
        stream_options={"include_usage": True},
        return_progress=True,
        cache_prompt=True,
    )
    body.pop("n", None)
    if isinstance(body.get("seed"), int):
        body["seed"] %= _ANY_SEED  # it reads 32 bits, and all ones as "choose one yourself"
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


def _prepare_completion(body: dict[str, Any]) -> Translator:
    prompt = body.get("prompt")
    if is_list(prompt) and len(prompt) > 1 and not isinstance(prompt[0], int):
        raise EngineRefused("One prompt at a time.", param="prompt")
    if body.get("logprobs") == 0:
        body["logprobs"] = 1  # the chosen token alone; 0 would mean none
    return _UsageApart()


def _prepare_chat(body: dict[str, Any]) -> Translator:
    tools = Tools.of(body)
    if tools is not None and body.get("logprobs"):
        raise EngineRefused(
            "The engine in this process gives no logprobs where tools may be called: leave out "
            "`logprobs` or `tools`.",
            param="logprobs",
        )
    body["messages"] = plain_messages(body["messages"])
    grammar = Grammar()
    rule = _form(body.pop("response_format", None), grammar)
    for field in ("tools", "tool_choice", "parallel_tool_calls"):
        body.pop(field, None)
    translator: Translator | None = None
    if tools is not None:
        body["messages"] = tools.messages(body["messages"])
        rule, translator = _with_tools(tools, body, grammar, rule)
    elif body.get("logprobs"):
        translator = _top_logprobs(body)
    if rule is not None:
        body["grammar"] = grammar.text(rule)
    return _RoleFirst(translator)


def _form(form: Any, grammar: Grammar) -> str | None:
    """The rule for an answer of this form; None for free text."""
    kind = form.get("type") if is_object(form) else "text"
    if kind == "json_object":
        return "object"
    if kind != "json_schema":
        return None
    asked = form["json_schema"]
    strict = asked.get("strict") is not False
    return grammar.add(asked["schema"], path="response_format.json_schema.schema", strict=strict)


def _with_tools(
    tools: Tools, body: dict[str, Any], grammar: Grammar, rule: str | None
) -> tuple[str, Translator]:
    if not tools.forced:
        return tools.choice(grammar, rule), ChosenCallTranslator()
    body.pop("stop", None)  # it would cut the arguments
    return tools.call(grammar), ForcedCallTranslator(tools.named)


def _top_logprobs(body: dict[str, Any]) -> Translator | None:
    """Without alternatives llama.cpp gives none at all, and left to itself twenty of them."""
    if body.get("top_logprobs"):
        return None
    body["top_logprobs"] = 1
    return _NoAlternatives()


class _NoAlternatives:
    """Takes the alternatives out of chat's logprobs."""

    def feed(self, chunk: bytes) -> Iterable[bytes]:
        if b'"top_logprobs":[' not in chunk:
            return (chunk,)
        value: dict[str, Any] = json.loads(chunk)
        for choice in value["choices"]:
            for token in choice["logprobs"]["content"]:
                token["top_logprobs"] = []
        return (dump(value),)


# ------------------------------------------------------------------------------ embeddings


def split_inputs(body: Mapping[str, object]) -> list[object]:
    """The inputs of an embeddings body, one by one. Raises EngineRefused."""
    if body.get("dimensions") is not None:
        raise EngineRefused("This model's embeddings cannot be shortened.", param="dimensions")
    given: Any = body.get("input")
    if is_list(given) and given and not isinstance(given[0], int):
        return given
    return [given]
