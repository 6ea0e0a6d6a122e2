"""The proof of an export: our model and `transformers` compute the same tokens, each in a process of its own.

One model is in memory at a time, and this process loads none. Which logits must agree is `conformance.py`'s.
"""

import json
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.config.sections import DataConfig, RunConfig
from gptdist.data.corpora import corpus_names, open_corpora, open_stores
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError, ExchangeError, GptdistError, NotConformant
from gptdist.exchange.conformance import RULE, Probe, compare, probe_lengths, random_probes, together
from gptdist.remote import is_url
from launch.models import proof_models

EXTRA = "gptdist[export]"
# Spaces, case, accents, digits, a character of four bytes, ends of lines: what tokenizers differ over.
_TEXTS = (
    "The quick brown fox",
    "  two  spaces\n\n\ttab ",
    "naïve café 12,345.60",
    "日本語 and 🎉",
    "def f(x):\r\n    return x",
)


@dataclass(frozen=True)
class Proof:
    """What was computed, for the card."""

    card: dict[str, Any]


def check_can_prove() -> None:
    """Raises ExchangeError where `transformers` is not installed. Loads nothing."""
    if find_spec("transformers") is None:
        raise ExchangeError(
            "the export is proven with `transformers`, which is not installed. Install it (pip install "
            f"'{EXTRA}'), or export without proof: --no-proof."
        )


def choose_probes(config: RunConfig) -> list[Probe]:
    """Text of the run's corpus where it is on this machine; and always random ids, the last of them included."""
    model = config.model
    lengths = probe_lengths(model.sequence_length, model.vocab_size)
    text = _text_of_corpus(config.data, lengths[-1])
    probes = random_probes(lengths if text is None else lengths[-1:], model.vocab_size, config.train.seed)
    if text is not None:
        probes += [Probe("text", text[:length]) for length in lengths]
    return probes


def prove(
    checkpoint: Path,
    folder: Path,
    config: RunConfig,
    dtype: str,
    tokenizer: CorpusTokenizer | None,
    probes: list[Probe],
) -> Proof:
    """Compare `folder`, an export of `checkpoint` as `dtype` (torch's name), with our model of the weights so rounded.

    Raises NotConformant, saying where they differ, unless they compute the same.
    """
    texts = {} if tokenizer is None else {text: tokenizer.encode(text) for text in _TEXTS}
    with tempfile.TemporaryDirectory(prefix="gptdist-proof-") as name:
        work = Path(name)
        tokens = work / "tokens.json"
        tokens.write_text(json.dumps([probe.tokens.tolist() for probe in probes]))
        ours = alone(proof_models.ours, checkpoint, config, dtype, tokens, work / "ours")
        theirs = alone(proof_models.theirs, folder, tokens, list(texts), work / "theirs")
        agreements = [
            compare(*(np.load(work / who / f"{number}.npy", mmap_mode="r") for who in ("ours", "theirs")))
            for number in range(len(probes))
        ]
    whole = together(agreements)
    for text, expected in texts.items():
        if theirs["ids"][text] != expected:
            raise NotConformant(
                f"the exported tokenizer gives {theirs['ids'][text]} for {text!r}, and the model was trained on "
                f"{expected}. This is a tokenizer that this version cannot export; no folder was left."
            )
    if not whole.holds:
        worst = max(range(len(probes)), key=lambda number: _badness(agreements[number].max_difference))
        raise NotConformant(
            f"the exported model does not compute what ours does: a logit differs by {whole.max_difference:.3g}, and "
            f"at most {whole.bound:.3g} is allowed ({RULE}); the likeliest token is the same at "
            f"{whole.greedy_agreement:.1%} of {whole.positions} positions. Worst in the probe of "
            f"{len(probes[worst].tokens)} {probes[worst].kind} tokens. No folder was left."
        )
    card = {
        "rule": RULE,
        "bound": whole.bound,
        "max_difference": whole.max_difference,
        "max_logit": whole.max_logit,
        "greedy_agreement": whole.greedy_agreement,
        "positions": whole.positions,
        "probes": [
            {"kind": probe.kind, "tokens": len(probe.tokens), "max_difference": found.max_difference}
            | {"max_logit": found.max_logit, "greedy_agreement": found.greedy_agreement, "positions": found.positions}
            for probe, found in zip(probes, agreements, strict=True)
        ],
        "tokenizer_texts": len(texts),
        "ours": ours["about"],
        "theirs": theirs["about"],
    }
    return Proof(card)


def _badness(difference: float) -> float:
    return float("inf") if np.isnan(difference) else difference


def alone(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """`function(*args)` in a new process, whose memory goes with it; it does not outlive the call.

    Raises what it raises; NotConformant where it died, or met an error that no one foresaw.
    """
    context = multiprocessing.get_context("forkserver")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sending, function, args))
    process.start()
    sending.close()
    try:
        answer = receiving.recv()
    except EOFError:
        raise NotConformant(
            f"the process that computed with {function.__doc__ or function.__name__} was killed, most likely for "
            "want of memory: it needs one fp32 copy of the model. Nothing was left. Export on a larger machine, or, "
            "for a folder of Hugging Face's, without proof: --no-proof."
        ) from None
    finally:
        process.kill()
        process.join()
        receiving.close()
    if isinstance(answer, GptdistError):
        raise answer
    if isinstance(answer, str):
        raise NotConformant(f"{function.__doc__ or function.__name__} could not compute: {answer}. Nothing was left.")
    return dict(answer)


def _answer(sending: Connection, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    """Send what `function` returns; its error, where it is one of ours; else the error in words."""
    answer: dict[str, Any] | GptdistError | str
    try:
        answer = function(*args)
    except GptdistError as error:
        answer = error
    except Exception as error:  # a library's, which need not survive the way between processes
        if os.environ.get("GPTDIST_DEBUG"):
            traceback.print_exc()
        answer = f"{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        return  # the terminal's Ctrl-C, which the parent tells of
    sending.send(answer)


def _text_of_corpus(data: DataConfig, length: int) -> np.ndarray | None:
    """The first tokens of a corpus that is a folder here, of held-out text if there is any; None without one."""
    if data.corpus is None and data.blend is None:
        return None
    for name in corpus_names(data):
        if is_url(name) or not Path(name).is_dir():
            continue
        only = data.model_copy(update={"corpus": name, "blend": None, "phases": ()})
        for split in ("validation", "train"):
            try:
                stores = open_stores(only)
                readers = list(open_corpora(only, split, stores).values())
            except CorpusError:
                break  # moved or damaged: random ids will do
            try:
                for reader in readers:
                    if reader.num_tokens > length:
                        return reader.window(0, length)[:length]
            except CorpusError:
                break
            finally:
                for reader in readers:
                    reader.close()
                for store in stores.values():
                    store.close()
    return None
