"""Everything that can go wrong between the gateway and an engine.

    EngineError
     +- BadOperation          400  the body can't be read or contradicts itself
     |   +- PromptTooLong     400  the prompt would not leave room for an answer
     +- UnknownPrompt         404  never opened here, aborted, or its lease has run out
     +- VersionConflict       409  neither the next version nor a repetition of the newest
     +- PromptExists          409  `open` of an id that is open with other tokens
     +- PromptFinished        409  its input is closed and it is too late for this
     +- KvLost                503  the KV that an answer was to start from did not come
     +- EngineOverloaded      503  as many prompts are open as the engine allows
     +- EngineUnavailable     503  the engine does not answer, or died on the way
         +- WithoutPlugin     503  something answers there, but has none of the operations

On the wire an error is the JSON object of `to_json`; `from_json` gives the same class back.
"""

from __future__ import annotations

from typing import Any, ClassVar


class EngineError(Exception):
    """Base: an engine operation failed."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "engine_error"

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        """What a program needs to react, e.g. `expected_version`. JSON values only."""
        self.told = False
        """Another operation that shared the request has failed with the same: one failure of the
        engine, not two."""

    def to_json(self) -> dict[str, Any]:
        return {"message": self.message, "code": self.code, **self.details}

    @staticmethod
    def from_json(error: dict[str, Any]) -> EngineError:
        """The error that `to_json` described; an unknown code gives a plain `EngineError`."""
        details = {k: v for k, v in error.items() if k not in ("self", "message", "code")}
        kind = _BY_CODE.get(str(error.get("code")), EngineError)
        return kind(str(error.get("message", "engine error")), **details)


class BadOperation(EngineError):
    """The operation can't be read or contradicts itself."""

    status, code = 400, "bad_operation"


class PromptTooLong(BadOperation):
    """The prompt would leave no room for an answer; it stays as it was."""

    code = "prompt_too_long"


class UnknownPrompt(EngineError):
    """The prompt was never opened here, was aborted, or its lease has run out."""

    status, code = 404, "unknown_prompt"


class VersionConflict(EngineError):
    """The version is neither the next one nor a repetition of the newest."""

    status, code = 409, "version_conflict"


class PromptExists(EngineError):
    """A prompt of this id is open already, with other tokens."""

    status, code = 409, "prompt_exists"


class PromptFinished(EngineError):
    """The input of the prompt is closed: a second `finish`, or an update of a prompt whose
    answer has a token already."""

    status, code = 409, "prompt_finished"


class KvLost(EngineError):
    """The KV that an answer was to start from did not come; the engine itself is well, and nothing
    was sampled."""

    status, code = 503, "kv_lost"


class EngineOverloaded(EngineError):
    """As many prompts are open as the engine allows."""

    status, code = 503, "engine_overloaded"


class EngineUnavailable(EngineError):
    """The engine does not answer, or died on the way."""

    status, code = 503, "engine_unavailable"


class WithoutPlugin(EngineUnavailable):
    """Something answers there, but has none of the operations: a server without the plug-in."""

    code = "without_plugin"


_BY_CODE: dict[str, type[EngineError]] = {
    kind.code: kind
    for kind in (
        BadOperation,
        PromptTooLong,
        UnknownPrompt,
        VersionConflict,
        PromptExists,
        PromptFinished,
        KvLost,
        EngineOverloaded,
        EngineUnavailable,
        WithoutPlugin,
    )
}
