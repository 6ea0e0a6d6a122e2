"""What clients may send: OpenAI's fields for completions and chat, their limits, and what is refused.

Knows no HTTP and no model. A field that would change the text and that nothing here does is refused, never ignored.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import takewhile
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

MOST_TOKENS = 65536
MOST_PROMPTS = 64
_MOST_WISHES = 4
_LONGEST_VALUE = 80
_IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields of OpenAI's that do nothing here, with the values at which nothing is just what they ask for.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
}

StopText = Annotated[str, Field(min_length=1, max_length=256)]


class ApiError(Exception):
    """An answer other than what was asked for, as OpenAI's clients expect it."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(BaseModel):
    """`include_usage`: one more event at the end, with the counts."""

    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=1)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4)] | None = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


TokenCount = Annotated[StrictInt, Field(ge=1, le=MOST_TOKENS)]


class CompletionRequest(_Request):
    """POST /v1/completions. A prompt is text or ids; several may come in a list."""

    prompt: str | list[str] | list[StrictInt] | list[list[StrictInt]] = ""
    max_tokens: TokenCount | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One by one. Raises ApiError for none, too many, and for one without ids."""
        prompt = self.prompt
        found: list[Any] = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else [*prompt]
        if not found or any(one == [] for one in found):
            raise ApiError(
                "prompt is an empty list. Send text, or at least one id; the text '' begins a document.", param="prompt"
            )
        if len(found) > MOST_PROMPTS:
            raise ApiError(
                f"prompt has {len(found)} prompts; at most {MOST_PROMPTS} go in one request.", param="prompt"
            )
        return found


class TextPart(BaseModel):
    """Part of a message that is made of parts; only text can be read here."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    logprobs: Literal[False] | None = None


Request = TypeVar("Request", bound=_Request)

_SPEAKERS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
CHAT_STOPS = ("\nUser:", "\nSystem:")


def render_chat(messages: list[Message]) -> str:
    """A chat as plain text, which is all that a model trained on text knows:

    `System: ...`, `User: ...` and `Assistant: ...`, an empty line between them, and `Assistant:` to go on from.
    """
    told = [f"{_SPEAKERS[message.role]}: {message.text.strip()}\n\n" for message in messages]
    return "".join(told) + "Assistant:"


def parse_request(kind: type[Request], body: bytes) -> Request:
    """Raises ApiError for what is no JSON, breaks a limit, or asks for what is not done here."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error.errors()) from None
    for name, value in (request.model_extra or {}).items():
        if name in _IGNORED or value in _NEUTRAL.get(name, (None,)):
            continue
        if name in _NEUTRAL:
            raise ApiError(f"{name} is not supported here. Leave it out.", param=name, code="unsupported_parameter")
        near = get_close_matches(name, [*kind.model_fields, *_NEUTRAL], n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ApiError(f"There is no parameter {name}.{hint}", param=name, code="unknown_parameter")
    return request


def _refusal(errors: Sequence[Any]) -> ApiError:
    """Of the first field that is wrong; where it may be of several kinds, what each of them asks for."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(f"The body is not JSON: {first['msg']}.")
    of_field = [error for error in errors if error["loc"][:1] == first["loc"][:1]]
    paths = list(zip(*(error["loc"] for error in of_field), strict=False))
    shared = [str(parts[0]) for parts in takewhile(lambda parts: len(set(parts)) == 1, paths)]
    wishes = list(dict.fromkeys(error["msg"] for error in of_field))[:_MOST_WISHES]
    value = repr(first["input"])
    shown = value if len(value) <= _LONGEST_VALUE else value[: _LONGEST_VALUE - 3] + "..."
    where = ".".join(shared) or "The body"
    return ApiError(f"{where}: {', or '.join(wishes)}; it is {shown}.", param=shared[0] if shared else None)
