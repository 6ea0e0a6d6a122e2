"""Where the files of a corpus are: in a folder, or behind a URL and then in a cache that the node's ranks share.

Turns the name of a file into the path of a local file that can be mapped, and fetches ahead what will be needed. Knows
nothing of tokens, splits or windows.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from gptdist.data.cache import Filling, Lease, NodeCache
from gptdist.data.fetch import FetchFailed, Remote
from gptdist.errors import CorpusError, GptdistError, StorageError
from gptdist.remote import StoredFile, is_url, without_secrets

MANIFEST_FILE = "manifest.json"

# Each leased file holds a descriptor; a process often has no more than 1,024.
MAX_LEASES = 128

_POLL_SECONDS = 0.005
_TICK_SECONDS = 0.2


@dataclass(frozen=True)
class StoreSettings:
    """As in the config's `data`, but for the waits, which only tests shorten."""

    cache_dir: Path | str | None = None
    cache_size: int = 32 << 30
    fetch_attempts: int = 6
    max_unreadable_shards: int = 0
    first_wait_seconds: float = 1.0
    room_wait_seconds: float = 60.0


class Store(Protocol):
    """The files of one corpus. Safe for several threads."""

    name: str
    settings: StoreSettings
    wants_ahead: bool

    def shown(self, file: str) -> str:
        """Path or URL of a file, for messages."""

    def read(self, file: str) -> bytes:
        """A small file, whole, as it is now. Raises CorpusError."""

    def path(self, entry: StoredFile, keep: bool = False) -> Path:
        """A local path of the file; fetched and checked first where it is not here. Raises CorpusError, StorageError.

        In a cache it cannot be evicted while `holds` is true; with `keep`, until the store is closed.
        """

    def use(self, entry: StoredFile) -> bool:
        """Say that the file is in use, and ask whether it still cannot be evicted."""

    def holds(self, entry: StoredFile) -> bool:
        """Whether the file cannot be evicted."""

    def refetch(self, entry: StoredFile) -> bool:
        """Forget a local copy that turned out to be damaged; False where it is the only one."""

    def fetch_ahead(self, entries: Sequence[StoredFile]) -> None:
        """Have these files, the first needed first, soon; returns at once. Earlier wishes are forgotten."""

    def check_room(self, needed_bytes: int, what: str) -> None:
        """Raise StorageError where files of `needed_bytes`, in use at once, cannot all be local."""

    def close(self) -> None:
        """Stop fetching."""


def open_store(corpus: Path | str, settings: StoreSettings | None = None) -> Store:
    """The store of a corpus folder or fsspec URL. A plain folder is read in place, any URL through the cache."""
    settings = settings or StoreSettings()
    return CachedStore(str(corpus), settings) if is_url(corpus) else LocalStore(Path(corpus), settings)


class LocalStore:
    """A folder; its files are where they are."""

    wants_ahead = False

    def __init__(self, folder: Path, settings: StoreSettings) -> None:
        self.name = str(folder)
        self.settings = settings
        self._folder = folder

    def shown(self, file: str) -> str:
        return str(self._folder / file)

    def read(self, file: str) -> bytes:
        path = self._folder / file
        try:
            return path.read_bytes()
        except FileNotFoundError:
            if file == MANIFEST_FILE:
                what = "has no manifest.json" if path.parent.is_dir() else "does not exist"
                raise _no_corpus(self.name, what) from None
            raise CorpusError(f"{path} does not exist.") from None
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None

    def path(self, entry: StoredFile, keep: bool = False) -> Path:
        return self._folder / entry.file

    def use(self, entry: StoredFile) -> bool:
        return True

    def holds(self, entry: StoredFile) -> bool:
        return True

    def refetch(self, entry: StoredFile) -> bool:
        return False

    def fetch_ahead(self, entries: Sequence[StoredFile]) -> None:
        pass

    def check_room(self, needed_bytes: int, what: str) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class _Held:
    """A lease, and the last `fetch_ahead` round in which its file was wanted or used."""

    lease: Lease
    round: int


@dataclass
class _Wishes:
    """What to fetch ahead, and what of it could not be had: that is tried again only when it is needed."""

    entries: list[StoredFile] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)


class CachedStore:
    """A URL, through the node's cache. One thread fetches ahead; what another process is fetching it passes over.

    A file is leased from `path` or `fetch_ahead` on, until two more rounds of wishes have neither named nor used it.
    """

    wants_ahead = True

    def __init__(self, url: str, settings: StoreSettings) -> None:
        self.name = without_secrets(url)
        self.settings = settings
        self.fetched_files = 0
        self.fetched_bytes = 0
        self._stopping = threading.Event()
        self._remote = Remote(url, settings.fetch_attempts, settings.first_wait_seconds, self._stopping)
        self._lock = threading.Lock()
        self._cache: NodeCache | None = None
        self._held: dict[str, _Held] = {}  # least recently used first
        self._kept: list[Lease] = []
        self._round = 0
        self._wishes = _Wishes()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def shown(self, file: str) -> str:
        return self._remote.shown(file)

    def read(self, file: str) -> bytes:
        try:
            return self._remote.read(file)
        except FetchFailed as error:
            if file == MANIFEST_FILE and isinstance(error.__cause__, FileNotFoundError):
                raise _no_corpus(self.name, "has no manifest.json") from None
            raise

    def path(self, entry: StoredFile, keep: bool = False) -> Path:
        cache = self._open_cache()
        while True:
            with self._lock:
                held = self._held.get(entry.sha256)
            if held:
                return held.lease.path
            lease = cache.lease(entry.sha256, entry.bytes)
            if lease is None:
                filling = cache.start(entry.sha256)
                if filling is None:  # another process, or the thread of this one, is fetching it
                    self._pause(_POLL_SECONDS, entry)
                    continue
                lease = self._fetch(entry, filling, wait_for_room=True)
            if lease is not None:
                return self._keep(lease) if keep else self._hold(entry, lease)

    def use(self, entry: StoredFile) -> bool:
        with self._lock:
            held = self._held.pop(entry.sha256, None)
            if held:
                held.round = self._round
                self._held[entry.sha256] = held
        return held is not None

    def holds(self, entry: StoredFile) -> bool:
        with self._lock:
            return entry.sha256 in self._held

    def refetch(self, entry: StoredFile) -> bool:
        with self._lock:
            held = self._held.pop(entry.sha256, None)
            if held:
                held.lease.release()
        self._open_cache().discard(entry.sha256)
        return True

    def fetch_ahead(self, entries: Sequence[StoredFile]) -> None:
        self._open_cache()
        wanted = list({entry.sha256: entry for entry in entries}.values())
        with self._lock:
            self._round += 1
            for entry in wanted:
                if entry.sha256 in self._held:
                    self._held[entry.sha256].round = self._round
            for sha256 in [key for key, held in self._held.items() if held.round < self._round - 1]:
                self._held.pop(sha256).lease.release()
            self._wishes = _Wishes(wanted)
        self._wake.set()

    def check_room(self, needed_bytes: int, what: str) -> None:
        if needed_bytes > self.settings.cache_size:
            raise StorageError(
                f"data.cache_size ({self.settings.cache_size:,} bytes) is less than what is needed of {self.name} at "
                f"once: {needed_bytes:,} bytes for {what}. Set data.cache_size to at least {needed_bytes:,}."
            )

    def close(self) -> None:
        self._stopping.set()
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._let_go()
        while self._kept:
            self._kept.pop().release()

    def _open_cache(self) -> NodeCache:
        with self._lock:
            if self._cache is None:
                self._cache = NodeCache(self.settings.cache_dir, self.settings.cache_size)
                self._thread = threading.Thread(
                    target=self._work, args=(self._cache,), name="gptdist-fetch", daemon=True
                )
                self._thread.start()
            return self._cache

    def _hold(self, entry: StoredFile, lease: Lease) -> Path:
        with self._lock:
            if entry.sha256 in self._held:  # the other thread was faster
                lease.release()
            else:
                self._held[entry.sha256] = _Held(lease, self._round)
            while len(self._held) > MAX_LEASES:
                self._held.pop(next(iter(self._held))).lease.release()
        return lease.path

    def _keep(self, lease: Lease) -> Path:
        with self._lock:
            self._kept.append(lease)
        return lease.path

    def _fetch(self, entry: StoredFile, filling: Filling, wait_for_room: bool) -> Lease | None:
        """Fill and name the file. None where there is no room for it and none is waited for."""
        try:
            if not self._reserve(entry, filling, wait_for_room):
                filling.drop()
                return None
            self._remote.download(entry, filling.descriptor)
            lease = filling.commit()
        except BaseException:
            filling.drop()
            raise
        with self._lock:
            self.fetched_files += 1
            self.fetched_bytes += entry.bytes
        return lease

    def _reserve(self, entry: StoredFile, filling: Filling, wait: bool) -> bool:
        cache = self._open_cache()
        self.check_room(entry.bytes, entry.file)
        if cache.reserve(filling, entry.bytes):
            return True
        if not wait:
            return False
        waited = 0.0
        with cache.waiting() as ask:
            while waited < self.settings.room_wait_seconds:
                ask()
                self._let_go()
                if cache.reserve(filling, entry.bytes):
                    return True
                self._pause(_POLL_SECONDS, entry)
                waited += _POLL_SECONDS
        raise StorageError(
            f"No room in the cache {cache.folder} for {self.shown(entry.file)} ({entry.bytes:,} bytes): the "
            f"{cache.used_bytes():,} bytes there are in use by this node's ranks. Increase data.cache_size "
            f"({cache.size:,})."
        )

    def _let_go(self) -> None:
        """Release what can be leased again when it is needed; what is mapped stays mapped."""
        with self._lock:
            while self._held:
                self._held.popitem()[1].lease.release()

    def _make_way(self, cache: NodeCache) -> None:
        """Release what this process holds while room is wanted: not a file that it has just waited for itself."""
        with self._lock:
            while self._held and cache.room_is_wanted():
                self._held.popitem()[1].lease.release()

    def _pause(self, seconds: float, entry: StoredFile) -> None:
        if self._stopping.wait(seconds):
            raise FetchFailed(f"{self.shown(entry.file)}: fetching was stopped.")

    def _work(self, cache: NodeCache) -> None:
        """The thread: fetches one wish after the other, and makes way for whoever waits for room."""
        while not self._stopping.is_set():
            try:
                if cache.room_is_wanted():
                    self._make_way(cache)
                elif self._fetch_a_wish(cache):
                    continue
            except (GptdistError, OSError):
                pass  # the folder is gone or the disk is full: whoever needs a file now will meet it and say so
            self._wake.wait(_TICK_SECONDS)
            self._wake.clear()

    def _fetch_a_wish(self, cache: NodeCache) -> bool:
        """Lease or fetch the first wish that can be had now; False where there is none."""
        with self._lock:
            wishes = self._wishes
            missing = [entry for entry in wishes.entries[:MAX_LEASES] if entry.sha256 not in self._held]
        for entry in missing:
            if entry.sha256 in wishes.failed:
                continue
            lease = cache.lease(entry.sha256, entry.bytes)
            if lease is None:
                filling = cache.start(entry.sha256)
                if filling is None:
                    continue
                try:
                    lease = self._fetch(entry, filling, wait_for_room=False)
                except GptdistError:
                    wishes.failed.add(entry.sha256)
                    raise
                if lease is None:
                    return False  # later ones must not take the room that this one waits for
            self._hold(entry, lease)
            return True
        return False


def _no_corpus(name: str, what: str) -> CorpusError:
    return CorpusError(
        f"{name} is not a corpus: it {what}. Build one with `gptdist data build SOURCE... --out DIR`, or set "
        "data.corpus to one that was built so."
    )
