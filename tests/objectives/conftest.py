import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The problems here are tiny: on a busy machine a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
