import pytest
import torch


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """The problems here are tiny: on a busy machine a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits():
    """512 handwritten digits as rows of 64 values in [0, 1]."""
    datasets = pytest.importorskip("sklearn.datasets")
    return torch.tensor(datasets.load_digits().data[:512], dtype=torch.float32) / 16
