"""OpenAI's JSON for completions and chats: whole answers, and the events of a stream.

Pure: pieces in, dicts out. Knows no HTTP and no model.
"""

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.serve.completion import Piece
from gptdist.train.sample import Token

DONE = b"data: [DONE]\n\n"


def as_event(body: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The counts, as OpenAI names them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Completions:
    """Bodies of /v1/completions."""

    kind, whole, part = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: CorpusTokenizer, told: bool) -> None:
        """`told`: log-probabilities too."""
        self._tokenizer = tokenizer
        self._told = told
        self._common = _common(self.kind, model)

    def begin(self, index: int) -> list[dict[str, Any]]:
        """Events before the first piece."""
        return []

    def event(self, index: int, piece: Piece, offset: int) -> dict[str, Any]:
        """`offset`: characters of the text before this piece."""
        return self._body([self._choice(index, piece.text, piece.tokens, piece.finish, offset)])

    def answer(self, gathered: "list[Gathered]") -> dict[str, Any]:
        choices = [self._choice(index, one.text, one.tokens, one.finish, 0) for index, one in enumerate(gathered)]
        return self._body(choices)

    def usage_event(self, counts: dict[str, int]) -> dict[str, Any]:
        return {**self._body([]), "usage": counts}

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._common, "object": self.part, "choices": choices}

    def _choice(self, index: int, text: str, tokens: list[Token], finish: str | None, offset: int) -> dict[str, Any]:
        told = self._log_probabilities(tokens, offset) if self._told else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}

    def _log_probabilities(self, tokens: list[Token], offset: int) -> dict[str, Any]:
        """Each token as it reads by itself; a part of a character reads as the replacement character."""
        spelt = [self._tokenizer.decode([token.id]) for token in tokens]
        offsets = [offset + len("".join(spelt[:number])) for number in range(len(spelt))]
        likeliest: list[dict[str, float]] = []
        for token in tokens:
            place: dict[str, float] = {}
            for index, value in token.likeliest:
                place.setdefault(self._tokenizer.decode([index]), value)
            likeliest.append(place)
        return {
            "tokens": spelt,
            "token_logprobs": [token.log_probability for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }


class Chats(Completions):
    """Bodies of /v1/chat/completions."""

    kind, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self, index: int) -> list[dict[str, Any]]:
        return [self._body([_delta(index, {"role": "assistant", "content": ""}, None)])]

    def event(self, index: int, piece: Piece, offset: int) -> dict[str, Any]:
        return self._body([_delta(index, {"content": piece.text} if piece.text else {}, piece.finish)])

    def answer(self, gathered: "list[Gathered]") -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": one.text, "refusal": None},
                "logprobs": None,
                "finish_reason": one.finish,
            }
            for index, one in enumerate(gathered)
        ]
        return {**self._common, "object": self.whole, "choices": choices}


@dataclass
class Gathered:
    """The pieces of one completion so far."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += piece.tokens
        self.finish = piece.finish or self.finish


def _common(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "object": "", "created": int(time.time()), "model": model}


def _delta(index: int, delta: dict[str, str], finish: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
