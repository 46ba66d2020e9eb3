import pytest


@pytest.fixture(scope="module", autouse=True)
def _tiny_problems(one_thread):
    """A second thread would cost more than it brings."""
