"""A build as its workers see it: the work folder opened, with what earlier stages left there.

A job is named by its folder and its plan's fingerprint, so that it crosses to any process; what it opens is kept for
the next task of the same job.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_tools.building.arrange import HASH_RANGE
from data_tools.building.plan import Plan, changed_at
from data_tools.building.runs import read_columns
from data_tools.building.work import WorkFolder
from data_tools.sources.documents import Document
from data_tools.sources.formats import read_piece
from data_tools.sources.pieces import Piece
from data_tools.stages.clean import Cleaning
from data_tools.stages.contamination import EvaluationGrams
from data_tools.tokenizing.answers import ReferenceAnswers
from data_tools.tokenizing.encoders import Encoder, choose_encoder
from gptdist.data.manifest import TOKENIZER_FILE
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError

DECISIONS_FILE = "decisions.json"
GRAMS_FILE = "grams.safetensors"
COMMON_FILE = "common.json"
TOKENIZER_STATE = "tokenizer.json"
ANSWERS_FILE = "answers.json"
# Text on which the fast tokenizer must agree with the reference before it is used.
CHECK_SAMPLE_BYTES = 256 << 10
EXACT = "exact duplicate"
NEAR = "near duplicate"


class Job(NamedTuple):
    """What names a build to a worker."""

    out_dir: str
    fingerprint: str


@dataclass(frozen=True)
class Decisions:
    """What was decided over all documents: see `arrange.Choice`; and the number of shards of each split."""

    order_limit: int
    split_bound: int
    shards: dict[str, int]
    over_limit: list[list[int]]  # [source, documents, bytes] that lie beyond the limit

    def shard(self, index: int) -> tuple[str, int, int]:
        """(split, number, count) of the shard that is `index` over all splits."""
        for split, count in self.shards.items():
            if index < count:
                return split, index, count
            index -= count
        raise ValueError(f"there is no shard {index}")

    def to_dict(self) -> dict[str, Any]:
        """JSON."""
        return asdict(self)


class Dropped:
    """Documents that a stage decided against: rows of runs, as far as they lie in a range of the order."""

    def __init__(self, places: np.ndarray) -> None:
        self._places = np.sort(places)  # run << 32 | row

    def rows(self, run: int, first_row: int, count: int) -> np.ndarray:
        """bool [count]: which of these rows of a run are dropped."""
        result = np.zeros(count, dtype=bool)
        first = run << 32 | first_row
        start, stop = np.searchsorted(self._places, [first, first + count])
        result[self._places[start:stop] - first] = True
        return result


class OpenJob:
    """Everything a task needs; each part is read when first asked for."""

    def __init__(self, job: Job) -> None:
        self.work = WorkFolder(Path(job.out_dir))
        raw = self.work.plan()
        if raw["fingerprint"] != job.fingerprint:
            raise CorpusError(f"{self.work.path} belongs to another build now. Start one build of a corpus at a time.")
        self.plan = Plan.from_dict(raw)
        self._changed = raw["changed"]
        self.reading = self.plan.options.reading()
        options = self.plan.options
        self.cleaning = Cleaning(options.normalize, options.min_document_bytes, options.max_document_bytes)

    @cached_property
    def pieces(self) -> list[Piece]:
        return self.plan.pieces()

    def check_unchanged(self, index: int) -> None:
        """Raises CorpusError where a file of piece `index` was written to since the build began."""
        for file in self.pieces[index].files:
            if file.is_local and changed_at(file) != self._changed[file.url]:
                raise CorpusError(
                    f"{file.where} has changed while the corpus was being built. Build again when it is at rest."
                )

    @cached_property
    def tokenizer(self) -> CorpusTokenizer:
        """As the first part made and checked it."""
        state = self.load(TOKENIZER_STATE)
        content = (self.work.corpus / TOKENIZER_FILE).read_bytes()
        return CorpusTokenizer(content, state["kind"], state["vocab_size"], state["end_of_text"])

    @property
    def dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.tokenizer.vocab_size < 1 << 16 else "<u4")

    @cached_property
    def _chosen_encoder(self) -> tuple[Encoder, str]:
        found = self.load(ANSWERS_FILE)["answers"]
        answers = ReferenceAnswers.from_dict(found) if found else None
        texts = [] if answers and answers.are_of(self.tokenizer) else some_texts(self.plan)
        return choose_encoder(self.tokenizer, texts, self.load(TOKENIZER_STATE)["fast"], answers=answers)

    @property
    def encoder(self) -> Encoder:
        """What turns texts into ids: proven in this very process, whose processor and libraries may be its own."""
        return self._chosen_encoder[0]

    @property
    def encoder_said(self) -> str:
        """Which one that is, and why."""
        return self._chosen_encoder[1]

    @cached_property
    def all_grams(self) -> EvaluationGrams:
        """The word sequences of the evaluation files."""
        columns = read_columns(self.work.path / GRAMS_FILE, ["hashes", "sizes", "prefix_filter"])
        return EvaluationGrams(columns["hashes"], columns["sizes"].tolist(), columns["prefix_filter"])

    @cached_property
    def grams(self) -> EvaluationGrams | None:
        """Those of them that mean contamination; None where there are no evaluation files."""
        if not self.plan.evaluation:
            return None
        return self.all_grams.without(np.array(self.load(COMMON_FILE)["rows"], dtype=np.int64))

    @cached_property
    def decisions(self) -> Decisions:
        return Decisions(**self.load(DECISIONS_FILE))

    @cached_property
    def runs(self) -> list[tuple[str, bool]]:
        """(file, whether its documents are held out) of every run, in the order of the pieces."""
        held_out_from = self.plan.held_out_from
        return [
            (run, index >= held_out_from)
            for index in range(len(self.pieces))
            for run in self.load(f"read-{index:06d}.json")["runs"]
        ]

    def drops(self, low: int, high: int) -> dict[str, Dropped]:
        """What was dropped as a duplicate, by reason, among documents of these orders."""
        found: dict[str, Dropped] = {}
        stages = {"none": [], "exact": [(EXACT, "exact")], "near": [(EXACT, "exact"), (NEAR, "near")]}
        for reason, prefix in stages[self.plan.options.dedup]:
            places = self.dropped_places(prefix, low, high)
            if len(places):
                found[reason] = Dropped(places)
        return found

    def dropped_places(self, prefix: str, low: int = 0, high: int = HASH_RANGE) -> np.ndarray:
        """Places (run << 32 | row) that the stage `prefix` dropped, of orders in [low, high): int64."""
        # By name, not by a listing: other nodes' caches of a shared folder show new files in it late.
        names = [f"{prefix}-{index:06d}.safetensors" for index in range(self.load("partitions.json")[prefix])]
        places = [_places(self.work.path / name, low, high) for name in names]
        return np.concatenate([np.zeros(0, dtype=np.int64), *places])

    def load(self, name: str) -> Any:
        """A JSON file that an earlier stage left."""
        found = self.work.load(name)
        if found is None:
            raise CorpusError(f"{self.work.path / name} is missing. Remove {self.work.path} and build again.")
        return found

    def save(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        """Leave a result, and give it back."""
        self.work.save(name, value)
        return json.loads(json.dumps(value))  # as the next build, which reads the file, will see it


def some_texts(plan: Plan) -> list[str]:
    """The beginning of the text, to compare tokenizers on."""
    texts: list[str] = []
    total = 0
    for _, document in read_piece(plan.pieces()[0], plan.options.reading()):
        if isinstance(document, Document):
            texts.append(document.text[: CHECK_SAMPLE_BYTES - total])
            total += len(texts[-1])
        if total >= CHECK_SAMPLE_BYTES:
            break
    return texts


@lru_cache(maxsize=1)
def open_job(job: Job) -> OpenJob:
    """The job, opened once in a process."""
    return OpenJob(job)


def _places(path: Path, low: int, high: int) -> np.ndarray:
    """Rows dropped whose order lies in [low, high), from a file of `duplicate_tasks.py`."""
    columns = read_columns(path, ["order", "place"])
    order = columns["order"]
    first = int(order.searchsorted(np.uint64(low)))
    last = len(order) if high >= HASH_RANGE else int(order.searchsorted(np.uint64(high)))
    return columns["place"][first:last].copy()  # the file is not kept open
