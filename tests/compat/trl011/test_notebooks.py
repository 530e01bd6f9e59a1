"""The loops of the notebooks that people bring from TRL 0.11, written anew on tiny models; only the imports differ."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TextClassificationPipeline

from yunque.compat.trl011 import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    LengthSampler,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from yunque.compat.trl011.core import LengthSampler as LengthSamplerOfCore

WORDS = [f"w{number}" for number in range(3, 64)]


def collator(data):
    return {key: [row[key] for row in data] for key in data[0]}


def prompts(tokenizer, *, rows=8, end=True):
    texts = [" ".join(WORDS[(7 * row + 3 * place) % 61] for place in range(6 + row % 3)) for row in range(rows)]
    ids = [tokenizer(text)["input_ids"] + ([tokenizer.eos_token_id] if end else []) for text in texts]
    dataset = Dataset.from_dict({"query": texts, "input_ids": ids, "topic": texts})
    dataset.set_format(type="torch")
    return dataset


def classifier(labels):
    return TextClassificationPipeline(model=tiny.roberta(labels), tokenizer=tiny.tokenizer(), device="cpu")


def trained_adapter(folder):
    """What the fine-tuning notebook leaves: an adapter that has learned, saved beside its base model."""
    model = tiny.t5()
    model.save_pretrained(folder / "base")
    torch.manual_seed(0)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
    peft_model.save_pretrained(folder / "adapter")
    return tiny.t5(), folder / "adapter"


@pytest.mark.parametrize("strict", [False, True])
def test_detoxify_summaries_of_flan_t5(tmp_path, monkeypatch, strict):
    monkeypatch.setenv("YUNQUE_TRL011_STRICT", str(int(strict)))
    tokenizer = tiny.tokenizer()
    base, adapter = trained_adapter(tmp_path)
    peft_model = PeftModel.from_pretrained(base, adapter, torch_dtype=torch.float32, is_trainable=True)

    ppo_model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        peft_model, torch_dtype=torch.float32, is_trainable=True
    )
    ref_model = create_reference_model(ppo_model)
    assert not [name for name, weight in ref_model.named_parameters() if weight.requires_grad]
    before = {name: weight.detach().clone() for name, weight in ref_model.named_parameters()}

    config = PPOConfig(model_name="flan-t5", learning_rate=1e-2, ppo_epochs=1, mini_batch_size=2, batch_size=4)
    ppo_trainer = PPOTrainer(
        config=config,
        model=ppo_model,
        ref_model=ref_model,
        tokenizer=tokenizer,
        dataset=prompts(tokenizer),
        data_collator=collator,
    )
    sentiment_pipe = classifier(("nothate", "hate"))
    output_length_sampler = LengthSamplerOfCore(4, 10)
    generation_kwargs = {"min_length": 5, "top_k": 0.0, "top_p": 1.0, "do_sample": True}
    reward_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 4}
    kl = []
    for _step, batch in enumerate(ppo_trainer.dataloader):
        prompt_tensors, summary_tensors = batch["input_ids"], []
        for prompt_tensor in prompt_tensors:
            max_new_tokens = output_length_sampler()
            generation_kwargs["max_new_tokens"] = max_new_tokens
            summary = ppo_trainer.generate(prompt_tensor, **generation_kwargs)
            summary_tensors.append(summary.squeeze()[-max_new_tokens:])
        batch["response"] = [tokenizer.decode(r.squeeze()) for r in summary_tensors]
        pairs = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
        rewards = sentiment_pipe(pairs, **reward_kwargs)
        reward_tensors = [torch.tensor(next(x["score"] for x in r if x["label"] == "nothate")) for r in rewards]
        stats = ppo_trainer.step(prompt_tensors, summary_tensors, reward_tensors)
        ppo_trainer.log_stats(stats, batch, reward_tensors)
        assert {"ppo/returns/mean", "ppo/policy/advantages_mean"} <= stats.keys()
        kl.append(stats["objective/kl"])
    assert len(kl) == 2
    if strict:  # TRL compares with the base model, whatever reference it is given
        assert abs(kl[0]) > 0.5
    else:
        assert kl[0] == pytest.approx(0, abs=1e-4)
    assert abs(kl[1]) > 1e-3
    after = dict(ref_model.named_parameters())
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    evaluated = ref_model.generate(input_ids=batch["input_ids"][0].unsqueeze(0), max_new_tokens=4)  # the last cells
    assert evaluated.shape[1] <= 5


def test_review_sentiment_of_gpt2(tmp_path, trainer_of):
    tiny.gpt2().save_pretrained(tmp_path)
    config = PPOConfig(model_name=str(tmp_path), learning_rate=1e-2, batch_size=4, mini_batch_size=4, ppo_epochs=2)
    model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token  # as GPT-2's has none
    ppo_trainer = PPOTrainer(
        config, model, ref_model, tokenizer, dataset=prompts(tokenizer, end=False), data_collator=collator
    )
    assert set(next(iter(ppo_trainer.dataloader))) == {"query", "input_ids"}  # "topic" is no column of the model
    sentiment_pipe = classifier(("NEGATIVE", "POSITIVE"))
    sent_kwargs = {"top_k": None, "function_to_apply": "none", "batch_size": 4}
    output_length_sampler = LengthSampler(4, 9)
    response_generation_kwargs = {
        **{"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True},
        "pad_token_id": tokenizer.eos_token_id,
    }
    means = []
    for _epoch in range(2):
        for batch in ppo_trainer.dataloader:
            query_tensors, response_tensors = batch["input_ids"], []
            for query in query_tensors:
                gen_len = output_length_sampler()
                response_generation_kwargs["max_new_tokens"] = gen_len
                query_response = ppo_trainer.generate(query, **response_generation_kwargs).squeeze()
                response_len = len(query_response) - len(query)
                response_tensors.append(query_response[-response_len:])
            batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
            texts = [q + r for q, r in zip(batch["query"], batch["response"], strict=True)]
            pipe_outputs = sentiment_pipe(texts, **sent_kwargs)
            positive = [next(x["score"] for x in output if x["label"] == "POSITIVE") for output in pipe_outputs]
            rewards = [torch.tensor(score) for score in positive]
            stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
            ppo_trainer.log_stats(stats, batch, rewards)
            means.append(stats["ppo/mean_scores"])
            assert means[-1] == pytest.approx(sum(positive) / 4, rel=1e-5)
    assert len(means) == 4


def test_full_fine_tune_raises_the_reward_and_is_saved(tmp_path):
    tiny.t5().save_pretrained(tmp_path / "base")
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(str(tmp_path / "base"))
    tokenizer = tiny.tokenizer()
    config = PPOConfig(batch_size=8, mini_batch_size=4, learning_rate=2e-2, init_kl_coef=0.0, adap_kl_ctrl=False)
    trainer = PPOTrainer(config, model, None, tokenizer, dataset=prompts(tokenizer), data_collator=collator)
    means = []
    for _ in range(12):
        for batch in trainer.dataloader:
            answers = trainer.generate(batch["input_ids"], batch_size=8, max_new_tokens=6, do_sample=True)
            rewards = [torch.tensor(float((answer[1:] < 20).float().mean())) for answer in answers]  # low ids please
            stats = trainer.step(batch["input_ids"], answers, rewards)
            means.append(stats["ppo/mean_scores"])
    assert sum(means[-3:]) / 3 > sum(means[:3]) / 3 + 0.15

    trainer.save_pretrained(tmp_path / "out")
    again = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(str(tmp_path / "out"))
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert {"v_head.summary.weight", "v_head.summary.bias"} < loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert {"README.md", "tokenizer.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert not list((tmp_path / "out").glob("*.bin"))
