"""What tests of several rooms share."""

import pytest

pytest_plugins = ["runs", "pipelines"]


@pytest.fixture(scope="session")
def embedded():
    """The embedded default of this machine's cache, built when missing (about a minute)."""
    from yunque.models.embedded import ensure_embedded

    return ensure_embedded()
