"""The corpora that a run's `data` section names: opened, checked against each other, and put into their order.

Knows the section and the readers; nothing of torch, ranks or steps. The one place that makes readers for a run.
"""

from collections.abc import Mapping
from pathlib import PurePosixPath

from gptdist.config.sections import BlendPart, DataConfig
from gptdist.config.weights import whole_weights
from gptdist.data.blend import BlendOrder, Phase
from gptdist.data.gaps import Gaps
from gptdist.data.local_order import LocalOrder
from gptdist.data.manifest import Manifest
from gptdist.data.order import EpochOrder, WindowOrder
from gptdist.data.reader import TokenReader
from gptdist.data.samples import SampleSource
from gptdist.data.store import Store, StoreSettings, open_store
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import ConfigError, CorpusError
from gptdist.remote import without_secrets


def open_stores(data: DataConfig) -> dict[str, Store]:
    """Where the files of each corpus are, by its name in the config. Close them when the run is done with them."""
    settings = StoreSettings(
        cache_dir=data.cache_dir,
        cache_size=data.cache_size,
        fetch_attempts=data.fetch_attempts,
        max_unreadable_shards=data.max_unreadable_shards,
    )
    return {name: open_store(name, settings) for name in corpus_names(data)}


def open_corpora(data: DataConfig, split: str, stores: Mapping[str, Store] | None = None) -> dict[str, TokenReader]:
    """A reader of `split` of each corpus, by its name in the config; corpora without that split are left out, unless
    it is `train`.

    Raises CorpusError where one cannot be read, has another tokenizer, or is there by two names.
    """
    readers = {}
    for name, store in (stores or open_stores(data)).items():
        if split == "train" or split in Manifest.load(store).splits:
            readers[name] = TokenReader(name, split, data.verify, store)
    _check_alike(readers)
    return readers


def open_tokenizer(readers: Mapping[str, TokenReader]) -> CorpusTokenizer:
    """The tokenizer of corpora that `open_corpora` opened."""
    reader = next(iter(readers.values()))
    return CorpusTokenizer.of_corpus(reader.store, reader.manifest)


def corpus_names(data: DataConfig) -> tuple[str, ...]:
    """Every corpus of the section, as it is named there, in the order of first mention."""
    return BlendOrder(blend_phases(data)).corpora


def blend_phases(data: DataConfig) -> tuple[Phase, ...]:
    """The section's blends with whole weights; one corpus is a blend of one."""
    if data.corpus is not None:
        return (Phase(0, ((data.corpus, 1),)),)
    if data.blend is None:
        raise ConfigError("data.corpus is not set. Set it to a corpus, or data.blend to several.")
    return (_phase(0, data.blend), *(_phase(phase.from_sample, phase.blend) for phase in data.phases))


def build_source(
    data: DataConfig, readers: Mapping[str, TokenReader], sequence_length: int, gaps: Gaps | None = None
) -> SampleSource:
    """The samples of a run over the readers of its training split, but for `gaps`."""
    orders = {name: build_order(data, reader, sequence_length) for name, reader in readers.items()}
    if data.shuffle == "local":
        _check_room(data, readers)
    return SampleSource(readers, orders, BlendOrder(blend_phases(data)), sequence_length, gaps)


def build_order(data: DataConfig, reader: TokenReader, sequence_length: int) -> EpochOrder:
    """The order in which a corpus's windows come."""
    num_windows = reader.num_windows(sequence_length)
    if data.shuffle == "global":
        return WindowOrder(data.seed, num_windows)
    block_windows = max(1, _block_tokens(data, reader) // sequence_length)
    return LocalOrder(data.seed, num_windows, block_windows, data.shuffle_blocks)


def _block_tokens(data: DataConfig, reader: TokenReader) -> int:
    shards = max(1, len(reader.manifest.split(reader.split).shards))
    return data.shuffle_block_tokens or reader.num_tokens // shards


def _check_room(data: DataConfig, readers: Mapping[str, TokenReader]) -> None:
    """Raise StorageError where the cache cannot hold two buffers of each corpus of a phase: the one that is read and
    the one that is fetched meanwhile.
    """
    fetched = {name: reader for name, reader in readers.items() if reader.wants_ahead}
    room = {
        name: reader.room_for(2 * data.shuffle_blocks, _block_tokens(data, reader)) for name, reader in fetched.items()
    }
    for phase in blend_phases(data):
        names = [name for name, weight in phase.weights if weight and name in fetched]
        if names:
            whose = f" of each of {len(names)} corpora" if len(names) > 1 else ""
            what = f"two buffers of the local shuffle{whose} (data.shuffle_blocks, data.shuffle_block_tokens)"
            fetched[names[0]].store.check_room(sum(room[name] for name in names), what)


def short_names(names: tuple[str, ...]) -> dict[str, str]:
    """What to call corpora in names of metrics: the last part of the path where that tells them apart. Of a URL
    nothing is shown that may be a secret.
    """
    shown = {name: without_secrets(name) for name in names}
    last = {name: PurePosixPath(shown[name].removesuffix("?***")).name or shown[name] for name in names}
    for candidates in (last, shown):
        if len(set(candidates.values())) == len(names):
            return candidates
    return {name: f"{shown[name]} {number}" for number, name in enumerate(names, 1)}


def _phase(from_sample: int, blend: tuple[BlendPart, ...]) -> Phase:
    weights = whole_weights([part.weight for part in blend])
    return Phase(from_sample, tuple((part.corpus, weight) for part, weight in zip(blend, weights, strict=True)))


def _check_alike(readers: Mapping[str, TokenReader]) -> None:
    """One tokenizer for all, and no corpus by two names: its samples would be counted twice, and so repeat."""
    first = next(iter(readers), "")
    seen: dict[str, str] = {}
    for name, reader in readers.items():
        own, other = reader.manifest.tokenizer.sha256, readers[first].manifest.tokenizer.sha256
        if own != other:
            raise CorpusError(
                f"{readers[first].corpus} and {reader.corpus} were built with different tokenizers (sha256 "
                f"{other[:12]}... and {own[:12]}...); a run needs one. Build one of them again with --tokenizer and "
                "the other's tokenizer.json."
            )
        index = reader.manifest.split("train").index.sha256
        if index in seen:
            raise CorpusError(
                f"{readers[seen[index]].corpus} and {reader.corpus} are the same corpus, so its text would come twice. "
                "Name it by one of them, with their weights added up."
            )
        seen[index] = name
