"""Students made of a teacher's layers, of its configuration, of a model of its own."""

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Qwen2Config, Qwen2ForCausalLM

from yunque.compression.arguments import StudentArguments
from yunque.compression.students import keep_layers, make_student, spread
from yunque.errors import InputError

DEEP = {
    "t5": {"num_layers": 4, "num_decoder_layers": 3},
    "bart": {"encoder_layers": 4, "decoder_layers": 3},
    "gpt2": {"n_layer": 4},
    "llama": {"num_hidden_layers": 4},
}
IDS = torch.tensor([[5, 6, 7, 1], [9, 10, 1, 0]])


def teacher(family):
    return tiny.FAMILIES[family](**DEEP[family])


def logits(model):
    encoded = model.config.is_encoder_decoder
    inputs = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
    with torch.no_grad():
        return model.eval()(**inputs, **({"decoder_input_ids": IDS} if encoded else {})).logits


def make(model, **options):
    return make_student(StudentArguments(**options), model, tiny.tokenizer(), seed=0)


def test_layers_are_spread_evenly():
    assert spread(12, 6) == [0, 2, 4, 7, 9, 11]
    assert spread(8, 2) == [0, 7]
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(4, 1) == [0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_all_layers_kept_is_the_teacher(family):
    model = teacher(family)
    student = make(model, student_layers=list(range(4)))
    assert torch.equal(logits(student.model), logits(model))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_reloads_and_generates_as_it_was(family, tmp_path):
    model = teacher(family)
    student = make(model, student_num_layers=2).model
    assert sum(p.numel() for p in student.parameters()) < sum(p.numel() for p in model.parameters())
    student.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if student.config.is_encoder_decoder else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": (IDS != 0).long()}
    assert torch.equal(again.generate(IDS, **options), student.eval().generate(IDS, **options))
    assert torch.equal(again.generate(IDS, **options, use_cache=False), again.generate(IDS, **options))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_dropping_layers_is_skipping_them(family):
    """The student computes what the teacher does when its other layers add nothing to the residual stream."""
    model = teacher(family)
    decoder = {"student_decoder_layers": [0, 1]} if family == "t5" else {}
    student = make(model, student_layers=[0, 2], **decoder).model
    dropped = [model.encoder.block[1], model.encoder.block[3], model.decoder.block[2]] if family == "t5" else []
    for layer in dropped or [model.model.layers[1], model.model.layers[3]]:
        for name, weight in layer.named_parameters():
            if name.endswith(("Attention.o.weight", "wo.weight", "o_proj.weight", "down_proj.weight")):
                torch.nn.init.zeros_(weight)
    torch.testing.assert_close(logits(student), logits(model))


def test_the_position_bias_moves_to_the_new_first_layer():
    model = teacher("t5")
    student = keep_layers(model, {"encoder.block": [1, 3], "decoder.block": [2]})
    bias = student.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.equal(bias, model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    assert bias is not model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert (student.config.num_layers, student.config.num_decoder_layers) == (2, 1)
    logits(student)


def test_attention_types_of_layers_stay_theirs():
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen2Config(
        vocab_size=64, **(tiny.SMALL | {"num_hidden_layers": 4}), layer_types=types, sliding_window=2,
        use_sliding_window=True, num_key_value_heads=1,
    )  # fmt: skip
    student = make(Qwen2ForCausalLM(config), student_layers=[0, 3]).model
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    logits(student)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_changed_configuration_has_random_weights(family):
    narrow = {"t5": "d_ff=16", "bart": "decoder_layers=1", "gpt2": "n_inner=8", "llama": "intermediate_size=16"}[family]
    model = teacher(family)
    first, second = (make(model, student_config_overrides=narrow).model for _ in range(2))
    assert torch.equal(logits(first), logits(second))
    assert not torch.allclose(logits(first), logits(model))
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (first, model)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("t5", {"student_layers": [0, 4]}, "student_layers: the teacher's encoder.block has layers 0 to 3 only"),
        ("t5", {"student_layers": [0]}, "transformers' T5 cannot generate so"),
        ("llama", {"student_decoder_layers": [0]}, "student_decoder_layers: llama has one stack"),
        ("llama", {"student_num_layers": 5}, "student_num_layers: 5 is more than the 4"),
        ("llama", {"student_config_overrides": "num_layer=1"}, "student_config_overrides: unknown name num_layer"),
        ("llama", {"student_config_overrides": "vocab_size=9"}, "student_config_overrides: vocab_size follows"),
    ],
)
def test_impossible_students_are_refused(family, options, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        make(teacher(family), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"student_num_layers": 2, "student_layers": [0]}, "student_layers: student_num_layers says already"),
        ({"student_num_layers": 0}, "student_num_layers: 0 is too small"),
        ({"student_layers": [0, 0]}, "each of them once"),
    ],
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        StudentArguments(**options)


def test_a_model_of_another_vocabulary_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path)
    tiny.tokenizer(("hello",)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="vocabulary"):
        make(teacher("llama"), student_name_or_path=str(tmp_path))
