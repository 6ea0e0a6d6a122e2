"""Every test here needs a GPU, or as many as its `gpu(count)` mark says; without them it is skipped with the reason."""

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is in this folder, so that `-m gpu` finds it."""
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]) and item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.gpu(1))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip where there are too few GPUs."""
    mark = item.get_closest_marker("gpu")
    needed = mark.args[0] if mark and mark.args else 1
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU (torch.cuda.is_available() is False)")
    if torch.cuda.device_count() < needed:
        pytest.skip(f"needs {needed} GPUs, torch sees {torch.cuda.device_count()}")
