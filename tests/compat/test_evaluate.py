import pytest
import tiny
from rouge_score.rouge_scorer import RougeScorer
from transformers import pipeline

from yunque.compat import evaluate
from yunque.errors import InputError

TEXTS = ["w5 w6", "w7", "w8 w9 w10"]


@pytest.fixture
def folder(tmp_path):
    tiny.roberta(labels=("nothate", "hate")).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return str(tmp_path)


def test_toxicity_is_the_pipeline_s_probability_of_the_label(folder):
    pipe = pipeline("text-classification", folder, top_k=None)
    expected = [{entry["label"]: entry["score"] for entry in output}["hate"] for output in pipe(TEXTS)]
    toxicity = evaluate.load("toxicity", folder, module_type="measurement", toxic_label="hate")
    scores = toxicity.compute(predictions=TEXTS)
    assert scores == {"toxicity": pytest.approx(expected, rel=1e-4)}
    assert toxicity.compute(predictions=TEXTS, aggregation="maximum") == {"max_toxicity": max(scores["toxicity"])}
    limit = sorted(scores["toxicity"])[1]
    ratio = toxicity.compute(predictions=TEXTS, aggregation="ratio", threshold=limit)
    assert ratio == {"toxicity_ratio": pytest.approx(2 / 3)}
    other = toxicity.compute(predictions=TEXTS, toxic_label="nothate")["toxicity"]
    assert [one + two for one, two in zip(other, scores["toxicity"], strict=True)] == pytest.approx([1.0] * 3)
    with pytest.raises(InputError, match="neutral"):
        toxicity.compute(predictions=TEXTS, toxic_label="neutral")


def test_label_scores_go_by_name_not_by_position(folder):
    outputs = [
        [{"label": "nothate", "score": 2.0}, {"label": "hate", "score": -2.0}],
        [{"label": "hate", "score": 3.0}, {"label": "nothate", "score": -3.0}],
    ]
    assert [float(score) for score in evaluate.label_scores(outputs, "nothate")] == [2.0, -3.0]
    with pytest.raises(InputError, match="top_k=None"):
        evaluate.label_scores([[{"label": "hate", "score": 3.0}]], "nothate")


def test_rouge_is_rouge_score_s():
    predictions, references = ["the cats sat", "a b"], ["the cat sat down", ["x", "a c"]]
    rouge = evaluate.load("rouge")
    found = rouge.compute(predictions=predictions, references=references, use_stemmer=True, use_aggregator=False)
    assert list(found) == ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    scorer = RougeScorer(list(found), use_stemmer=True)
    for name, values in found.items():
        first = scorer.score(references[0], predictions[0])[name].fmeasure
        second = scorer.score_multi(references[1], predictions[1])[name].fmeasure
        assert values == [first, second]
    assert rouge.compute(predictions=["a b"], references=["a b"])["rougeLsum"] == pytest.approx(1.0)
    own = rouge.compute(predictions=["año"], references=["año"], rouge_types=["rouge1"], tokenizer=str.split)
    assert own == {"rouge1": pytest.approx(1.0)}
    with pytest.raises(InputError, match="neither"):
        evaluate.load("bleu")
