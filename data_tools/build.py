"""Builds a corpus folder from text: START HERE for the build. The stages in their order, and who takes part in each.

An external merge sort: pieces of the sources are read, cleaned and tokenised into runs sorted by a keyed hash of each
document; what concerns all documents is decided; each shard then takes its range of hashes from every run. The same
sources and options give the same bytes, whoever did the work and however often it was killed. Memory, for any size of
corpus: each worker holds a piece (`Plan.piece_bytes` of text, some six times over; a document that is larger than that,
up to fifteen times) or a shard (twice over).
"""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from data_tools.building.arrange import HASH_RANGE, keyed_hash
from data_tools.building.decide import decide
from data_tools.building.duplicate_tasks import find_exact_duplicates, find_near_duplicates, partitions
from data_tools.building.finish import finish_corpus
from data_tools.building.gram_tasks import collect_grams, count_grams, find_common
from data_tools.building.job import (
    ANSWERS_FILE,
    COMMON_FILE,
    DECISIONS_FILE,
    TOKENIZER_STATE,
    Job,
    open_job,
    some_texts,
)
from data_tools.building.plan import BuildOptions, Plan, make_plan
from data_tools.building.tasks import read_documents, sample_documents, write_one_shard
from data_tools.building.team import Alone, Task, Team
from data_tools.building.work import WorkFolder
from data_tools.reporting.progress import NoProgress, Progress
from data_tools.reporting.statistics import BuildStatistics
from data_tools.sources.pieces import Piece
from data_tools.tokenizing.encoders import reference_answers
from data_tools.tokenizing.tokenizers import check_sample, check_tokenizer, train_tokenizer
from gptdist.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.durable import write_durably
from gptdist.errors import CorpusError, GptdistError, StorageError

# Text that a tokenizer is trained on: more changes the merges little and takes minutes.
TOKENIZER_SAMPLE_BYTES = 32 << 20

# No tokenizer packs text tighter than this in practice: a bound that refuses only what cannot fit.
_MOST_BYTES_PER_TOKEN = 8


@dataclass(frozen=True)
class Share:
    """This process is part `part` of `parts` that build one corpus together, each with a team of its own.

    Parts talk through the work folder only. Waiting ends when nothing has come from the others for `patience_seconds`.
    """

    part: int = 0
    parts: int = 1
    patience_seconds: float = 3600.0


@dataclass(frozen=True)
class BuiltCorpus:
    """A corpus that is there. `statistics` None: it was already. `fresh_...`: what this process's team did now."""

    manifest: Manifest
    statistics: BuildStatistics | None = None
    tokenizer_said: str = ""
    fresh_text_bytes: int = 0
    fresh_tokens: int = 0


def build_corpus(
    sources: Sequence[str | Path],
    out_dir: Path,
    tokenizer: str,
    *,
    validation_sources: Sequence[str | Path] = (),
    decontaminate: Sequence[str | Path] = (),
    team: Team | None = None,
    share: Share | None = None,
    fast: bool = True,
    piece_bytes: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> BuiltCorpus | None:
    """Make the corpus `out_dir` from `sources`; the same input gives the same bytes.

    `tokenizer`: a HF tokenizer.json or a folder with one, `tiktoken:NAME`, `train:SIZE`, or `bytes`. With
    `validation_sources` these validate and the fraction plays no part. `decontaminate`: evaluation files whose passages
    are cut out. `piece_bytes`: how much text a worker holds; None: 32 to 256 MB, by the size of the corpus, which does
    not depend on it. `options` are those of `BuildOptions`. A build that was killed goes on where it was.

    None where other parts are still at it. Raises CorpusError for what is wrong with the sources, StorageError where
    `out_dir` cannot be written, WorkerFailed where a worker died.
    """
    out_dir = Path(out_dir)
    ready = check_tokenizer(tokenizer, options.get("end_of_text"))
    # What a corpus says of its tokenizer must not depend on where that lay.
    named = tokenizer if ready is None or ready.kind == "bytes" else f"sha256:{ready.sha256}"
    plan = make_plan(
        _named(sources), _named(validation_sources), _named(decontaminate), _options(named, options), piece_bytes
    )
    work = WorkFolder(out_dir)
    share = share or Share()
    existing = _existing(work, plan)
    if existing is None:
        build = _Build(work, plan, team or Alone(), share, progress or NoProgress(), tokenizer, fast)
        try:
            with work.locked(share.part, share.parts):
                existing = _existing(work, plan)  # now that nobody else is at it
                if existing is None:
                    return build.run(ready)
        except (GptdistError, OSError) as error:
            # To a part that comes late anything may happen when the first one finishes and clears up.
            existing = _existing(work, plan) if share.part else None
            if existing is None and isinstance(error, OSError):
                raise work.storage_error(error) from error
            if existing is None:
                raise
    work.discard_leftovers()
    return BuiltCorpus(existing)


def _named(sources: Sequence[str | Path]) -> list[str]:
    return [str(source) for source in sources]


def _options(tokenizer: str, options: dict[str, Any]) -> BuildOptions:
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    return BuildOptions(tokenizer=tokenizer, **given)


def _existing(work: WorkFolder, plan: Plan) -> Manifest | None:
    """The corpus that is already there, where it is the one asked for. Raises CorpusError for what is in the way."""
    there = work.target
    if not there.exists():
        return None
    if there.is_dir() and not any(there.iterdir()):
        if os.path.ismount(there):
            raise CorpusError(
                f"{work.out_dir} is where another file system is mounted, and a corpus gets its name by a rename. Name "
                f"a folder in it, such as --out {work.out_dir / 'corpus'}."
            )
        return None
    if (there / MANIFEST_FILE).is_file():
        manifest = Manifest.load(there)
        if manifest.build.get("plan") == plan.identity():
            return manifest
    raise CorpusError(
        f"{work.out_dir} exists and is not the corpus of these sources and options. Remove it, or name another with "
        "--out."
    )


class _Build:
    """One process's part in a build, from an open work folder to the corpus."""

    def __init__(
        self, work: WorkFolder, plan: Plan, team: Team, share: Share, progress: Progress, spec: str, fast: bool
    ) -> None:
        self.work, self.plan, self.team, self.share, self.progress = work, plan, team, share, progress
        self.spec, self.fast = spec, fast
        team.while_waiting = lambda: progress.advance(0)
        self.leads = share.part == 0
        raw = plan.to_dict()
        self.raw_plan = raw
        self.job = Job(str(work.target), raw["fingerprint"])
        self.fresh_text_bytes = self.fresh_tokens = 0
        self.encoders: set[str] = set()

    def run(self, ready: CorpusTokenizer | None) -> BuiltCorpus | None:
        open_job.cache_clear()
        try:
            if self.leads and self.work.take_up(self.raw_plan, self.share.parts):
                self.progress.note(f"going on with the build in {self.work.path}")
            self._wait(lambda: [] if self.work.has_plan(self.raw_plan["fingerprint"]) else ["the plan"], "the plan")
            self._check_room()
            if self.plan.evaluation:
                self._find_common_grams()
            self._make_tokenizer(ready)
            sizes = [_piece_bytes(piece) for piece in self.plan.pieces()]
            self._stage("read and tokenize", read_documents, "read", sizes, "bytes")
            decisions = self._once(DECISIONS_FILE, lambda: decide(open_job(self.job)).to_dict())
            if self.plan.options.dedup != "none":
                self._find_duplicates()
            count = sum(decisions["shards"].values())
            # Others do not wait for the last stage: when the first part has seen its end, it removes the folder.
            self._stage("write shards", write_one_shard, "shard", [1] * count, "shards", wait=self.leads)
            if not self.leads:
                return None
            manifest, statistics = finish_corpus(open_job(self.job))
            said = "; ".join(sorted(self.encoders))
            return BuiltCorpus(manifest, statistics, said, self.fresh_text_bytes, self.fresh_tokens)
        except BaseException as error:
            self._give_up(error)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Let the other parts know; leave nothing behind where nothing is worth keeping."""
        if self.share.parts > 1:
            if not self._is_finished():
                self.work.tell_failed(self.share.part, error)
        elif isinstance(error, KeyboardInterrupt) and self.work.any_file("run-*"):
            self.progress.note(f"finished work is kept in {self.work.path}: the same command goes on from there")
        elif isinstance(error, GptdistError | OSError) and not self.work.any_file("run-*"):
            self.team.close()  # a worker that is not done yet would write into what is being removed
            self.work.discard()

    def _check_room(self) -> None:
        needed = 2 * self.plan.text_bytes // _MOST_BYTES_PER_TOKEN
        free = shutil.disk_usage(self.work.path).free
        if free < needed and not self.work.any_file("run-*"):
            raise StorageError(
                f"No room for the corpus in {self.work.path.parent}: {self.plan.text_bytes:,} bytes of text need at "
                f"least {needed:,} bytes, {free:,} are free. Free some, or name another --out."
            )

    def _make_tokenizer(self, ready: CorpusTokenizer | None) -> None:
        """The corpus's tokenizer.json, and how it is to be run."""
        if ready is None and self.work.load(TOKENIZER_STATE) is None:
            self._sample()

        def make() -> dict[str, Any]:
            tokenizer = ready or train_tokenizer(self.plan.options.tokenizer, iter(self._sampled()))
            check_sample(self.spec, tokenizer, some_texts(self.plan))
            write_durably(self.work.corpus / TOKENIZER_FILE, tokenizer.content)
            return {
                "kind": tokenizer.kind,
                "vocab_size": tokenizer.vocab_size,
                "end_of_text": tokenizer.end_of_text,
                "fast": self.fast,
            }

        self._once(TOKENIZER_STATE, make)
        if ready is not None:
            open_job(self.job).tokenizer = ready  # not to be parsed again
        self._once(ANSWERS_FILE, lambda: {"answers": self._answers(ready)})

    def _answers(self, ready: CorpusTokenizer | None) -> dict[str, Any] | None:
        """What workers compare the fast library with: asked once, while they begin to load. None: each asks itself."""
        tokenizer = ready or open_job(self.job).tokenizer
        if not self.fast or tokenizer.kind == "bytes" or find_spec("gigatoken") is None:
            return None
        try:
            return reference_answers(tokenizer, some_texts(self.plan)).to_dict()
        except GptdistError:  # a text that is none: what becomes of it is decided where it is read
            return None

    def _sample(self) -> None:
        """Read what a tokenizer is to be trained on: the first training documents in the corpus's order.

        Of a large corpus only some pieces are read, chosen by key, so that a sample costs the same for any size.
        """
        options, pieces = self.plan.options, self.plan.sample_pieces()
        wanted = min(TOKENIZER_SAMPLE_BYTES, options.max_bytes or TOKENIZER_SAMPLE_BYTES)
        by_key = sorted(
            range(len(pieces)),
            key=lambda index: keyed_hash(options.seed, "sample", _piece_name(pieces[index])),
        )
        chosen, total = [], 0
        for index in by_key:
            if total >= 8 * wanted:
                break
            chosen.append(index)
            total += _piece_bytes(pieces[index])
        limit = min(2 * wanted * HASH_RANGE // max(total, 1), HASH_RANGE)
        self._once("sampling.json", lambda: {"order_limit": limit, "wanted": wanted, "pieces": sorted(chosen)})
        sizes = {index: _piece_bytes(pieces[index]) for index in sorted(chosen)}
        self._stage("sample text for the tokenizer", sample_documents, "sample", sizes, "bytes")

    def _sampled(self) -> list[str]:
        """What `_sample` read: training documents; of a corpus so small that it found none, what there is."""
        sampling = open_job(self.job).load("sampling.json")
        found = [
            tuple(document)
            for index in sampling["pieces"]
            for document in open_job(self.job).load(f"sample-{index:06d}.json")["documents"]
        ]
        texts: list[str] = []
        total = 0
        for _, _, text in sorted([document for document in found if not document[1]] or found):
            total += len(text.encode())
            if total > sampling["wanted"] and texts:
                break
            texts.append(text)
        return texts

    def _find_common_grams(self) -> None:
        """Which word sequences of the evaluation files stand in so many documents that they mean nothing."""
        self._once("evaluation.json", lambda: collect_grams(open_job(self.job)))
        sizes = [_piece_bytes(piece) for piece in self.plan.pieces()[: self.plan.held_out_from]]
        self._stage("look for evaluation text", count_grams, "grams", sizes, "bytes")
        self._once(COMMON_FILE, lambda: find_common(open_job(self.job)))

    def _find_duplicates(self) -> None:
        counts = self._once("partitions.json", lambda: partitions(open_job(self.job)))
        self._stage("find exact duplicates", find_exact_duplicates, "exact", [1] * counts["exact"], "parts")
        if self.plan.options.dedup == "near":
            self._stage("find near duplicates", find_near_duplicates, "near", [1] * counts["near"], "parts")

    def _stage(
        self,
        name: str,
        task: Task,
        prefix: str,
        sizes: Sequence[int] | Mapping[int, int],
        unit: str,
        wait: bool = True,
    ) -> None:
        """Have `task` done for every number in `sizes`, as far as its result is not there: this part's share of it."""
        by_index = dict(sizes) if isinstance(sizes, Mapping) else dict(enumerate(sizes))
        mine = [index for place, index in enumerate(by_index) if place % self.share.parts == self.share.part]
        self.progress.stage(name, sum(by_index[index] for index in mine), unit, self.team.workers)
        todo = []
        for index in mine:
            found = self.work.load(_result_name(prefix, index))
            if found is None:
                todo.append(index)
            else:
                self._advance(by_index[index], found, resumed=True)
        for number, result in self.team.run(task, [(self.job, index) for index in todo]):
            self._advance(by_index[todo[number]], result)
        left = [_result_name(prefix, index) for index in by_index] if wait else []

        def missing() -> list[str]:
            left[:] = [result for result in left if not self.work.has(result)]  # what is there stays
            return left

        self._wait(missing, name)

    def _advance(self, size: int, result: dict[str, Any], resumed: bool = False) -> None:
        statistics = result.get("statistics", {})
        if "encoder" in result:
            self.encoders.add(result["encoder"])
        if not resumed and "tokens" in result:
            self.fresh_text_bytes += statistics["bytes_read"]
            self.fresh_tokens += result["tokens"]
        self.progress.advance(
            size,
            documents=statistics.get("documents_read", 0),
            text_bytes=statistics.get("bytes_read", 0),
            tokens=result.get("tokens", 0),
            dropped={reason: counts[0] for reason, counts in statistics.get("dropped", {}).items()},
            resumed=resumed,
        )

    def _once(self, name: str, make: Callable[[], dict[str, Any]]) -> Any:
        """A result that the first part makes, unless it is there, and the others wait for."""
        if self.leads and not self.work.has(name):
            self.work.save(name, make())
        self._wait(lambda: [] if self.work.has(name) else [name], name)
        return self.work.load(name)

    def _wait(self, missing: Callable[[], list[str]], what: str) -> None:
        def checked() -> list[str]:
            if self._is_finished():
                raise CorpusError(f"{self.work.out_dir} has been finished by the other parts.")
            return missing()

        if self.share.parts > 1:
            self.work.wait_for(checked, what, self.share.patience_seconds)

    def _is_finished(self) -> bool:
        """Whether the first part has finished while this one, which came late, was at it."""
        return not self.leads and _existing(self.work, self.plan) is not None


def _result_name(prefix: str, index: int) -> str:
    return f"{prefix}-{index:06d}.json"


def _piece_name(piece: Piece) -> bytes:
    return f"{piece.files[0].key}@{piece.start}".encode()


def _piece_bytes(piece: Piece) -> int:
    return piece.stop - piece.start if piece.stop else sum(file.bytes for file in piece.files)
