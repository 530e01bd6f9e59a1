"""What tests of several rooms share."""

import pytest
import warm

pytest_plugins = ["runs"]


def pytest_configure():
    """All workers of a session start their processes from the same servers."""
    warm.prepare()


def pytest_unconfigure():
    warm.end()


@pytest.fixture(scope="session")
def embedded():
    """The embedded default of this machine's cache, built when missing (about a minute)."""
    from yunque.models.embedded import ensure_embedded

    return ensure_embedded()
