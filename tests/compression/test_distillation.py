"""The distillation loss against formulas, for both families; own answers; the teacher's answers as labels."""

import json

import datasets
import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax
from transformers import TrainingArguments

from yunque.compression.arguments import DistillationArguments, StudentArguments
from yunque.compression.distillation import DistillationTrainer, labelled_row, prompts_of
from yunque.compression.students import make_student
from yunque.compression.teacher_answers import FILE, TeacherAnswers
from yunque.data.targets import IGNORED
from yunque.errors import InputError
from yunque.models.adapter import adapter_for
from yunque.models.policy import disable_dropout

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18]]
ANSWERS = [[20, 21, 1], [22, 1], [23, 24, 25, 1], [26, 1]]
FAMILIES = ("t5", "llama", "gpt2")


@pytest.fixture
def build(tmp_path):
    def build(family, aligned=None, batch=4, steps=1, optim="adamw_torch", learning_rate=3e-3, **options):
        teacher = tiny.FAMILIES[family]()
        tokenizer = tiny.tokenizer(padding_side="left")
        adapter = adapter_for(teacher, tokenizer)
        rows = [labelled_row(adapter, *row) for row in zip(PROMPTS, ANSWERS, strict=True)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=4 // batch,
            max_steps=steps, learning_rate=learning_rate, optim=optim, logging_steps=1, save_strategy="no",
            use_cpu=True, report_to=[],
        )  # fmt: skip
        return DistillationTrainer(
            make_student(StudentArguments(student_num_layers=1), teacher, tokenizer, seed=0),
            teacher,
            arguments,
            losses=DistillationArguments(**options),
            adapter=adapter,
            tokenizer=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows),
            aligned=aligned,
        )

    return build


def one_by_one(model, family):
    """Logits (R, V) that predict each answer's tokens, row by row without padding."""
    found = []
    with torch.no_grad():
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            if family == "t5":
                ids = torch.tensor([[0, *answer[:-1]]])
                found.append(model(input_ids=torch.tensor([prompt]), decoder_input_ids=ids).logits[0])
            else:
                ids = torch.tensor([[*prompt, *answer]])
                found.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1])
    return found


def loss_of(trainer):
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = 1
    return trainer.compute_loss(trainer.model.eval(), trainer._prepare_inputs(batches[0]), num_items_in_batch=count)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_course_s_formula(family, build):
    """Soft targets at T with T^2 plus labels, means over all answer tokens, padding and prompts left out."""
    trainer = build(family, distill_temperature=3.0, soft_weight=0.7, hard_weight=0.3)
    student = torch.cat(one_by_one(trainer.model.eval(), family))
    teacher = torch.cat(one_by_one(trainer.teacher, family))
    labels = torch.tensor([token for answer in ANSWERS for token in answer])
    soft = kl_div(log_softmax(student / 3, -1), softmax(teacher / 3, -1), reduction="batchmean") * 9
    wanted = 0.7 * soft + 0.3 * cross_entropy(student, labels)
    torch.testing.assert_close(loss_of(trainer), wanted)


def test_the_alignment_term_is_the_student_s_kl_from_the_aligned_teacher(build):
    aligned = tiny.llama()
    torch.nn.init.normal_(aligned.lm_head.weight, generator=torch.Generator().manual_seed(3))
    trainer = build("llama", aligned=aligned, soft_weight=0.0, hard_weight=0.0, alignment_weight=1.0)
    student, other = (torch.cat(one_by_one(model.eval(), "llama")) for model in (trainer.model, aligned))
    wanted = kl_div(log_softmax(other, -1), softmax(student, -1), reduction="batchmean")
    torch.testing.assert_close(loss_of(trainer), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_match_where_the_student_is_the_teacher(family, build):
    trainer = build(family, hidden_weight=1.0, soft_weight=0.0, hard_weight=0.0)
    assert loss_of(trainer) > 1e-3
    whole = {path: [0, 1] for path in trainer.origins}
    trainer.origins = whole
    trainer.model.load_state_dict(trainer.model.state_dict())
    trainer.model_wrapped = trainer.model = trainer.teacher
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    assert trainer.compute_loss(trainer.teacher, batches[0], num_items_in_batch=count) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulated_batches_are_one_batch(family, build):
    def weights(batch):
        torch.manual_seed(0)
        trainer = build(family, batch=batch, optim="sgd", learning_rate=0.1, soft_weight=1.0, hard_weight=0.5)
        disable_dropout(trainer.model)
        trainer.train()
        return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])

    torch.testing.assert_close(weights(1), weights(4), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_own_answers_are_the_student_s_samples(family, build):
    trainer = build(family, on_policy_share=1.0, soft_weight=1.0, hard_weight=1.0, max_new_tokens=5)
    batch = next(iter(trainer.get_train_dataloader()))
    sampled = trainer._sampled(trainer.model, batch)
    encoded = family == "t5"
    order = [PROMPTS.index(prompt) for prompt in prompts_of(batch, encoded=encoded)]
    assert sorted(order) == [0, 1, 2, 3]
    assert prompts_of(sampled, encoded=encoded) == [PROMPTS[row] for row in order]
    answers = [row[row != IGNORED].tolist() for row in sampled["labels"]]
    assert all(1 <= len(answer) <= 5 and answer != ANSWERS[row] for answer, row in zip(answers, order, strict=True))
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    assert line["loss/soft"] > 0
    assert "loss/hard" not in line  # nobody labelled them


def test_turns_are_drawn_in_the_stated_share(build):
    trainer = build("llama", on_policy_share=0.3)

    def turns():
        found = []
        for trainer.state.global_step in range(400):
            found.append(trainer._turn_is_the_student_s())
        return sum(found)

    trainer.model.train()
    assert 80 < turns() < 160
    trainer.model.eval()
    assert turns() == 0  # an evaluation is of the reference answers alone


@pytest.mark.parametrize("family", FAMILIES)
def test_training_brings_the_student_to_its_teacher(family, build):
    trainer = build(family, steps=40, soft_weight=1.0, hard_weight=0.0, hidden_weight=0.1, alignment_weight=0.1)
    trainer.args.learning_rate = 3e-3
    trainer.train()
    losses = [line["loss/soft"] for line in trainer.state.log_history if "loss/soft" in line]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_s_answers_become_labels_and_survive_a_kill(family, build, tmp_path):
    trainer = build(family)
    answers = TeacherAnswers(trainer.accelerator, trainer.adapter, tmp_path, batch_size=2, max_new_tokens=4)
    tokenizer = tiny.tokenizer()
    rows = answers.relabel(trainer.train_dataset, trainer.teacher, tokenizer, num_beams=1)
    lines = (tmp_path / FILE).read_text().splitlines()
    labels = [[label for label in row["labels"] if label != IGNORED] for row in rows]
    assert [json.loads(line)["tokens"] for line in sorted(lines, key=lambda line: json.loads(line)["row"])] == labels
    assert labels != ANSWERS
    prompt = torch.tensor([PROMPTS[0]])
    options = {"max_new_tokens": 4, "do_sample": False}
    greedy = trainer.teacher.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0]
    assert labels[0] == greedy[1 if family == "t5" else 4 :].tolist()
    # killed within the third line: the first two are not asked for again
    (tmp_path / FILE).write_text("\n".join([*lines[:2], lines[2][:9]]) + "\n")
    kept = {json.loads(line)["row"] for line in lines[:2]}
    trainer.teacher.generate, asked = None, trainer.teacher.generate
    with pytest.raises(TypeError):
        answers.relabel(trainer.train_dataset, trainer.teacher, tokenizer, num_beams=1)
    trainer.teacher.generate = asked
    again = answers.relabel(trainer.train_dataset, trainer.teacher, tokenizer, num_beams=1)
    assert list(again) == list(rows)
    new = [json.loads(line)["row"] for line in (tmp_path / FILE).read_text().splitlines()[3:]]
    assert set(new) == {0, 1, 2, 3} - kept


def test_states_of_a_changed_configuration_are_refused(tmp_path):
    teacher = tiny.llama()
    tokenizer = tiny.tokenizer()
    student = make_student(
        StudentArguments(student_config_overrides="hidden_size=8,head_dim=4"), teacher, tokenizer, seed=0
    )
    with pytest.raises(InputError, match="hidden_weight: is for students made of the teacher's layers"):
        DistillationTrainer(
            student, teacher, TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
            losses=DistillationArguments(hidden_weight=1.0), adapter=adapter_for(teacher, tokenizer),
            tokenizer=tokenizer, train_dataset=datasets.Dataset.from_list([{"input_ids": [5], "labels": [5]}]),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"soft_weight": 0.0, "hard_weight": 0.0}, "soft_weight: all weights are 0"),
        ({"hard_weight": -1.0}, "hard_weight: -1.0 is not a weight"),
        ({"distill_temperature": 0.0}, "distill_temperature: 0.0 is not positive"),
        ({"on_policy_share": 1.5}, "on_policy_share: 1.5"),
        ({"on_policy_share": 0.5, "soft_weight": 0.0}, "on_policy_share: the student's own answers have no labels"),
        ({"max_new_tokens": 1}, "max_new_tokens: 1 leaves no answer"),
    ],
)
def test_impossible_losses_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DistillationArguments(**options)
