"""Rewards by position and by label from transformers' own pipeline."""

import warnings

import pytest
import tiny
import torch
from transformers import pipeline

from yunque.compat.evaluate import label_scores
from yunque.compat.trl011 import pipeline_rewards
from yunque.compat.trl011.pipeline_rewards import warn_of_positions, watch_pipelines

TEXTS = [f"w{5 + n} w{10 + 3 * n} w{n + 20}" for n in range(12)]


@pytest.fixture
def outputs():
    pipeline_rewards._recent.clear()
    watch_pipelines()
    torch.manual_seed(1)
    model = tiny.roberta()
    ids = tiny.tokenizer()(TEXTS, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model.classifier.out_proj.bias -= model.eval()(ids).logits.median(dim=0).values  # each label wins some texts
    pipe = pipeline("text-classification", model=model.eval(), tokenizer=tiny.tokenizer())
    return lambda **options: pipe(TEXTS, top_k=None, function_to_apply="none", **options)


def test_scores_by_position_are_noticed_and_scores_by_label_are_not(outputs):
    found = outputs(batch_size=4)
    assert len({row[0]["label"] for row in found}) > 1  # else a position is a label
    with pytest.warns(UserWarning, match="taken by position 0 from a pipeline that sorts labels by score"):
        assert warn_of_positions([row[0]["score"] for row in found])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_of_positions([row[0]["score"] for row in found])  # whose outputs are forgotten
        found = outputs()
        assert not warn_of_positions([float(score) for score in label_scores(found, found[0][0]["label"])])
        found = outputs()
        assert not warn_of_positions([2 * row[0]["score"] + 0.1 for row in found])
