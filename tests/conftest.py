"""One thread, a fixed seed for every test, CUDA tests skipped visibly where there is no device."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda") is not None:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # for the fixtures of modules, too


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def fresh_compiler():
    """torch.compile with nothing left over from another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
