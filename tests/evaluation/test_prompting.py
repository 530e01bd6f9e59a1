"""An evaluated model gets the prompt that it was trained on."""

import pytest

from yunque import artifacts
from yunque.evaluation.arguments import HeldOutArguments
from yunque.evaluation.prompting import _template


@pytest.mark.parametrize(
    ("given", "chat", "system_prompt"),
    [
        ({}, True, "Be brief."),
        ({"chat_template": True}, True, "Be brief."),
        ({"system_prompt": "Be kind."}, True, "Be kind."),
        ({"chat_template": False}, False, None),
    ],
)
def test_a_chat_has_the_system_prompt_of_the_training(given, chat, system_prompt, tmp_path):
    config = {"prompt_template": "Sum: {text}", "chat_template": True, "system_prompt": "Be brief."}
    artifacts.save_model_folder(
        tmp_path, lambda staging: None, stage="finetune", parents=(), prompt_template="Sum: {text}", config=config
    )
    found = _template(HeldOutArguments(dataset_name="rows", **given), str(tmp_path))
    assert found == ("Sum: {text}", chat, system_prompt, [])
