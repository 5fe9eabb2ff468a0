"""Everything a client can be told went wrong.

    GatewayError
     +- BadRequest               400  invalid_request_error
     |   +- ContextTooLong       400  the chunk that crosses the model's length
     |   +- Unsupported          400  a parameter that can't be honoured
     |   +- UnknownDocument      400  an id alone, of which the stream has no text
     +- Unauthorized             401  no key, or one that is not known
     |   +- NotAdmin             401  an admin route without the admin key
     +- Forbidden                403  not for this tenant
     +- RetrievalRefused         403  this gateway does not retrieve that
     +- StreamNotFound           404  unknown, forgotten or never opened
     +- ModelNotFound            404  no engine serves that model
     +- CollectionNotFound       404
     +- NoSuchEngine             404
     +- Conflict                 409
     |   +- InputClosed          409  chunk or finish after finish
     |   +- SequenceGap          409  the `seq` of a post skips one
     |   +- RetrievalUnderWay    409  a ranked list while the gateway itself ranks
     |   +- CollectionThere      409  there is one of that name
     |   +- EngineThere          409  the pool has that engine
     |   +- KeyInUse             409  the first request of an idempotency key is under way
     +- RequestTimeout           408  the head or the body of a request did not arrive in time
     +- AnswerGone               410  of an answer that is not kept, or not that far back
     +- StreamLost               410  its replica and its engine are both gone
     +- BodyTooLarge             413
     +- KeyReused                422  another request under the same idempotency key
     +- RetrievalFailed          424  no source has found anything
     +- RateLimited              429  the tenant's quota, with Retry-After
     +- Overloaded               503  with Retry-After
     +- Draining                 503  this gateway is about to end: ask another one
     +- IndexAway                503  nobody can say for now which replica holds the stream
     +- StorageFull              507  a collection can't be written, and is as it was
     +- NotHeld                  421  between replicas: the stream is held by another one
     +- EngineFailed             503  no engine, or it died under the stream
     +- EngineTimeout            504  it says nothing of a request that was passed through

One middleware renders them in the OpenAI error shape; after the first byte of an SSE answer
they are sent as an `error` event instead.
"""

from __future__ import annotations

from typing import Any, ClassVar

from engine_adapter import errors as engine


class GatewayError(Exception):
    """Base: a request failed, and the client is told why."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = details
        """Further fields of the error object, e.g. `expected_seq`."""

    @property
    def headers(self) -> dict[str, str]:
        return {}

    def to_json(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error | self.details}


class BadRequest(GatewayError):
    """The request can't be read or contradicts itself."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class ContextTooLong(BadRequest):
    """This input would not leave room for the answer; the stream stays as it was."""

    code = "context_length_exceeded"


class UnknownDocument(BadRequest):
    """A document was named by its id alone, and the stream does not have its text."""

    code = "unknown_document"


class Unsupported(BadRequest):
    """A parameter that this gateway can't honour."""

    code = "unsupported_parameter"


class Unauthorized(GatewayError):
    """The request has no API key, or one that no tenant has."""

    status, type, code = 401, "invalid_request_error", "invalid_api_key"

    @property
    def headers(self) -> dict[str, str]:
        return {"WWW-Authenticate": "Bearer"}


class Forbidden(GatewayError):
    """The tenant may not do that."""

    status, type, code = 403, "invalid_request_error", "forbidden"


class RetrievalRefused(GatewayError):
    """This gateway is not set up to retrieve that."""

    status, type, code = 403, "invalid_request_error", "retrieval_refused"


class RetrievalFailed(GatewayError):
    """Every source failed and there is no other context; `retrieval` says why each did."""

    status, type, code = 424, "retrieval_error", "retrieval_failed"


class StreamNotFound(GatewayError):
    """No such stream: never opened, cancelled long ago, or expired."""

    status, type, code = 404, "invalid_request_error", "stream_not_found"


class ModelNotFound(GatewayError):
    """No engine serves that model."""

    status, type, code = 404, "invalid_request_error", "model_not_found"


class CollectionNotFound(GatewayError):
    """There is no collection of that name."""

    status, type, code = 404, "invalid_request_error", "collection_not_found"


class Conflict(GatewayError):
    """The stream is not in a state that allows this."""

    status, type, code = 409, "invalid_request_error", "conflict"


class InputClosed(Conflict):
    """The stream takes no more input: it was finished or cancelled."""

    code = "input_closed"


class SequenceGap(Conflict):
    """The `seq` of a post skips one; `expected_seq` is the next."""

    code = "sequence_gap"


class RetrievalUnderWay(Conflict):
    """The gateway ranks the documents of this stream itself until its retrieval has ended."""

    code = "retrieval_under_way"


class CollectionThere(Conflict):
    """There is a collection of that name."""

    code = "collection_exists"


class EngineThere(Conflict):
    """The pool has an engine at that address."""

    code = "engine_exists"


class StorageFull(GatewayError):
    """A collection can't be written, e.g. since the disk is full; it is as it was."""

    status, type, code = 507, "server_error", "storage_full"


class NoSuchEngine(GatewayError):
    """The pool has no engine of that name."""

    status, type, code = 404, "invalid_request_error", "engine_not_found"


class NotAdmin(Unauthorized):
    """An admin route was asked for without the admin key."""

    code = "invalid_admin_key"


class KeyInUse(Conflict):
    """The first request with this idempotency key is still under way."""

    code = "idempotency_key_in_use"


class KeyReused(GatewayError):
    """Another request was made with the same idempotency key."""

    status, type, code = 422, "invalid_request_error", "idempotency_key_reused"


class RequestTimeout(GatewayError):
    """The head or the body of a request did not arrive in time; the connection is closed."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class AnswerGone(GatewayError):
    """What the client wants to go on with is not kept any more."""

    status, type, code = 410, "invalid_request_error", "answer_gone"


class StreamLost(GatewayError):
    """The replica that held the stream died, and its engine does not have the prompt any more: to
    try again is of no use."""

    status, type, code = 410, "server_error", "stream_lost"


class BodyTooLarge(GatewayError):
    """The body is larger than the gateway takes."""

    status, type, code = 413, "invalid_request_error", "body_too_large"


class RateLimited(GatewayError):
    """The tenant has used what it may; `limit` says which limit that is."""

    status, type, code = 429, "rate_limit_error", "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_s: int = 1, **details: Any) -> None:
        super().__init__(message, **details)
        self._retry_s = retry_s

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self._retry_s)}


class Overloaded(GatewayError):
    """The gateway has as many streams as it may; try again later."""

    status, type, code = 503, "overloaded_error", "overloaded"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class Draining(GatewayError):
    """This gateway is about to end and takes no new streams; another one does."""

    status, type, code = 503, "server_error", "draining"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class IndexAway(GatewayError):
    """The stream may be held by another replica, and for now nobody can say by which."""

    status, type, code = 503, "server_error", "index_unavailable"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class NotHeld(GatewayError):
    """A replica was sent a request for a stream that it does not hold."""

    status, type, code = 421, "server_error", "not_held"


class EngineFailed(GatewayError):
    """No engine can be reached, or the one of this stream died."""

    status, type, code = 503, "server_error", "engine_unavailable"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": "1"}


class EngineTimeout(GatewayError):
    """The engine was silent too long on a request that was passed through to it."""

    status, type, code = 504, "server_error", "engine_timeout"


def from_engine(error: engine.EngineError) -> GatewayError:
    """What a client is told of an engine's error."""
    match error:
        case engine.PromptTooLong():
            return ContextTooLong(error.message)
        case engine.BadOperation():
            return BadRequest(error.message)
        case engine.EngineOverloaded():
            return Overloaded(error.message)
        case engine.EngineUnavailable() | engine.UnknownPrompt():
            return EngineFailed(error.message)
        case _:
            return GatewayError(error.message)
