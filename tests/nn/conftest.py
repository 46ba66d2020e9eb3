import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _tiny_problems(one_thread):
    """A second thread would cost more than it brings."""


@pytest.fixture(scope="session")
def digits():
    """512 handwritten digits as rows of 64 values in [0, 1]."""
    datasets = pytest.importorskip("sklearn.datasets")
    return torch.tensor(datasets.load_digits().data[:512], dtype=torch.float32) / 16
