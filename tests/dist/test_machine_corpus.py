"""A real corpus end to end: this machine's own documentation and sources, built in parallel, verified, trained on.

With GPTDIST_FULL=1 from at least 500 MB of text; by default the same from the first few MB that are found.
"""

import json
import re
import sys
import sysconfig
from pathlib import Path

import pytest

from data_tools.corpus.show import unigram_entropy
from tests.dist.cases import is_full
from tests.dist.commands import Commands, curve

PLACES = [sysconfig.get_paths()["stdlib"], sys.prefix, sys.base_prefix, "/usr/share", "/usr/lib", "/usr/local"]
SUFFIXES = ".py,.pyi,.md,.rst,.txt,.html,.htm,.js,.h,.c,.cpp,.cu,.json,.xml,.sh,.pl,.java,.rb,.css"
ENOUGH = 500_000_000
VOCABULARY = 8192


@pytest.mark.timeout(900)
def test_the_machines_own_text(commands: Commands, tmp_path: Path) -> None:
    places = list(dict.fromkeys(str(Path(place).resolve()) for place in PLACES if Path(place).is_dir()))
    sources = places if is_full() else [str(Path(places[0], name)) for name in ("email", "asyncio", "unittest")]
    corpus = tmp_path / "corpus"
    built = commands.run(
        *("data", "build", *sources, "--out", corpus, "--tokenizer", f"train:{VOCABULARY}", "--workers", "2"),
        *("--suffixes", SUFFIXES, "--exclude", "node_modules", "--on-bad-text", "skip"),
        *("--dedup", "near", "--normalize", "nfc", "--max-document-bytes", "20MB"),
        timeout_seconds=600,
    )
    print(built.expect(0).out)
    report = json.loads((corpus / "report.json").read_text())
    assert report["statistics"]["bytes_read"] > (ENOUGH if is_full() else 1_000_000)
    commands.run("data", "verify", corpus, timeout_seconds=300).expect(0)

    run = tmp_path / "run"
    settings = {
        "data__corpus": corpus,
        "data__mask_documents": True,
        "model__vocab_size": VOCABULARY,
        "model__sequence_length": 64,
        "train__steps": 120,
        "train__global_batch_size": 8,
        "train__eval_interval": 0,
        "checkpoint__interval": 0,
        "optimizer__learning_rate": 5e-3,
    }
    commands.start_train(run, 2, **settings).wait(300).expect(0)
    losses = [loss for loss, _, _ in curve(run).values()]
    entropy = unigram_entropy(corpus)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; independent tokens {entropy:.3f}")
    assert losses[0] > entropy  # it knew nothing
    assert sum(losses[-10:]) / 10 < losses[0] - 1
    _, config, _, _, *changes = commands.train_words(run, 2, **settings)
    shown = commands.run("data", "order", config, *changes, "--step", "3").expect(0).out
    assert re.search(r"\S+\.\w+", shown), shown
