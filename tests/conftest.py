import pytest
import torch

import isthmus

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _repeatable():
    """Each test starts from the same seed, and leaves threads and instruction set as it found them."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    isthmus.set_isa(None)


@pytest.fixture(params=isthmus.build_info()["isa_available"])
def isa(request):
    isthmus.set_isa(request.param)
    return request.param


@pytest.fixture(scope="module")
def one_thread():
    """On a machine shared with other jobs, two threads that wait for each other take longer than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rand():
    """Normal float64 leaves, the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    return draw
