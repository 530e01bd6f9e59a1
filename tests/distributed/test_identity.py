"""Which runs are the same: options, files, length."""

from pathlib import Path

import pytest

from yunque.distributed.identity import check_same_run, check_steps, run_identity
from yunque.errors import InputError

CHECKPOINT = Path("out/checkpoints/step-000006")
CONFIG = {"beta": 0.1, "max_steps": 6, "lr_scheduler_type": "linear", "warmup_steps": 0, "save_steps": 2}


@pytest.mark.parametrize("changed", [{"beta": 0.9}, {"loss_type": "hinge"}, {"max_steps": 12}, {"num_train_epochs": 2}])
def test_another_option_is_refused_by_name(changed):
    with pytest.raises(InputError, match=f"{next(iter(changed))}: the checkpoint in {CHECKPOINT} was made with"):
        check_same_run(run_identity(CONFIG | changed), run_identity(CONFIG), CHECKPOINT)


def test_what_changes_no_curve_may_change():
    check_same_run(run_identity(CONFIG | {"save_steps": 5, "report_to": ["wandb"]}), run_identity(CONFIG), CHECKPOINT)


@pytest.mark.parametrize(
    ("schedule", "warmup", "is_fine"),
    [
        ("constant", 0, True),
        ("constant_with_warmup", 5, True),
        ("constant_with_warmup", 0.5, False),
        ("cosine", 0, False),
    ],
)
def test_a_run_goes_on_longer_where_its_schedule_stays_the_same(schedule, warmup, is_fine):
    config = CONFIG | {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    before, now = run_identity(config), run_identity(config | {"max_steps": 12})
    if is_fine:
        check_same_run(now, before, CHECKPOINT)
    else:
        with pytest.raises(InputError, match=f"max_steps: .*{schedule}"):
            check_same_run(now, before, CHECKPOINT)


@pytest.mark.parametrize("kind", ["file", "folder", "manifest"])
def test_files_of_other_content_are_another_run(kind, tmp_path):
    path = tmp_path / "input"
    file = path if kind == "file" else path / ("yunque.json" if kind == "manifest" else "deep/rows.csv")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("one")
    config = CONFIG | {"dataset_name": str(path)}
    before = run_identity(config)
    check_same_run(run_identity(config), before, CHECKPOINT)
    file.write_text("two")
    with pytest.raises(InputError, match=r"dataset_name \(content of "):
        check_same_run(run_identity(config), before, CHECKPOINT)


def test_a_run_cannot_end_before_its_checkpoint():
    check_steps(6, 6, CHECKPOINT)
    with pytest.raises(InputError, match=r"max_steps: .* is of step 6, beyond the 5 steps"):
        check_steps(6, 5, CHECKPOINT)
