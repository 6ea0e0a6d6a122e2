"""The server's HTTP: routes of OpenAI's protocol, who may ask, errors in OpenAI's shape, and the page. Imports FastAPI.

What is asked for is read in `requests.py`, computed in `completion.py` and put into words in `answers.py`.
"""

import hmac
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from gptdist.errors import GptdistError
from gptdist.model.sampling import Sampling
from gptdist.serve.answers import DONE, Chats, Completions, Gathered, as_event, usage
from gptdist.serve.completion import Ask, Piece, ServedModel, complete
from gptdist.serve.requests import (
    CHAT_STOPS,
    ApiError,
    ChatRequest,
    CompletionRequest,
    parse_request,
    render_chat,
)
from gptdist.serve.turns import Turns

DEFAULT_TOKENS = 16  # OpenAI's, of a completion
DEFAULT_CHAT_TOKENS = 256
LARGEST_BODY = 8 << 20
_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def build_app(model: ServedModel, *, api_key: str | None = None, hosts: frozenset[str] | None = None) -> FastAPI:
    """The server of one model.

    `api_key`: what clients must send as bearer token. `hosts`: names by which it may be called, else the request is
    refused, so that a page from elsewhere cannot reach a loopback server under a name of its own; None: any.
    """
    turns = Turns()
    created = int(time.time())

    def check_host(request: Request) -> None:
        name = (request.headers.get("host") or "").lower()
        name = name if name.endswith("]") else name.rpartition(":")[0] or name
        if hosts is not None and name not in hosts:
            raise ApiError(f"This server does not answer to the name {name!r}.", 403, code="unknown_host")

    def check_key(request: Request) -> None:
        if api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), api_key.encode()):
            raise ApiError("Send the server's key: Authorization: Bearer KEY.", 401, code="invalid_api_key")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        turns.close()

    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(check_host)]
    )
    _answer_errors(app)
    keyed = [Depends(check_key)]
    listed = {"id": model.name, "object": "model", "created": created, "owned_by": "gptdist"}
    listed["context_length"] = model.context

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [listed]})

    @app.get("/v1/models/{name:path}", dependencies=keyed)
    async def one_model(name: str) -> Response:
        _check_model(model, name)
        return JSONResponse(listed)

    @app.post("/v1/completions", dependencies=keyed)
    async def completions(request: Request) -> Response:
        asked = parse_request(CompletionRequest, await _body(request))
        _check_model(model, asked.model)
        make = partial(
            _ask, model, asked, asked.max_tokens or DEFAULT_TOKENS, stop=asked.stops, likeliest=asked.logprobs
        )
        answers = Completions(model.name, model.tokenizer, asked.logprobs is not None)
        return await _respond(request, turns, model, answers, [make(prompt) for prompt in asked.prompts], asked)

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(request: Request) -> Response:
        asked = parse_request(ChatRequest, await _body(request))
        _check_model(model, asked.model)
        most = asked.max_completion_tokens or asked.max_tokens or DEFAULT_CHAT_TOKENS
        ask = _ask(model, asked, most, render_chat(asked.messages), stop=(*asked.stops, *CHAT_STOPS))
        return await _respond(request, turns, model, Chats(model.name, model.tokenizer, False), [ask], asked)

    return app


def _ask(
    model: ServedModel,
    asked: CompletionRequest | ChatRequest,
    max_tokens: int,
    prompt: str | list[int],
    *,
    stop: tuple[str, ...],
    likeliest: int | None = None,
) -> Ask:
    """Raises ApiError for a prompt that the model cannot read."""
    try:
        ids = model.encode(prompt) if isinstance(prompt, str) else prompt
    except GptdistError as error:
        raise ApiError(str(error), param="prompt") from None
    unknown = [index for index in ids if not 0 <= index < model.tokenizer.vocab_size]
    if unknown:
        raise ApiError(
            f"prompt has the id {unknown[0]}; this model's tokenizer knows 0 to {model.tokenizer.vocab_size - 1}.",
            param="prompt",
        )
    if len(ids) > model.context:
        raise ApiError(
            f"The prompt has {len(ids)} tokens; this model's context is {model.context}. Shorten it.",
            param="prompt",
            code="context_length_exceeded",
        )
    sampling = Sampling(
        temperature=1.0 if asked.temperature is None else asked.temperature,
        top_k=asked.top_k,
        top_p=asked.top_p or 1.0,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
    )
    return Ask(ids, max_tokens, sampling, stop, likeliest)


async def _respond(
    request: Request,
    turns: Turns,
    model: ServedModel,
    answers: Completions,
    asks: list[Ask],
    asked: CompletionRequest | ChatRequest,
) -> Response:
    if asked.stream:
        return _Events(_events(turns, model, answers, asks, asked.wants_usage))
    gathered = [Gathered() for _ in asks]
    async with turns.take(lambda: _all(model, asks, gathered)) as pieces:
        if await request.is_disconnected():
            return Response(status_code=499)
        async for _ in pieces:
            if await request.is_disconnected():
                return Response(status_code=499)  # nobody reads it
    counts = usage(sum(len(ask.prompt) for ask in asks), sum(len(one.tokens) for one in gathered))
    return JSONResponse({**answers.answer(gathered), "usage": counts})


def _all(model: ServedModel, asks: list[Ask], gathered: list[Gathered]) -> Generator[Piece, None, None]:
    """The pieces of one completion after the other, each gathered where it belongs."""
    for ask, into in zip(asks, gathered, strict=True):
        for piece in complete(model, ask):
            into.add(piece)
            yield piece


async def _events(
    turns: Turns, model: ServedModel, answers: Completions, asks: list[Ask], wants_usage: bool
) -> AsyncGenerator[bytes, None]:
    counted = 0
    try:
        for index, ask in enumerate(asks):
            for event in answers.begin(index):
                yield as_event(event)
            offset = 0
            async with turns.take(partial(complete, model, ask)) as pieces:
                async for piece in pieces:
                    counted += len(piece.tokens)
                    if piece.text or piece.finish or piece.tokens[0].log_probability is not None:
                        yield as_event(answers.event(index, piece, offset))
                    offset += len(piece.text)
        if wants_usage:
            yield as_event(answers.usage_event(usage(sum(len(ask.prompt) for ask in asks), counted)))
    except GptdistError as error:  # the status has been sent: only an event can still tell
        yield as_event(ApiError(str(error), 500, "server_error").body)
    yield DONE


class _Events(StreamingResponse):
    """A stream of events whose source is closed at once when the client goes."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        self._events = events
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


async def _body(request: Request) -> bytes:
    """Raises ApiError for another type than JSON (which a page from elsewhere may not send) and for too much."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"The body's type is {kind or 'not given'}. Send Content-Type: application/json.", 415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise ApiError(f"The body has over {LARGEST_BODY >> 20} MiB.", 413)
    return body


def _check_model(model: ServedModel, name: str | None) -> None:
    if name is not None and name != model.name:
        raise ApiError(
            f"There is no model {name!r} here; the one there is is {model.name!r}.",
            404,
            param="model",
            code="model_not_found",
        )


def _answer_errors(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(ApiError)
    async def of_ours(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(GptdistError)
    async def of_the_model(_: Request, error: GptdistError) -> Response:
        return answer(ApiError(str(error), 500, "server_error"))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return answer(ApiError(f"{request.method} {request.url.path}: {error.detail}.", error.status_code))

    @app.exception_handler(RequestValidationError)
    async def of_fastapi(_: Request, error: RequestValidationError) -> Response:
        return answer(ApiError(str(error.errors()[0]["msg"])))

    @app.exception_handler(Exception)
    async def of_nobody(_: Request, error: Exception) -> Response:
        return answer(ApiError(f"The server met an error of its own: {type(error).__name__}.", 500, "server_error"))
