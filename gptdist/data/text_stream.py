"""Text of tokens as they come, in whole characters.

A character may be spread over several tokens, and a tokenizer may spell a token otherwise at the start of a text; so
each piece is what decoding a few tokens more adds to their text. Knows a tokenizer and nothing of where ids come from.
"""

from collections.abc import Sequence

from gptdist.data.tokenizer import CorpusTokenizer

_CONTEXT = 8  # tokens before a piece that settle how it is spelt: more than any character has
_UNFINISHED = "\ufffd"  # what decoding makes of bytes that are no UTF-8, or not yet


class TextStream:
    """Pieces of text, which joined are the text of all ids after `prompt`."""

    def __init__(self, tokenizer: CorpusTokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-_CONTEXT:])
        self._told = len(self._ids)

    def push(self, index: int) -> str:
        """What can be told after one more id: "" where it ends within a character."""
        self._ids.append(index)
        piece = self._piece()
        return "" if piece.endswith(_UNFINISHED) else self._tell(piece)

    def finish(self) -> str:
        """What is left to tell: bytes that never became a character."""
        return self._tell(self._piece())

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._told])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _tell(self, piece: str) -> str:
        self._ids = self._ids[max(0, self._told - _CONTEXT) :]
        self._told = len(self._ids)
        return piece
