"""Text <-> token ids, with the tokenizer that a corpus was built with.

Two kinds: `hf` (a Hugging Face `tokenizer.json`) and `bytes` (ids 0 to 255 are bytes, 256 is end of text). Knows
nothing of models: a model's vocabulary may be larger. Text never becomes the end-of-text id, whatever it contains.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from gptdist.data.store import Store, is_url, open_store
from gptdist.errors import CorpusError

BYTES_FORMAT = "gptdist-bytes"
BYTES = "bytes"

# Tried in this order where nothing else says which special token ends a text.
_END_OF_TEXT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]")


def _byte_letters() -> list[str]:
    """The visible character that stands for each byte in a byte-level vocabulary (Radford et al. 2019, GPT-2)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (value for value in range(256) if value not in shown)
    letters = {value: chr(0x100 + index) for index, value in enumerate(others)}
    return [letters.get(value, chr(value)) for value in range(256)]


BYTE_LETTERS = _byte_letters()


class CorpusTokenizer:
    """`encode` and `decode`, and what identifies the tokenizer. Made by `load`, `parse` or `of_bytes`.

    `content` is its file, byte for byte; `sha256` is of that. `vocab_size` is one more than the largest id. Of one that
    was parsed before, these are enough: its file is then read by the library when it is first used.
    """

    def __init__(self, content: bytes, kind: str, vocab_size: int, end_of_text: int, hf: Any = None) -> None:
        self.content = content
        self.kind = kind
        self.vocab_size = vocab_size
        self.end_of_text = end_of_text
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._hf = hf

    @property
    def _library(self) -> Any:
        """The `tokenizers.Tokenizer` of a tokenizer of kind `hf`."""
        if self._hf is None:
            self._hf = CorpusTokenizer.parse(self.content, TOKENIZER_FILE, self.end_of_text)._hf
        return self._hf

    @staticmethod
    def load(path: Path | str, end_of_text: str | int | None = None) -> "CorpusTokenizer":
        """The tokenizer of a corpus (folder or URL), of a folder with a `tokenizer.json`, or of such a file.

        Raises CorpusError where there is none, where it cannot be understood, or where it is not the corpus's own.
        """
        if is_url(path):
            return CorpusTokenizer.of_corpus(open_store(path))
        path = Path(path)
        if (path / MANIFEST_FILE).is_file():
            return CorpusTokenizer.of_corpus(open_store(path))
        file = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            content = file.read_bytes()
        except OSError as error:
            raise CorpusError(f"Tokenizer {file} cannot be read: {error.strerror}. Name a HF tokenizer.json.") from None
        ending = end_of_text if end_of_text is not None else _configured_end_of_text(file.parent)
        return CorpusTokenizer.parse(content, str(file), ending)

    @staticmethod
    def of_corpus(store: Store, manifest: Manifest | None = None) -> "CorpusTokenizer":
        """The tokenizer that a corpus was built with. Raises CorpusError where what lies beside it is another."""
        info = (manifest or Manifest.load(store)).tokenizer
        where = store.shown(TOKENIZER_FILE)
        try:
            content = store.read(TOKENIZER_FILE)
        except CorpusError as error:
            raise CorpusError(f"The corpus has no tokenizer: {error} Put the corpus's own file back.") from None
        found = hashlib.sha256(content).hexdigest()
        if found != info.sha256:
            raise CorpusError(
                f"{where} is not the tokenizer that the corpus was built with: its sha256 is {found[:12]}..., the "
                f"manifest says {info.sha256[:12]}.... Put the corpus's own file back, or build the corpus again."
            )
        return CorpusTokenizer.parse(content, where, info.end_of_text)

    @staticmethod
    def parse(content: bytes, where: str, end_of_text: str | int | None = None) -> "CorpusTokenizer":
        """A tokenizer from the bytes of its file; `where` names it in messages.

        `end_of_text` is the token (or its id) that ends a document; None: found among the usual names.
        """
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise CorpusError(f"{where} is not a tokenizer: it is not JSON ({error}).") from None
        if isinstance(fields, dict) and fields.get("format") == BYTES_FORMAT:
            return CorpusTokenizer.of_bytes()
        if not isinstance(fields, dict) or "model" not in fields:
            raise CorpusError(f"{where} is not a HF tokenizer.json: it has no `model`.")
        hf = _read_hf(content, where)
        ids = hf.get_vocab(with_added_tokens=True)
        ending = _find_end_of_text(ids, end_of_text, where)
        if any(token["id"] == ending and not token.get("special") for token in fields.get("added_tokens") or []):
            # Text that spells an added token becomes its id unless it is special, and this one no text may become.
            for token in fields["added_tokens"]:
                token["special"] = token.get("special") or token["id"] == ending
            hf = _read_hf(json.dumps(fields).encode(), where)
        return CorpusTokenizer(content, "hf", max([*ids.values(), ending]) + 1, ending, hf)

    @staticmethod
    def of_bytes() -> "CorpusTokenizer":
        """The tokenizer whose ids are the bytes of UTF-8."""
        content = json.dumps({"format": BYTES_FORMAT, "vocab_size": 257, "end_of_text": 256}, indent=1).encode() + b"\n"
        return CorpusTokenizer(content, BYTES, 257, 256)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing added."""
        return [int(index) for index in self.encode_documents([text])[0]]

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, as arrays; on all cores where the tokenizer can."""
        ids, ends = self.encode_flat(texts)
        return np.split(ids, ends[:-1]) if len(ends) else []

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids of all texts in a row, where each text's ids end): uint8 for bytes or uint32, and int64 [texts].

        On all cores where the tokenizer can. Raises CorpusError for a text that UTF-8 cannot hold.
        """
        try:
            if self.kind == BYTES:
                rows = [text.encode() for text in texts]
                ids = np.frombuffer(b"".join(rows), dtype=np.uint8)
            else:
                rows = [row.ids for row in self._library.encode_batch_fast(list(texts), add_special_tokens=False)]
                ids = np.fromiter(chain.from_iterable(rows), dtype=np.uint32, count=sum(map(len, rows)))
        except (UnicodeEncodeError, TypeError):
            refuse_surrogates(texts)
            raise
        return ids, np.cumsum(np.fromiter(map(len, rows), dtype=np.int64, count=len(rows)))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without special tokens; bytes that are no UTF-8 become the replacement character."""
        if self.kind == BYTES:
            return bytes(index for index in ids if index < 256).decode("utf-8", errors="replace")
        return str(self._library.decode(list(ids), skip_special_tokens=True))

    def opening(self) -> list[int]:
        """Ids that the tokenizer's own file would put before every text; corpora are built without them."""
        return [] if self.kind == BYTES else list(self._library.encode("", add_special_tokens=True).ids)

    def token(self, index: int) -> str:
        """How the vocabulary spells the token `index`; "" where it has none."""
        return "" if self.kind == BYTES else str(self._library.id_to_token(index) or "")


def refuse_surrogates(texts: Sequence[str]) -> None:
    """Raises CorpusError for the first text with half a surrogate pair, which is no character and has no UTF-8."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            around = text[max(0, error.start - 20) : error.start + 20]
            raise CorpusError(
                f"A document holds half a surrogate pair, which is not text, at character {error.start}: {around!r}. "
                "Mend or leave out the document."
            ) from None


def _read_hf(content: bytes, where: str) -> Any:
    """A `tokenizers.Tokenizer` that gives the same ids for a text whatever surrounds it, and always all of them."""
    from tokenizers import Tokenizer  # not needed for `bytes`, and not by readers of tokens

    try:
        hf = Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises bare Exception
        raise CorpusError(f"{where} is not a tokenizer that the `tokenizers` library reads: {error}") from None
    hf.no_truncation()
    hf.no_padding()
    hf.encode_special_tokens = True  # text that spells a special token stays text
    if getattr(hf.model, "dropout", None) is not None:
        hf.model.dropout = None  # merges left out at random: not of a corpus that is the same each time
    return hf


def _configured_end_of_text(folder: Path) -> str | None:
    """The end-of-text token that a `tokenizer_config.json` beside the tokenizer names, if one does."""
    try:
        token = json.loads((folder / "tokenizer_config.json").read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _find_end_of_text(ids: dict[str, int], wanted: str | int | None, where: str) -> int:
    if isinstance(wanted, int):
        return wanted
    if wanted is not None and wanted not in ids:
        raise CorpusError(f"{where} has no token {wanted!r} to end documents with. Name one that it has.")
    for name in (wanted,) if wanted is not None else _END_OF_TEXT_NAMES:
        if name in ids:
            return ids[name]
    raise CorpusError(
        f"{where} has none of the usual end-of-text tokens ({', '.join(_END_OF_TEXT_NAMES)}). Name its own with "
        "--end-of-text."
    )
