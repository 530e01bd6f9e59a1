"""What tests of several rooms share."""

import pytest
import warm

pytest_plugins = ["runs", "pipelines", "golden"]


def pytest_configure():
    """All workers of a session start their processes from the same servers."""
    warm.prepare()


def pytest_unconfigure():
    warm.end()


def pytest_collection_modifyitems(items):
    """Files that start processes go first: a long one at the end would leave the other workers idle."""
    long = {item.path for item in items if item.get_closest_marker("distributed") or item.path.parent.name == "recipes"}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def embedded():
    """The embedded default of this machine's cache, built when missing (about a minute)."""
    from yunque.models.embedded import ensure_embedded

    return ensure_embedded()
