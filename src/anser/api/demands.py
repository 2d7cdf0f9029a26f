"""From a body to demands: one for each answer, within bounds, with the engines' own fields only.

What passes here for each request is msgspec's, made in a tenth of a frozen dataclass's time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf, nan

import msgspec

from anser.api.auth import Header
from anser.api.checks import check_fields
from anser.api.context import Services
from anser.api.fields import (
    CHAT_FORWARDED,
    COMPLETION_FORWARDED,
    EXTRA,
    ChatFields,
    CompletionFields,
    Generation,
)
from anser.api.messages import engine_message
from anser.api.models import Served, served
from anser.api.tools import engine_format, engine_tools
from anser.core.errors import ContextTooLong, InvalidField, UnknownField
from anser.core.fleet import Ability
from anser.core.limits import PROMPTS_MAX
from anser.core.prefix import chain
from anser.core.sampling import HINTS, sampling_fields
from anser.ports import Route
from anser.services.caches import chain_salt, engine_salt
from anser.services.gateway import Demand

__all__ = [
    "Asked",
    "Asker",
    "ask_chat",
    "ask_completion",
    "asker_of",
    "plain_texts",
]

_CHARS_PER_TOKEN_MAX = 256  # the longest entries of vocabularies in use are half as long
_COMPLETION_TOKENS_DEFAULT = 16  # as OpenAI documents it for /v1/completions
_DEADLINE = "x-anser-deadline"
_ROOM_MIN = 16  # a default maximum is never made smaller than this


class Asker(msgspec.Struct, frozen=True, kw_only=True):
    """Who asks, of what platform, under which request identifier."""

    services: Services
    member: str
    request_id: str
    deadline: float | None = None  # monotonic seconds

    @property
    def drops_unknown(self) -> bool:
        """Whether unknown fields are dropped instead of refused."""
        return self.services.config.gateway.unknown_fields == "drop"

    @property
    def shares_caches(self) -> bool:
        """Whether all members share the engines' prompt caches."""
        return self.services.config.gateway.cache_sharing == "platform"


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller wants; `answers_per_prompt` consecutive demands share one prompt."""

    demands: tuple[Demand, ...]
    answers_per_prompt: int
    stream: bool
    include_usage: bool
    text_logprobs: bool


class _Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt in an engine's body, and the number of characters a tokenizer will see.

    What is the same in all turns of a conversation comes first, so that the text of each turn
    (`canonical`) begins as that of the turn before.
    """

    body: dict[str, object]
    chars: int

    def canonical(self) -> bytes:
        """The text by which prompts are compared."""
        return msgspec.json.encode(self.body)


def asker_of(services: Services, request_id: str, member: str, header: Header) -> Asker:
    """Who asks, and until when; taken before the body is read. Raises InvalidField."""
    return Asker(
        services=services,
        member=member,
        request_id=request_id,
        deadline=_deadline(services, header),
    )


def ask_chat(asker: Asker, body: dict[str, object]) -> Asked:
    """The demands of a /v1/chat/completions body. Raises RequestError, NoNode."""
    fields = check_fields(body, ChatFields, drop_unknown=asker.drops_unknown)
    _check_logprobs(fields)
    messages = [engine_message(message) for message in fields.messages]
    prompt = _Prompt(
        body={
            **engine_tools(fields.tools, fields.tool_choice),
            **engine_format(fields.response_format),
            "messages": messages,
        },
        chars=sum(len(str(message.get("content", ""))) for message in messages),
    )
    setting = asker.services.config.gateway.completion_tokens_default
    batch = fields.service_tier == "flex"
    maximum = _chat_maximum(fields)
    job = _Job(asker, Route.CHAT, fields, list(body), maximum, setting, batch=batch)
    return job.asked((prompt,), CHAT_FORWARDED)


def ask_completion(asker: Asker, body: dict[str, object]) -> Asked:
    """The demands of a /v1/completions body. Raises RequestError, NoNode."""
    fields = check_fields(body, CompletionFields, drop_unknown=asker.drops_unknown)
    _check_completion(fields)
    texts = plain_texts(fields.prompt, param="prompt")
    if len(texts) * (fields.n or 1) > PROMPTS_MAX:
        message = f"One request makes at most {PROMPTS_MAX} answers, `n` of each prompt."
        raise InvalidField(message, param="prompt")
    prompts = tuple(_Prompt(body={"prompt": text}, chars=len(text)) for text in texts)
    maximum, default = fields.max_tokens, _COMPLETION_TOKENS_DEFAULT
    job = _Job(asker, Route.COMPLETIONS, fields, list(body), maximum, default)
    return job.asked(prompts, COMPLETION_FORWARDED)


def plain_texts(value: str | list[str | int | list[int]], *, param: str) -> tuple[str, ...]:
    """One or many texts, none of them empty. Raises InvalidField for token identifiers."""
    texts: list[str] = []
    for index, text in enumerate([value] if isinstance(value, str) else value):
        path = param if isinstance(value, str) else f"{param}[{index}]"
        if not isinstance(text, str):
            message = f"`{path}`: send text; token identifiers differ from node to node."
            raise InvalidField(message, param=path)
        if not text:
            raise InvalidField(f"`{path}` is empty.", param=path)
        texts.append(text)
    return tuple(texts)


class _Job(msgspec.Struct, frozen=True):
    """A checked body on its way to demands."""

    asker: Asker
    route: Route
    fields: Generation
    given: list[str]  # the names in the caller's body
    maximum: int | None  # of tokens of each answer, if the caller names one
    default: int
    batch: bool = False

    def asked(self, prompts: tuple[_Prompt, ...], forwarded: frozenset[str]) -> Asked:
        """One demand for each answer to each prompt."""
        fields = self.fields
        model = served(self.asker.services, fields.model, Ability.CHAT)
        common = self._forward(forwarded) | self._forward_extra(model)
        options = fields.stream_options
        if options is not None and not fields.stream:
            message = "`stream_options` is for streams: set `stream` to true."
            raise InvalidField(message, param="stream_options")
        return Asked(
            demands=tuple(self._demands(prompts, common, model)),
            answers_per_prompt=fields.n or 1,
            stream=bool(fields.stream),
            include_usage=options is not None and bool(options.include_usage),
            text_logprobs=isinstance(fields, CompletionFields) and fields.logprobs is not None,
        )

    def _demands(
        self, prompts: tuple[_Prompt, ...], common: dict[str, object], model: Served
    ) -> Iterator[Demand]:
        each = self.fields.n or 1
        total = len(prompts) * each
        for index, prompt in enumerate(prompts):
            first = self._demand(prompt, common, model)
            if total == 1:
                yield first
                return
            for at in range(index * each, (index + 1) * each):
                body = first.body
                if self.fields.seed is not None:
                    body = {**body, "seed": _seed(self.fields.seed, at)}
                yield replace(first, id=f"{first.id}-{at}", body=body)

    def _demand(self, prompt: _Prompt, common: dict[str, object], model: Served) -> Demand:
        """What all answers to one prompt have in common."""
        asker, text = self.asker, prompt.canonical()
        tokens = asker.services.gateway.lengths.tokens(model.model, len(text))
        maximum = self._maximum(prompt, tokens, model)
        shared = asker.shares_caches
        salt = None if shared else engine_salt(asker.member, pepper=asker.services.members.pepper)
        return Demand(
            id=asker.request_id,
            member=asker.member,
            route=self.route,
            model=model.model,
            body={**common, **prompt.body, "max_tokens": maximum},
            prompt_tokens=tokens,
            prompt_bytes=len(text),
            output_tokens_max=maximum,
            chain=chain(text, salt=chain_salt(model.model, asker.member, shared=shared)),
            cache_salt=salt,
            batch=self.batch,
            deadline=asker.deadline,
        )

    def _maximum(self, prompt: _Prompt, tokens: int, model: Served) -> int:
        """The longest answer, in tokens. Raises ContextTooLong where the excess is certain."""
        context = model.context_tokens
        if context is None:
            return self.maximum or self.default
        least = max(1, prompt.chars // _CHARS_PER_TOKEN_MAX)
        if least + (self.maximum or 1) > context:
            raise _too_long(context, least, self.maximum)
        return self.maximum or min(self.default, max(_ROOM_MIN, context - tokens), context)

    def _forward(self, forwarded: frozenset[str]) -> dict[str, object]:
        """The fields that reach an engine as they came."""
        found: dict[str, object] = {}
        for name in self.given:
            if name in forwarded:
                value = getattr(self.fields, name)
                if value is not None:
                    found[name] = value
        return found

    def _forward_extra(self, model: Served) -> dict[str, object]:
        """The fields beyond OpenAI's. Raises UnknownField for what not all engines read."""
        found = self._forward(EXTRA)
        if not found:
            return found
        for name in found.keys() - sampling_fields(model.kinds):
            del found[name]
            if name not in HINTS and not self.asker.drops_unknown:
                kinds = ", ".join(sorted(kind.value for kind in model.kinds))
                message = f"Not every engine that serves {model.model} reads {name} ({kinds})."
                raise UnknownField(message, param=name)
        return found


def _deadline(services: Services, header: Header) -> float | None:
    text = header(_DEADLINE.encode())
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = nan
    if not 0.0 < seconds < inf:  # false for NaN
        message = f"`{_DEADLINE}` is how many seconds from now the first token is of use: above 0."
        raise InvalidField(message, param=_DEADLINE)
    return services.clock.now() + seconds


def _check_logprobs(fields: ChatFields) -> None:
    if fields.top_logprobs is not None and not fields.logprobs:
        message = "`top_logprobs` needs `logprobs` to be true."
        raise InvalidField(message, param="top_logprobs")


def _check_completion(fields: CompletionFields) -> None:
    if fields.echo:
        raise InvalidField("`echo`: the prompt is not sent back.", param="echo")
    if fields.suffix:
        raise InvalidField("`suffix`: text is not inserted here.", param="suffix")
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        message = "`best_of` must be `n`: every answer that is made is returned."
        raise InvalidField(message, param="best_of")


def _chat_maximum(fields: ChatFields) -> int | None:
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = "`max_tokens` and `max_completion_tokens` differ: send one of them."
        raise InvalidField(message, param="max_tokens")
    return old if new is None else new


def _seed(seed: int, index: int) -> int:
    """A seed of its own for each answer, within 64 bits; the first answer's is the caller's."""
    return seed if index == 0 else (seed + index) % 2**63


def _too_long(context: int, prompt_tokens: int, maximum: int | None) -> ContextTooLong:
    counts = f"at least {prompt_tokens} for the prompt"
    if maximum is not None:
        counts += f", {maximum} for the answer"
    message = f"This model's maximum context length is {context} tokens; you asked for {counts}."
    return ContextTooLong(message, param="messages" if maximum is None else "max_tokens")
