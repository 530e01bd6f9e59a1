import numpy as np
import pytest
import tiny
import torch
import transformers

from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.rl.config import RewardArguments
from yunque.rl.rewards import ClassifierReward, ClassifierScorer, LabelScore, WeightedReward, label_probabilities

CPU = torch.device("cpu")
TEXTS = ["w3 w9 w14", "w20", "w5 w6 w7 w8 w11 w12", "w22 w4", "w10 w13 w19 w21 w3", "w20", "unknown w7"]
LONGEST = 65
"""Tokens that fit 66 position embeddings: RoBERTa never uses those up to its padding index, here 0."""


def scorer_of(batch_size=3, **options):
    return ClassifierScorer(tiny.roberta(**options), tiny.tokenizer(), batch_size=batch_size, device=CPU)


def logits_alone(scorer, text):
    ids = tiny.tokenizer()(text)["input_ids"]
    with torch.no_grad():
        return scorer.model(input_ids=torch.tensor([ids])).logits[0].numpy()


def words(count):
    return [f"w{3 + index % 60}" for index in range(count)]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_logits_are_those_of_one_text_at_a_time_in_the_order_given(batch_size):
    scorer = scorer_of(batch_size)
    expected = np.stack([logits_alone(scorer, text) for text in TEXTS])
    assert len({row.tobytes() for row in expected}) == len(set(TEXTS))
    np.testing.assert_allclose(scorer.logits(TEXTS), expected, rtol=1e-5, atol=1e-5)
    assert scorer.logits(TEXTS).dtype == np.float32


def test_dropout_of_a_model_in_train_mode_is_off():
    model = tiny.roberta().train()
    scorer = ClassifierScorer(model, tiny.tokenizer(), batch_size=3, device=CPU)
    np.testing.assert_array_equal(scorer.logits(TEXTS), scorer.logits(TEXTS))


def test_a_text_that_is_too_long_keeps_its_end_and_is_counted():
    scorer = scorer_of()
    text = words(80)
    logits = scorer.logits([" ".join(text), TEXTS[0]])
    np.testing.assert_allclose(logits[0], logits_alone(scorer, " ".join(text[-LONGEST:])), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[1], logits_alone(scorer, TEXTS[0]), rtol=1e-5, atol=1e-5)
    assert scorer.truncated_texts == 1
    scorer.logits([" ".join(text)])
    assert scorer.truncated_texts == 2


def test_a_text_that_just_fits_is_read_whole():
    scorer = scorer_of()
    text = " ".join(words(LONGEST))
    np.testing.assert_allclose(scorer.logits([text])[0], logits_alone(scorer, text), rtol=1e-5, atol=1e-5)
    assert scorer.truncated_texts == 0


def test_the_tokenizer_s_limit_holds_where_it_is_lower():
    scorer = ClassifierScorer(tiny.roberta(), tiny.tokenizer(model_max_length=10), batch_size=3, device=CPU)
    text = words(12)
    np.testing.assert_allclose(
        scorer.logits([" ".join(text)])[0], logits_alone(scorer, " ".join(text[-10:])), rtol=1e-5, atol=1e-5
    )


# --- the reward made of them ---


def reward_of(family="t5", labels=("nothate", "hate"), **options):
    adapter = adapter_for(tiny.FAMILIES[family](), tiny.tokenizer())
    return ClassifierReward(scorer_of(labels=labels), adapter, RewardArguments(**options))


@pytest.mark.parametrize("option", ["reward_label", "toxicity_label"])
def test_an_unknown_label_is_refused_with_the_labels_there_are(option):
    with pytest.raises(InputError, match=rf"{option}: .*'kind'.*; it has nothate, hate"):
        reward_of(**{option: "kind"})


def test_labels_are_found_by_name_wherever_they_stand():
    usual, swapped = reward_of(), reward_of(labels=("hate", "nothate"))
    usual_scores, swapped_scores = usual.scores(["w3"], ["w4"]), swapped.scores(["w3"], ["w4"])
    logits = usual.scorer.logits(["w3 w4"])
    assert usual_scores.total == usual_scores.parts["reward_model"] == logits[:, 0]
    assert swapped_scores.total == logits[:, 1]
    assert usual_scores.probabilities + swapped_scores.probabilities == pytest.approx(1.0)


def test_the_reward_is_the_label_s_logit_or_its_probability():
    queries, responses = ["w3 w4", "w5"], ["w6", "w7 w8"]
    logits = reward_of().scorer.logits(["w3 w4 w6", "w5 w7 w8"])
    probabilities = torch.tensor(logits).softmax(-1).numpy()
    np.testing.assert_allclose(reward_of()(queries, responses), logits[:, 0])
    as_probability = reward_of(reward_output="probability")
    np.testing.assert_allclose(as_probability(queries, responses), probabilities[:, 0], rtol=1e-6)
    for reward in (reward_of(), as_probability):  # the toxicity is a probability whatever the reward is
        np.testing.assert_allclose(reward.scores(queries, responses).probabilities, probabilities[:, 1], rtol=1e-6)


def test_the_classifier_reads_query_and_response_or_the_response_alone():
    whole = reward_of().scorer.logits(["w3 w4 w6"])[:, 0]
    alone = reward_of().scorer.logits(["w6"])[:, 0]
    assert abs(whole - alone) > 1e-3
    np.testing.assert_allclose(reward_of()(["w3 w4"], ["w6"]), whole)
    np.testing.assert_allclose(reward_of(reward_text="response")(["w3 w4"], ["w6"]), alone)


def test_a_decoder_only_response_continues_its_query_without_a_space_put_between():
    expected = reward_of().scorer.logits(["w3 w4 w6"])[:, 0]
    np.testing.assert_allclose(reward_of("llama")(["w3 w4"], [" w6"]), expected)


def test_softmax_of_large_logits_does_not_overflow():
    # e^0 and e^-1000 beside it; two equal logits
    np.testing.assert_array_equal(
        label_probabilities(np.array([[1000.0, 0.0], [800.0, 800.0]]), multi_label=False), [[1.0, 0.0], [0.5, 0.5]]
    )


# --- one output, no labels ---


def test_a_reward_model_of_one_output_scores_by_it_and_measures_no_toxicity():
    adapter = adapter_for(tiny.t5(), tiny.tokenizer())
    scorer = scorer_of(labels=("LABEL_0",))
    for output in ("logit", "probability"):  # its probability would be 1 whatever it reads
        reward = ClassifierReward(scorer, adapter, RewardArguments(reward_output=output))
        given = reward.scores(["w3", "w5"], ["w4", "w6"])
        np.testing.assert_allclose(given.total, scorer.logits(["w3 w4", "w5 w6"])[:, 0])
        assert given.total[0] != given.total[1]
        assert given.probabilities is None


# --- several rewards ---


def length_in_words(queries, responses, columns=None):
    return np.array([float(len(response.split())) for response in responses])


def weighted(weights, *, further=None, model=True, watch=None, **options):
    args = RewardArguments(**options)
    return WeightedReward(args, reward_of() if model else None, further or {}, weights, watch)


QUERIES, RESPONSES = ["w3 w4", "w5", "w6"], ["w6", "w7 w8", "w9"]
LENGTHS = [2, 7, 4]


def test_the_total_is_the_weighted_sum_and_the_parts_are_not_weighted():
    alone = reward_of().scores(QUERIES, RESPONSES)
    given = weighted([0.5, -2.0], further={"words": length_in_words}).scores(QUERIES, RESPONSES, LENGTHS)
    assert list(given.parts) == ["reward_model", "words"]
    np.testing.assert_array_equal(given.parts["reward_model"], alone.total)
    np.testing.assert_array_equal(given.parts["words"], [1.0, 2.0, 1.0])
    np.testing.assert_allclose(given.total, 0.5 * alone.total.astype(float) - 2.0 * np.array([1.0, 2.0, 1.0]))
    np.testing.assert_array_equal(given.probabilities, alone.probabilities)
    assert given.watch is None


def test_functions_alone_make_a_reward_without_toxicity():
    reward = weighted([3.0], further={"words": length_in_words}, model=False)
    given = reward.scores(QUERIES, RESPONSES, LENGTHS)
    np.testing.assert_array_equal(given.total, [3.0, 6.0, 3.0])
    assert given.probabilities is None
    assert not reward.measures_label
    assert weighted([1.0]).measures_label


def test_length_is_charged_on_both_sides_of_its_target():
    reward = weighted([1.0], further={"words": length_in_words}, model=False, length_penalty=0.5, length_target=4)
    given = reward.scores(QUERIES, RESPONSES, LENGTHS)
    np.testing.assert_array_equal(given.parts["length_penalty"], [-1.0, -1.5, 0.0])
    np.testing.assert_array_equal(given.total, [0.0, 0.5, 1.0])


def test_the_watch_is_scored_and_never_summed():
    adapter = adapter_for(tiny.t5(), tiny.tokenizer())
    unseen = LabelScore(scorer_of(labels=("hate", "nothate")), adapter, RewardArguments(), label="hate", option="watch")
    plain = weighted([1.0]).scores(QUERIES, RESPONSES, LENGTHS)
    reward = weighted([1.0], watch=unseen)
    given = reward.scores(QUERIES, RESPONSES, LENGTHS)
    np.testing.assert_array_equal(given.total, plain.total)
    np.testing.assert_allclose(given.watch, reward_of().scorer.logits(["w3 w4 w6", "w5 w7 w8", "w6 w9"])[:, 0])


def test_texts_cut_are_counted_over_all_models():
    adapter = adapter_for(tiny.t5(), tiny.tokenizer())
    scores = [LabelScore(scorer_of(), adapter, RewardArguments(), label="hate", option="x") for _ in range(2)]
    reward = weighted([1.0, 1.0, 1.0], further={"other": scores[0], "words": length_in_words}, watch=scores[1])
    reward.scores(["w3"], [" ".join(words(80))], [80])
    assert reward.truncated_texts == 3


# --- the options ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_weights": [1.0]}, "reward_weights: 1 for 0 rewards; .*reward model's first"),
        ({"reward_funcs": ["m:f"], "reward_weights": [1.0, 2.0]}, "reward_weights: 2 for 1 rewards; .* the 1 reward_f"),
        ({"reward_model_name_or_path": "m", "reward_weights": [float("nan")]}, r"reward_weights: \[nan\] are not fini"),
        ({"reward_funcs": ["m:f", "m:g"], "reward_weights": [0.0, 0.0]}, "reward_weights: .* all are 0"),
        ({"length_penalty": -0.1}, "length_penalty: -0.1 is not a number of 0 or more"),
        ({"length_penalty": float("nan")}, "length_penalty: nan"),
        ({"length_penalty": 0.1, "length_target": -1}, "length_target: -1 is negative"),
        ({"length_target": 5}, "length_target: has no effect without length_penalty"),
        ({"watch_label": "hate"}, "watch_label: has no effect without watch_model_name_or_path"),
        ({"use_score_norm": True}, "use_score_norm: has no effect without use_score_scaling"),
        ({"score_clip": 0.0}, "score_clip: 0.0 is not positive"),
    ],
)
def test_options_that_cannot_mean_anything_are_refused_by_name(options, message):
    with pytest.raises(InputError, match=message):
        RewardArguments(**options)


def test_weights_are_one_each_unless_given():
    assert RewardArguments(reward_model_name_or_path="m", reward_funcs=["m:f", "n"]).weights == [1.0, 1.0, 1.0]
    assert RewardArguments(reward_funcs=["m:f", "n"], reward_weights=[0.0, 2.0]).weights == [0.0, 2.0]


@pytest.mark.parametrize(
    "kind", ["Roberta", "Camembert", "XLMRobertaXL", "RobertaPreLayerNorm", "MPNet", "Longformer", "Bert"]
)
@pytest.mark.parametrize("padded", [True, False])
def test_long_texts_are_cut_to_the_position_table_with_and_without_a_padding_token(kind, padded):
    config = getattr(transformers, f"{kind}Config")(
        **{"vocab_size": tiny.VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        **{"intermediate_size": 32, "max_position_embeddings": 24, "pad_token_id": 0, "num_labels": 2},
    )
    model, tokenizer = transformers.AutoModelForSequenceClassification.from_config(config), tiny.tokenizer()
    if not padded:
        model.config.pad_token_id = tokenizer.pad_token = None
    scorer = ClassifierScorer(model, tokenizer, batch_size=4, device=CPU)
    texts = ["w3", "w4 " * 100, "w5 w6"]
    together = scorer.logits(texts)
    assert scorer.truncated_texts == 1
    for text, logits in zip(texts, together, strict=True):
        np.testing.assert_allclose(scorer.logits([text])[0], logits, rtol=1e-4, atol=1e-5)


def test_labels_that_do_not_exclude_each_other_have_probabilities_of_their_own():
    scorer = scorer_of(problem_type="multi_label_classification")
    logits = np.array([[4.0, 4.0]], dtype=np.float32)
    np.testing.assert_allclose(scorer.probabilities(logits), 1 / (1 + np.exp(-logits)), rtol=1e-6)
    np.testing.assert_allclose(scorer_of().probabilities(logits), [[0.5, 0.5]])
