"""What a notebook of TRL 0.11 has, run on tiny models, beside the installed TRL on the same rows."""

import datasets
import pytest
import tiny
import torch
import trl
from peft import LoraConfig
from transformers import GPT2ForSequenceClassification

from yunque.compat import trl011
from yunque.errors import InputError

FAST = {"per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "seed": 0}
PLAIN = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no"}
PAIRS = [{"prompt": f"w{5 + n}", "chosen": " w20 w21", "rejected": " w40 w41"} for n in range(8)]
TEXTS = [f"w{5 + n} w20 w21 w22" for n in range(8)]


def rows(of):
    return datasets.Dataset.from_list(of)


def losses(trainer, key="loss"):
    trainer.train()
    return [line[key] for line in trainer.state.log_history if key in line]


def classifier():
    torch.manual_seed(0)
    base = tiny.gpt2().config
    base.num_labels = 1
    return GPT2ForSequenceClassification(base)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_reward_trainer_learns_from_tokenized_padded_pairs(tmp_path, lora):
    pairs = rows(
        [
            {
                "input_ids_chosen": [5 + n, 20, 21, 0],
                "attention_mask_chosen": [1, 1, 1, 0],
                "input_ids_rejected": [5 + n, 40, 41, 42],
                "attention_mask_rejected": [1, 1, 1, 1],
            }
            for n in range(8)
        ]
    )
    peft = {"peft_config": LoraConfig(r=4, task_type="SEQ_CLS")} if lora else {}
    args = trl011.RewardConfig(output_dir=str(tmp_path), max_length=3, save_strategy="no", **FAST)
    trainer = trl011.RewardTrainer(
        model=classifier(), args=args, tokenizer=tiny.tokenizer(), train_dataset=pairs, **peft
    )
    assert trainer.train_dataset[0]["chosen_ids"] == [5, 20, 21]
    assert len(trainer.train_dataset) == 8  # TRL 0.11 kept what exceeds max_length
    found = losses(trainer)
    assert found[-1] < found[0]
    if not lora:
        same = rows([{"chosen_ids": [5 + n, 20, 21], "rejected_ids": [5 + n, 40, 41, 42]} for n in range(8)])
        plain = trl.RewardConfig(str(tmp_path), disable_dropout=False, **FAST, **PLAIN)
        theirs = trl.RewardTrainer(classifier(), plain, train_dataset=same, processing_class=tiny.tokenizer())
        assert found == pytest.approx(losses(theirs), rel=1e-4)


@pytest.mark.parametrize("way", ["field", "batches", "packed rows", "options of the trainer"])
def test_sft_trainer_learns_from_texts(tmp_path, way):
    data = rows([{"dialogue": text, "prompt": "w60", "completion": "w61"} for text in TEXTS])
    config, more = {"max_seq_length": 16}, {}
    if way == "field":
        config["dataset_text_field"] = "dialogue"
    elif way == "batches":
        more["formatting_func"] = lambda batch: [batch["dialogue"][n] for n in range(len(batch["dialogue"]))]
    elif way == "packed rows":
        config["packing"] = True
        more["formatting_func"] = lambda row: row["dialogue"]
    else:
        config, more = {}, {"max_seq_length": 16, "dataset_text_field": "dialogue"}
    args = trl011.SFTConfig(output_dir=str(tmp_path), evaluation_strategy="no", save_strategy="no", **config, **FAST)
    trainer = trl011.SFTTrainer(tiny.llama(), args=args, tokenizer=tiny.tokenizer(), train_dataset=data, **more)
    assert trainer.args.max_length == 16
    found = losses(trainer)
    assert found[-1] < found[0]
    if way != "packed rows":
        plain = trl.SFTConfig(str(tmp_path), max_length=16, **FAST, **PLAIN)
        same = rows([{"text": text} for text in TEXTS])
        theirs = trl.SFTTrainer(tiny.llama(), plain, train_dataset=same, processing_class=tiny.tokenizer())
        assert found == pytest.approx(losses(theirs), rel=1e-4)


def test_dpo_trainer_takes_a_model_without_a_name(tmp_path):
    args = trl011.DPOConfig(str(tmp_path), beta=0.3, max_prompt_length=8, max_length=16, save_strategy="no", **FAST)
    trainer = trl011.DPOTrainer(
        tiny.llama(), ref_model=None, args=args, tokenizer=tiny.tokenizer(), train_dataset=rows(PAIRS)
    )
    margins = losses(trainer, "rewards/margins")
    assert margins[-1] > margins[0]
    plain = trl.DPOConfig(str(tmp_path), beta=0.3, **FAST, **PLAIN)
    theirs = trl.DPOTrainer(
        tiny.llama(), tiny.llama(), plain, train_dataset=rows(PAIRS), processing_class=tiny.tokenizer()
    )
    assert margins == pytest.approx(losses(theirs, "rewards/margins"), rel=1e-3, abs=1e-5)


def test_dpo_cuts_prompts_of_pairs_that_are_too_long(tmp_path):
    long = [{"prompt": " ".join(f"w{n}" for n in range(5, 25)), "chosen": " w30 w31", "rejected": " w40"}]
    args = trl011.DPOConfig(str(tmp_path), max_prompt_length=4, max_length=16, **FAST)
    trainer = trl011.DPOTrainer(tiny.llama(), args=args, tokenizer=tiny.tokenizer(), train_dataset=rows(long))
    assert trainer.train_dataset[0]["prompt_ids"] == [21, 22, 23, 24]
    assert trainer.train_dataset[0]["chosen_ids"] == [30, 31, 1]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_orpo_trainer_learns(tmp_path, family):
    args = trl011.ORPOConfig(
        str(tmp_path), beta=0.1, max_prompt_length=8, max_length=16, max_completion_length=8, save_strategy="no", **FAST
    )
    model, tokenizer = tiny.FAMILIES[family](), tiny.tokenizer(bos_token="w3")
    found = losses(trl011.ORPOTrainer(model, args, tokenizer=tokenizer, train_dataset=rows(PAIRS)))
    assert found[-1] < found[0]


def test_defaults_and_names_are_those_of_trl_0_11():
    args = trl011.SFTConfig("out", warmup_ratio=0.1, model_init_kwargs={"torch_dtype": "float32"})
    assert (args.learning_rate, args.bf16, args.gradient_checkpointing, args.report_to) == (5e-5, False, False, [])
    assert (args.warmup_steps, args.model_init_kwargs) == (0.1, {"dtype": "float32"})
    with pytest.warns(UserWarning, match="without effect: chars_per_token"):
        trl011.SFTConfig("out", chars_per_token=3.0)


def test_what_today_s_trl_lacks_is_refused(tmp_path):
    with pytest.raises(InputError, match="rpo_alpha"):
        trl011.DPOConfig("out", rpo_alpha=1.0)
    with pytest.raises(InputError, match="max_prompt_length: 600"):
        trl011.DPOConfig("out", max_prompt_length=600)
    with pytest.raises(InputError, match=r"recipes/dpo\.py"):
        trl011.DPOTrainer(tiny.t5(), args=trl011.DPOConfig(str(tmp_path)), train_dataset=rows(PAIRS))
