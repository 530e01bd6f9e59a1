import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from yunque.errors import InputError
from yunque.models.arguments import ModelArguments
from yunque.models.loading import load_model, load_tokenizer, save_model
from yunque.models.scratch import ScratchArguments, new_model, parse_overrides, train_tokenizer

TEXTS = [f"#Person{n % 2 + 1}#: word{n} is what we call thing number {n}.\n#Person2#: ¿Qué? ñandú!" for n in range(50)]
T5_SIZES = "d_model=32,d_kv=16,d_ff=48,num_heads=2,num_layers=2"
ROBERTA_SIZES = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=48"


def scratch(overrides=T5_SIZES):
    return ScratchArguments(from_scratch=True, config_overrides=overrides)


@pytest.fixture(scope="module")
def t5_tokenizer():
    return train_tokenizer(TEXTS, "t5", 400)


@pytest.fixture(scope="module")
def roberta_tokenizer():
    return train_tokenizer(TEXTS, "roberta", 400, max_length_tokens=64)


def test_any_text_survives_the_tokenizer(t5_tokenizer):
    for text in (TEXTS[0], "Emoji 😀, tabs\tand  two spaces", "漢字 and 'quotes'"):
        ids = t5_tokenizer(text)["input_ids"]
        assert ids[-1] == t5_tokenizer.eos_token_id
        assert t5_tokenizer.unk_token_id not in ids
        assert t5_tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_tag_is_one_token(t5_tokenizer):
    assert t5_tokenizer.tokenize("#Person1#: word")[0] == "#Person1#"


def test_a_spaced_word_is_the_same_token_wherever_it_stands():
    tokenizer = train_tokenizer(TEXTS, "t5", 400, spaced=True)
    first, after_a_line, within = (tokenizer.tokenize(text) for text in ("thing", "a\nthing", "a  thing"))
    assert first == after_a_line[-len(first) :] == within[-len(first) :]
    ids = tokenizer("#Person1#: one\ntwo")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "#Person1#: one two"


def test_t5_pads_with_the_token_its_decoder_starts_from(t5_tokenizer):
    model = new_model(scratch(), "t5", t5_tokenizer, seed=0)
    assert t5_tokenizer.pad_token_id == model.config.decoder_start_token_id == model.config.pad_token_id
    assert model.config.eos_token_id == t5_tokenizer.eos_token_id


def test_roberta_reads_texts_and_pairs_as_it_was_made_to(roberta_tokenizer):
    begin, end = roberta_tokenizer.bos_token_id, roberta_tokenizer.eos_token_id
    single, pair = roberta_tokenizer("word1")["input_ids"], roberta_tokenizer("word1", "thing")["input_ids"]
    assert (single[0], single[-1], single.count(begin)) == (begin, end, 1)
    assert (pair[0], pair.count(end), pair.count(begin)) == (begin, 3, 1)


def test_the_same_seed_gives_the_same_tokenizer_and_weights(t5_tokenizer):
    again = train_tokenizer(TEXTS, "t5", 400)
    assert again.backend_tokenizer.to_str() == t5_tokenizer.backend_tokenizer.to_str()
    first, second, other = (new_model(scratch(), "t5", t5_tokenizer, seed=seed) for seed in (3, 3, 4))
    same = [torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(first.shared.weight, other.shared.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_building_leaves_the_callers_random_numbers_alone(t5_tokenizer):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    new_model(scratch(), "t5", t5_tokenizer, seed=5)
    assert torch.equal(torch.rand(3), expected)


def test_t5_is_built_like_flan_t5(t5_tokenizer):
    model = new_model(scratch(), "t5", t5_tokenizer, seed=0)
    assert model.config.is_gated_act
    assert not model.config.scale_decoder_outputs
    assert not model.config.tie_word_embeddings
    assert model.lm_head.weight is not model.shared.weight
    assert model.encoder.embed_tokens.weight is model.shared.weight is model.decoder.embed_tokens.weight
    assert model.config.num_decoder_layers == 2


def test_t5_starts_from_the_loss_of_guessing(t5_tokenizer):
    model = new_model(scratch(), "t5", t5_tokenizer, seed=0).eval()
    ids = torch.tensor([t5_tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    # logits of variance 1 add 1/2 to log(vocabulary); the margin is for one short text
    assert loss == pytest.approx(torch.tensor(len(t5_tokenizer)).log().item() + 0.5, abs=0.7)


def test_t5_comes_back_from_its_folder_with_the_same_logits(t5_tokenizer, tmp_path):
    model = new_model(scratch(), "t5", t5_tokenizer, seed=0).eval()
    save_model(model, t5_tokenizer, tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path))
    tokenizer = load_tokenizer(args)
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    assert ids.tolist() == [t5_tokenizer(TEXTS[0])["input_ids"]]
    with torch.no_grad():
        logits, expected = (m.eval()(input_ids=ids, labels=ids).logits for m in (load_model(args, tokenizer), model))
    assert torch.equal(logits, expected)


def test_roberta_classifies_with_the_given_labels_and_comes_back_the_same(roberta_tokenizer, tmp_path):
    model = new_model(scratch(ROBERTA_SIZES), "roberta", roberta_tokenizer, seed=0, label_names=["fine", "rude"]).eval()
    save_model(model, roberta_tokenizer, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.config.id2label == {0: "fine", 1: "rude"}
    assert json.loads((tmp_path / "config.json").read_text())["label2id"] == {"fine": 0, "rude": 1}
    assert tokenizer.model_max_length == 64
    batch = tokenizer([TEXTS[0] * 10, "word1"], truncation=True, padding=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, 64)  # the longest text the model has positions for
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("d_model", "'d_model' is not of the form name=value"),
        ("d_modl=8", "unknown name d_modl; did you mean d_model?"),
        ("d_model=wide", "d_model=wide is not int, as 512 is"),
        ("vocab_size=10", "vocab_size follows from the tokenizer"),
        ("is_gated_act=maybe", "unknown name is_gated_act"),
        ("use_cache=maybe", "use_cache=maybe is not true or false"),
        ("num_layers=2,num_decoder_layers=3", "num_decoder_layers=3 is more than num_layers=2"),
    ],
)
def test_bad_overrides_are_named(overrides, message, t5_tokenizer):
    with pytest.raises(InputError, match="config_overrides: ") as error:
        new_model(scratch(overrides), "t5", t5_tokenizer, seed=0)
    assert message in str(error.value)


def test_heads_that_do_not_divide_the_width_are_named(roberta_tokenizer):
    with pytest.raises(InputError, match="hidden_size=32 is not a multiple of num_attention_heads=3"):
        new_model(scratch("hidden_size=32,num_attention_heads=3"), "roberta", roberta_tokenizer, seed=0)


def test_overrides_take_the_type_of_the_default():
    known = {"width": 1, "rate": 0.1, "cache": True, "act": "gelu"}
    assert parse_overrides("width=2, rate=0.5,cache=false,act=relu", known) == {
        "width": 2, "rate": 0.5, "cache": False, "act": "relu"
    }  # fmt: skip
    assert parse_overrides(None, known) == {}


@pytest.mark.parametrize("options", [{"vocab_size": 200}, {"model_type": "t5"}, {"config_overrides": "d_model=8"}])
def test_arguments_that_make_no_sense_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ScratchArguments(**options)
