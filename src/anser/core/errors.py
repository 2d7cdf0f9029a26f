"""The one error tree. Each error carries the HTTP status and the code that a client sees.

AnserError
├── RequestError               400  the caller's fault; the message names the way out
│   ├── Malformed              400  it is not HTTP as it may be spoken here
│   ├── InvalidField           400  a documented field has a wrong type or value
│   ├── UnknownField           400  a field that may not reach an engine
│   ├── ContextTooLong         400  prompt and output do not fit the model's context
│   ├── Unauthenticated        401  no key, or a key that is not valid now
│   ├── Forbidden              403  a valid key that may not do this
│   ├── NotFound               404  no such thing, or not yours to see
│   │   └── ModelNotFound      404  no such model; near names are given
│   ├── MethodNotAllowed       405  the path exists, the verb does not
│   ├── HeadTimeout            408  the head did not arrive in time
│   ├── BodyTimeout            408  the body did not arrive in time
│   ├── Conflict               409  it exists already, or is in use
│   ├── BodyTooLarge           413  the body exceeds the limit
│   ├── UnsupportedEncoding    415  the body is in an encoding that is not read
│   ├── LimitReached           429  the member's own limit; retry_after_s tells when
│   └── HeadTooLarge           431  the head exceeds the limit
├── EngineError                502  a node failed in its part
│   ├── EngineUnreachable      502  no connection
│   │   └── ConnectTimeout     504  or none in time
│   ├── EngineBroken           502  it answered what no engine may answer
│   ├── EngineStalled          504  it went silent beyond the limit
│   │   ├── FirstTokenTimeout  504  before its first token
│   │   └── TokenGapTimeout    504  between two tokens
│   ├── EngineDeclined         503  it would not take it now: its key, its load, its models
│   └── EngineRefused          400  it found the request itself at fault (status is its own)
├── AnswerTimeout              504  the whole answer took longer than it may; nobody's fault
├── Unavailable                503  the platform cannot serve this now
│   ├── NoNode                 503  the model exists, but no node serves it now
│   ├── QueueTimeout           503  the request waited for a slot as long as it may
│   ├── DeadlineUnreachable    503  no first token can come by the request's own deadline
│   ├── Overloaded             503  a limit of the platform itself was reached
│   └── ShuttingDown           503  it drains; another address or a moment later
├── StoreError                 503  the store could not do what was asked
│   ├── StoreLocked            503  another process holds it
│   ├── StoreFull              503  the disk is full or read-only
│   ├── StoreCorrupt           503  the file is damaged
│   └── StoreNewer             503  the file was written by a newer version
├── ConfigError                500  a setting is wrong; names source and key path
│   └── DataDirInUse           500  another process holds the data folder
├── SourceError                502  a model's file could not be had
│   ├── DigestMismatch         502  what came is not what was asked for
│   └── NoMirror               502  no mirror answered
├── ModelFileError             422  the file is not a model that can be loaded safely
└── ReceiptError               422  a receipt does not verify
"""

from __future__ import annotations

from typing import Self

__all__ = [
    "AnserError",
    "AnswerTimeout",
    "BodyTimeout",
    "BodyTooLarge",
    "ConfigError",
    "Conflict",
    "ConnectTimeout",
    "ContextTooLong",
    "DataDirInUse",
    "DeadlineUnreachable",
    "DigestMismatch",
    "EngineBroken",
    "EngineDeclined",
    "EngineError",
    "EngineRefused",
    "EngineStalled",
    "EngineUnreachable",
    "FirstTokenTimeout",
    "Forbidden",
    "HeadTimeout",
    "HeadTooLarge",
    "InvalidField",
    "LimitReached",
    "Malformed",
    "MethodNotAllowed",
    "ModelFileError",
    "ModelNotFound",
    "NoMirror",
    "NoNode",
    "NotFound",
    "Overloaded",
    "QueueTimeout",
    "ReceiptError",
    "RequestError",
    "ShuttingDown",
    "SourceError",
    "StoreCorrupt",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StoreNewer",
    "TokenGapTimeout",
    "Unauthenticated",
    "Unavailable",
    "UnknownField",
    "UnsupportedEncoding",
]


class AnserError(Exception):
    """Any failure that Anser expects. `message` is for people and never holds a secret."""

    status = 500
    code = "internal_error"
    kind = "server_error"

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s


class RequestError(AnserError):
    """The caller's fault."""

    status = 400
    code = "invalid_request"
    kind = "invalid_request_error"


class Malformed(RequestError):
    """It is not HTTP as it may be spoken here; the connection is closed."""

    code = "malformed_request"


class InvalidField(RequestError):
    """A documented field has a wrong type or value; `param` names it."""

    code = "invalid_value"


class UnknownField(RequestError):
    """A field that is not documented and not on the engine's allow-list; `param` names it."""

    code = "unknown_parameter"


class ContextTooLong(RequestError):
    """Prompt and output do not fit the model's context."""

    code = "context_length_exceeded"


class Unauthenticated(RequestError):
    """No key, or a key that is not valid now."""

    status = 401
    code = "invalid_api_key"
    kind = "authentication_error"


class Forbidden(RequestError):
    """A valid key that may not do this."""

    status = 403
    code = "forbidden"
    kind = "permission_error"


class NotFound(RequestError):
    """No such thing, or not yours to see."""

    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    """No such model; the message gives near names."""

    code = "model_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, the verb does not."""

    status = 405
    code = "method_not_allowed"


class HeadTimeout(RequestError):
    """The head did not arrive in time."""

    status = 408
    code = "head_timeout"


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    status = 408
    code = "body_timeout"


class Conflict(RequestError):
    """It exists already, or is in use."""

    status = 409
    code = "conflict"


class BodyTooLarge(RequestError):
    """The body exceeds the limit."""

    status = 413
    code = "body_too_large"


class UnsupportedEncoding(RequestError):
    """The body is in an encoding that is not read."""

    status = 415
    code = "unsupported_encoding"


class LimitReached(RequestError):
    """The member's own limit; `retry_after_s` tells when to come back."""

    status = 429
    code = "rate_limit_exceeded"
    kind = "rate_limit_error"


class HeadTooLarge(RequestError):
    """The head exceeds the limit."""

    status = 431
    code = "head_too_large"


class EngineError(AnserError):
    """A node failed in its part. Its message may quote the engine, for whoever asked it.

    An engine may repeat a prompt, so nobody else is shown more than `own_words`.
    """

    status = 502
    code = "engine_error"
    _unquoted: str | None = None

    @classmethod
    def quoting(cls, own_words: str, said: str) -> Self:
        """The error with Anser's own words and what the engine said, if anything."""
        error = cls(f"{own_words}: {said}" if said else f"{own_words}.")
        error._unquoted = f"{own_words}."
        return error

    @property
    def own_words(self) -> str:
        """The message without anything that the engine said."""
        return self._unquoted or self.message


class EngineUnreachable(EngineError):
    """No connection to the engine."""

    code = "engine_unreachable"


class ConnectTimeout(EngineUnreachable):
    """The engine took no connection in time."""

    status = 504
    code = "connect_timeout"


class EngineBroken(EngineError):
    """The engine answered what no engine may answer."""

    code = "engine_broken"


class EngineStalled(EngineError):
    """The engine went silent beyond the limit."""

    status = 504
    code = "engine_stalled"


class FirstTokenTimeout(EngineStalled):
    """The engine gave no first token in time, or no embeddings."""

    code = "first_token_timeout"


class TokenGapTimeout(EngineStalled):
    """The engine went silent between two tokens."""

    code = "token_gap_timeout"


class EngineDeclined(EngineError):
    """The engine would not take it now (4xx of the node's own): another node may, unblamed."""

    status = 503
    code = "engine_declined"


class EngineRefused(EngineError):
    """The engine found the request itself at fault: never the node's failure."""

    status = 400
    code = "engine_refused"
    kind = "invalid_request_error"

    def __init__(self, message: str, *, status: int = 400, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status


class AnswerTimeout(AnserError):
    """The whole answer took longer than it may: no node is to blame, none goes on."""

    status = 504
    code = "answer_timeout"


class Unavailable(AnserError):
    """The platform cannot serve this now."""

    status = 503
    code = "unavailable"
    kind = "unavailable_error"


class NoNode(Unavailable):
    """The model exists, but no node serves it now."""

    code = "no_node"


class QueueTimeout(Unavailable):
    """The request waited for a slot as long as it may."""

    code = "queue_timeout"


class DeadlineUnreachable(Unavailable):
    """No first token can come, or has come, by the request's own deadline."""

    code = "deadline_unreachable"


class Overloaded(Unavailable):
    """A limit of the platform itself was reached."""

    code = "overloaded"


class ShuttingDown(Unavailable):
    """The platform drains: another address, or a moment later."""

    code = "shutting_down"


class StoreError(AnserError):
    """The store could not do what was asked."""

    status = 503
    code = "store_error"


class StoreLocked(StoreError):
    """Another process holds the store."""

    code = "store_locked"


class StoreFull(StoreError):
    """The disk is full or read-only."""

    code = "store_full"


class StoreCorrupt(StoreError):
    """The store's file is damaged."""

    code = "store_corrupt"


class StoreNewer(StoreError):
    """The store's file was written by a newer version."""

    code = "store_newer"


class ConfigError(AnserError):
    """A setting is wrong; the message names its source and key path."""

    code = "config_error"


class DataDirInUse(ConfigError):
    """Another process holds the data folder; the message names both."""

    code = "data_dir_in_use"


class SourceError(AnserError):
    """A model's file could not be had."""

    status = 502
    code = "source_error"


class DigestMismatch(SourceError):
    """What came is not what was asked for; it is never used."""

    code = "digest_mismatch"


class NoMirror(SourceError):
    """No mirror answered; the message lists each with its reason."""

    code = "no_mirror"


class ModelFileError(AnserError):
    """The file is not a model that can be loaded safely."""

    status = 422
    code = "model_file_error"
    kind = "invalid_request_error"


class ReceiptError(AnserError):
    """A receipt does not verify; the message names the first thing that fails."""

    status = 422
    code = "receipt_error"
    kind = "invalid_request_error"
