"""Files of a corpus behind a URL. How they are fetched is `gptdist/remote.py`'s; here is what a failure means."""

from gptdist.errors import CorpusError, StorageError
from gptdist.remote import RemoteFolder


class FetchFailed(CorpusError):
    """A file of the corpus could not be had, however often it was tried."""


class Remote(RemoteFolder):
    """A corpus folder behind a URL. Raises FetchFailed, or CorpusError where the URL cannot be opened at all."""

    failed = FetchFailed
    unusable = CorpusError
    what = "a corpus"

    def _disk_error(self, error: OSError) -> StorageError:
        return StorageError(
            f"The cache of the corpus cannot be written: {error.strerror}. Make room on its disk, or set "
            "data.cache_dir to a folder on another one."
        )
