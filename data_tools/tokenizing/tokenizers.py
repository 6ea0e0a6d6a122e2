"""Makes the tokenizer that a build asks for: an existing one, a new byte-level BPE, or plain bytes.

Knows the `tokenizers` trainer and the files in which others keep a tokenizer; what a tokenizer is afterwards is in
`gptdist/data/tokenizer.py`.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from data_tools.tokenizing.tiktoken_encoding import PREFIX, check_same_ids, load_encoding, tokenizer_of_encoding
from gptdist.data.manifest import TOKENIZER_FILE
from gptdist.data.tokenizer import BYTE_LETTERS, CorpusTokenizer
from gptdist.errors import CorpusError

END_OF_TEXT = "<|endoftext|>"
# 256 bytes and the end of text.
MIN_TRAINED_SIZE = 257

_KINDS = "a HF tokenizer.json, a folder with one, tiktoken:NAME, train:SIZE or bytes"
# Classes of transformers that split text as GPT-2 does, so that vocab.json and merges.txt say all.
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "RobertaTokenizer", "RobertaTokenizerFast")


def check_tokenizer(spec: str, end_of_text: str | None = None) -> CorpusTokenizer | None:
    """The tokenizer that `spec` names, None where it must be trained first. Raises CorpusError for what is neither.

    `spec` is `bytes`, `train:SIZE`, `tiktoken:NAME`, or a path to a HF tokenizer.json or to a folder with one, or with
    GPT-2's vocab.json and merges.txt. `end_of_text`: the token that ends documents, where the usual names do not fit.
    """
    if spec == "bytes":
        return CorpusTokenizer.of_bytes()
    if spec.startswith("train:"):
        _trained_size(spec)
        return None
    if spec.startswith(PREFIX):
        encoding = load_encoding(spec.removeprefix(PREFIX))
        return tokenizer_of_encoding(encoding, end_of_text or END_OF_TEXT)
    path = Path(spec)
    if not path.exists():
        raise CorpusError(f"Tokenizer {spec!r} does not exist. Name {_KINDS}.")
    tokenizer = _from_path(path, end_of_text)
    _check_ending(tokenizer, spec)
    return tokenizer


def check_sample(spec: str, tokenizer: CorpusTokenizer, texts: Sequence[str]) -> None:
    """Raises CorpusError where `tokenizer`, made by `check_tokenizer(spec)`, gives other ids than what `spec` names."""
    if spec.startswith(PREFIX):
        check_same_ids(tokenizer, load_encoding(spec.removeprefix(PREFIX)), texts)


def train_tokenizer(spec: str, texts: Iterable[str]) -> CorpusTokenizer:
    """A byte-level BPE (Sennrich et al. 2016, on bytes as GPT-2's) of SIZE ids, or fewer from too little text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_trained_size(spec),
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return CorpusTokenizer.parse(bpe.to_str(pretty=True).encode(), f"tokenizer {spec}", END_OF_TEXT)


def _from_path(path: Path, end_of_text: str | None) -> CorpusTokenizer:
    if path.is_dir() and not (path / TOKENIZER_FILE).exists():
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _from_vocab_and_merges(path, end_of_text)
        models = sorted(file.name for file in path.iterdir() if _is_other_format(file))
        has = f"only {', '.join(models)}" if models else "none"
        raise CorpusError(f"Folder {path} should have a {TOKENIZER_FILE} and has {has}. {_how_to_convert(path)}")
    if path.is_file() and _is_other_format(path):
        raise CorpusError(f"{path} is not a HF {TOKENIZER_FILE}. {_how_to_convert(path.parent)}")
    return CorpusTokenizer.load(path, end_of_text)


def _is_other_format(file: Path) -> bool:
    return file.suffix in (".model", ".tiktoken", ".spm") or file.name in ("vocab.txt", "vocab.bpe", "encoder.json")


def _how_to_convert(folder: Path) -> str:
    return (
        f"With transformers installed make one: AutoTokenizer.from_pretrained({str(folder)!r}, use_fast=True)"
        ".save_pretrained(FOLDER). Of an encoding of tiktoken name tiktoken:NAME."
    )


def _check_ending(tokenizer: CorpusTokenizer, where: str) -> None:
    """Raises CorpusError where text can become the end-of-text id, as with the Unigram models of SentencePiece."""
    if tokenizer.kind == "bytes":
        return
    spelled = tokenizer.token(tokenizer.end_of_text)
    for text in (spelled, f" {spelled} ", f"a{spelled}b", f"a {spelled}\n"):
        if tokenizer.end_of_text in tokenizer.encode(text):
            raise CorpusError(
                f"Text that spells {spelled!r} becomes the end-of-text id with {where}, so a document could end in its "
                "middle. Name another token with --end-of-text, or a byte-level BPE tokenizer."
            )


def _from_vocab_and_merges(folder: Path, end_of_text: str | None) -> CorpusTokenizer:
    """GPT-2's two files, as one. Tokens that the configuration beside them names are special."""
    vocab, config = _read_json(folder / "vocab.json"), _read_json(folder / "tokenizer_config.json")
    if (kind := config.get("tokenizer_class", _GPT2_CLASSES[0])) not in _GPT2_CLASSES:
        raise CorpusError(
            f"{folder} has vocab.json and merges.txt of a {kind}, which may split text otherwise than GPT-2's. "
            f"{_how_to_convert(folder)}"
        )
    if missing := [letter for letter in BYTE_LETTERS if letter not in vocab]:
        raise CorpusError(
            f"{folder}/vocab.json is not of a byte-level BPE: it lacks {missing[0]!r}. {_how_to_convert(folder)}"
        )
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if bad := next(
        (merge for merge in merges if len(merge) != 2 or not vocab.keys() >= {*merge, "".join(merge)}), None
    ):
        raise CorpusError(f"{folder}/merges.txt has a merge that is not of vocab.json: {' '.join(bad)!r}.")
    special = _named_tokens(folder, config)
    vocab |= {token: index for token, index in _read_json(folder / "added_tokens.json").items() if token not in vocab}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    prefix = bool(config.get("add_prefix_space", False))
    letters = {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True}
    fields = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": token, **flags}
            for token, index in sorted(vocab.items(), key=lambda item: item[1])
            if token in special
        ],
        "normalizer": None,
        "pre_tokenizer": letters,
        "post_processor": None,
        "decoder": letters,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    ending = end_of_text or _content(config.get("eos_token"))
    return CorpusTokenizer.parse(json.dumps(fields, ensure_ascii=False, indent=1).encode() + b"\n", str(folder), ending)


def _named_tokens(folder: Path, config: dict[str, Any]) -> set[str]:
    """The special tokens of a folder of transformers, and the usual end of text."""
    tokens = {END_OF_TEXT, *_read_json(folder / "added_tokens.json")}
    for named in (config, _read_json(folder / "special_tokens_map.json")):
        tokens |= {_content(value) or "" for name, value in named.items() if name.endswith("_token")}
        tokens |= {_content(value) or "" for value in named.get("additional_special_tokens") or []}
    tokens |= {_content(value) or "" for value in (config.get("added_tokens_decoder") or {}).values()}
    return tokens - {""}


def _content(token: Any) -> str | None:
    """A token's text, given as such or with flags."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none."""
    try:
        fields = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CorpusError(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise CorpusError(f"{path} should hold a JSON object and holds a {type(fields).__name__}.")
    return fields


def _trained_size(spec: str) -> int:
    size = spec.removeprefix("train:").replace(",", "").replace("_", "")
    if not size.isdecimal() or int(size) < MIN_TRAINED_SIZE:
        raise CorpusError(
            f"Tokenizer {spec!r}: the size must be a number of at least {MIN_TRAINED_SIZE} (256 bytes and the "
            "end of text), as in train:4096."
        )
    return int(size)
