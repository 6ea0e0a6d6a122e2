"""What the distributed tests share: the pool of ranks, started at first use and ended with the session."""

from collections.abc import Iterator

import pytest

from tests.dist.ranks import RankPool


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Rank processes for `pool.run(function, world_size, *args)`."""
    ranks = RankPool()
    yield ranks
    ranks.close()
