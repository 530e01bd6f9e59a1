"""What a run takes from its surroundings."""

import pytest

from yunque.distributed.arguments import RunArguments
from yunque.errors import InputError


@pytest.mark.parametrize(("restarts", "resume"), [(None, False), ("0", False), ("1", True), ("2", True)])
def test_a_run_that_torchrun_starts_again_resumes_untold(monkeypatch, restarts, resume):
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    assert RunArguments().resume is resume


@pytest.mark.parametrize(
    ("name", "words"),
    [("mlflow", "report_to: mlflow is not installed; pip install mlflow"), ("wandd", "no tracker 'wandd'")],
)
def test_a_tracker_that_is_not_there_is_refused_before_any_work(name, words, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(InputError, match=words):
        RunArguments(report_to=[name])
