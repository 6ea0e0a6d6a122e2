"""`gptdist data verify|show|index`: the data tools' answers on a console.

Knows nothing of formats; `data_tools/` does the work.
"""

import argparse
import os
import sys

from gptdist.errors import EXIT_DONE, EXIT_FAILED, CorpusError


def verify(args: argparse.Namespace) -> int:
    """Print every problem found; exit 1 if there is one."""
    from data_tools.corpus.verify import verify_corpus
    from gptdist.remote import without_secrets

    problems = verify_corpus(args.corpus, args.workers or _cores())
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{without_secrets(str(args.corpus))}: every byte is as it was built")
    return EXIT_FAILED if problems else EXIT_DONE


def show(args: argparse.Namespace) -> int:
    """Print a summary."""
    from data_tools.corpus.show import render_corpus

    print(render_corpus(args.corpus, args.split, args.samples).rstrip())
    return EXIT_DONE


def index(args: argparse.Namespace) -> int:
    """Write manifest and indexes anew."""
    from data_tools.corpus.index import rebuild_index

    if isinstance(args.corpus, str):
        from gptdist.remote import without_secrets

        raise CorpusError(
            f"data index writes into the corpus, and {without_secrets(args.corpus)} is a URL. Copy the corpus to a "
            "folder, make its index there, and copy manifest.json and the indexes back."
        )
    manifest = rebuild_index(args.corpus, args.workers or _cores())
    shards = sum(len(split.shards) for split in manifest.splits.values())
    names = ", ".join(split.index.file for split in manifest.splits.values())
    print(f"{args.corpus}: manifest.json, {names} made anew from {shards:,} tars")
    if absent := manifest.build.get("absent_shards"):
        print(f"note: not there: {absent}. Each was empty when it was built, or is lost: the tars cannot tell.")
    return EXIT_DONE


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
