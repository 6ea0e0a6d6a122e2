"""Pieces of text join to the text of all tokens, and none of them ends within a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.text_stream import TextStream
from gptdist.data.tokenizer import CorpusTokenizer

BYTES = CorpusTokenizer.of_bytes()
TEXT = "naïve Zürich → 東京 🙂 end\n\ttabs"


def pieces(tokenizer: CorpusTokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    stream = TextStream(tokenizer, prompt or [])
    return [*map(stream.push, ids), stream.finish()]


def metaspace() -> CorpusTokenizer:
    """Words with their space before them, which a text's first word loses: as SentencePiece's decoders do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "</s>", "\u2581one", "\u2581two", "\u2581three", "s"]
    library = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens(["</s>"])
    return CorpusTokenizer.parse(library.to_str().encode(), "tokenizer.json")


def test_no_piece_ends_within_a_character() -> None:
    found = pieces(BYTES, BYTES.encode(TEXT))
    assert "".join(found) == TEXT
    assert not any("\ufffd" in piece for piece in found)
    assert len([piece for piece in found if piece]) == len(TEXT)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), prompt=st.text(max_size=20))
def test_pieces_join_to_the_text(text: str, prompt: str) -> None:
    assert "".join(pieces(BYTES, BYTES.encode(text), BYTES.encode(prompt))) == text


def test_bytes_that_are_no_text_are_told_in_the_end() -> None:
    assert pieces(BYTES, [65, 0xE6, 66, 0xE6]) == ["A", "", "\ufffdB", "", "\ufffd"]


@pytest.mark.parametrize("prompt", [[], [2], [2] * 20])
def test_words_keep_the_space_that_the_start_of_a_text_loses(prompt: list[int]) -> None:
    tokenizer = metaspace()
    assert tokenizer.decode([3]) == "two"
    expected = tokenizer.decode([*prompt, 3, 5, 4])[len(tokenizer.decode(prompt)) :]
    assert "".join(pieces(tokenizer, [3, 5, 4], prompt)) == expected
    assert expected.startswith(" ") == bool(prompt)
