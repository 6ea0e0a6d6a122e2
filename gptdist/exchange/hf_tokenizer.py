"""A corpus's tokenizer as Hugging Face's tools read it, and what a served model must know of it.

Ids must be those the model was trained on: of the text alone, nothing put around it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.data.tokenizer import BYTE_LETTERS, BYTES, CorpusTokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
_END_OF_TEXT = "<|endoftext|>"
# What in a tokenizer.json adds ids to a text's own, or takes some away.
_ADDS_NOTHING = ("ByteLevel",)


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of files by name, and what to tell about them."""

    files: dict[str, bytes]
    notes: tuple[str, ...]


def tokenizer_files(tokenizer: CorpusTokenizer, sequence_length: int) -> TokenizerFiles:
    """tokenizer.json, as it is where that gives the corpus's ids; tokenizer_config.json; generation_config.json."""
    content, notes = _tokenizer_json(tokenizer)
    token = _END_OF_TEXT if tokenizer.kind == BYTES else tokenizer.token(tokenizer.end_of_text)
    # Documents follow each other with one token between them: it ends one, and begins the next.
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token,
        "eos_token": token,
        "model_max_length": sequence_length,
        "clean_up_tokenization_spaces": False,
    }
    if not token:
        settings = {key: value for key, value in settings.items() if not key.endswith("os_token")}
        notes.append(f"the tokenizer has no spelling for its end-of-text id {tokenizer.end_of_text}")
    generation = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    files = {TOKENIZER: content, TOKENIZER_CONFIG: _render(settings), GENERATION_CONFIG: _render(generation)}
    return TokenizerFiles(files, tuple(notes))


def imported_tokenizer(content: bytes, where: str, end_of_text: int | None) -> CorpusTokenizer:
    """The tokenizer of a folder; one that was exported as bytes is bytes again."""
    if content == bytes_tokenizer_json():
        return CorpusTokenizer.of_bytes()
    return CorpusTokenizer.parse(content, where, end_of_text)


def is_of_bytes(path: Path) -> bool:
    """Whether the file is what `tokenizer_files` makes of the tokenizer `bytes`."""
    content = bytes_tokenizer_json()
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def bytes_tokenizer_json() -> bytes:
    """A byte-level BPE without merges whose ids are the bytes: the tokenizer `bytes` in Hugging Face's words."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 256, "content": _END_OF_TEXT, "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    model |= {"byte_fallback": False, "vocab": {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}, "merges": []}
    fields: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
    }
    fields |= {"pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}
    return _render(fields)


def _tokenizer_json(tokenizer: CorpusTokenizer) -> tuple[bytes, list[str]]:
    if tokenizer.kind == BYTES:
        return bytes_tokenizer_json(), []
    fields = json.loads(tokenizer.content)
    dropped = []
    for key in ("truncation", "padding", "post_processor"):
        value = fields.get(key)
        if value is not None and value.get("type") not in _ADDS_NOTHING:
            fields[key] = None
            dropped.append(key)
    if fields["model"].get("dropout"):
        fields["model"]["dropout"] = None
        dropped.append("dropout")
    if not dropped:
        return tokenizer.content, []
    return _render(fields), [
        f"tokenizer.json is the corpus's without {', '.join(dropped)}, which would change the ids that the model knows"
    ]


def _render(fields: dict[str, Any]) -> bytes:
    return (json.dumps(fields, indent=1, ensure_ascii=False) + "\n").encode()
