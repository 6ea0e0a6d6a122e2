"""One completion: prompt ids in, pieces of text out as they come, with the reason why it ends.

Knows tokens, text and stop strings; nothing of HTTP or of OpenAI's JSON.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

from gptdist.comms import Comms
from gptdist.data.text_stream import TextStream
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.engine.engine import InferenceEngine
from gptdist.model.sampling import Sampling
from gptdist.train.sample import Token, continue_text


@dataclass(frozen=True)
class ServedModel:
    """What is served, and what clients call it. `opening`: ids that stand before every text."""

    name: str
    engine: InferenceEngine
    comms: Comms
    tokenizer: CorpusTokenizer
    opening: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        """Tokens a prompt may have."""
        return self.engine.model.sequence_length

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, at least one: an empty prompt is the beginning of a document, after another's end."""
        return [*self.opening, *self.tokenizer.encode(text)] or [self.tokenizer.end_of_text]


@dataclass(frozen=True)
class Ask:
    """One prompt, and how to go on from it. `likeliest`: tell log-probabilities, of so many tokens at each place."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    likeliest: int | None = None


@dataclass(frozen=True)
class Piece:
    """What one more token brought. `text` may be empty: within a character, or at what may become a stop string.

    The last piece has a `finish`, "stop" or "length", and perhaps no token.
    """

    text: str
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None


def complete(model: ServedModel, ask: Ask) -> Generator[Piece, None, None]:
    """The continuation, without the stop string that ends it."""
    text = TextStream(model.tokenizer, ask.prompt)
    stops = StopStrings(ask.stop)
    tokens = continue_text(
        model.engine,
        model.comms,
        ask.prompt,
        ask.max_tokens,
        ask.sampling,
        vocab_size=model.tokenizer.vocab_size,
        end_of_text=model.tokenizer.end_of_text,
        likeliest=ask.likeliest,
    )
    count = 0
    for token in tokens:
        count += 1
        told, stopped = stops.push(text.push(token.id))
        yield Piece(told, [token], "stop" if stopped else None)
        if stopped:
            return
    told, stopped = stops.push(text.finish())
    finish = "stop" if stopped or count < ask.max_tokens else "length"
    yield Piece(told if stopped else told + stops.finish(), finish=finish)


class StopStrings:
    """Text up to the first of some strings; what may be the beginning of one is held back until that is settled."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [string for string in strings if string]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(what can be told, whether a stop string has come)."""
        self._held += text
        found = [place for place in (self._held.find(string) for string in self._strings) if place >= 0]
        if found:
            told, self._held = self._held[: min(found)], ""
            return told, True
        keep = max((self._beginning(string) for string in self._strings), default=0)
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return told, False

    def finish(self) -> str:
        """What was held back: no stop string came of it."""
        told, self._held = self._held, ""
        return told

    def _beginning(self, string: str) -> int:
        """How much of `string` the text held ends with."""
        longest = min(len(string) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if self._held.endswith(string[:size])), 0)
