"""What a run takes from its surroundings."""

import pytest

from yunque.distributed.arguments import RunArguments


@pytest.mark.parametrize(("restarts", "resume"), [(None, False), ("0", False), ("1", True), ("2", True)])
def test_a_run_that_torchrun_starts_again_resumes_untold(monkeypatch, restarts, resume):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert RunArguments().resume is resume
