"""One PPO run of TRL 1.12.0, for ppo_vs_trl.py: `python trl_ppo.py settings.json`.

At its best for a CPU: weights in bfloat16, no gradient checkpointing, micro-batches of 4, the whole
rollout at once. Policy and value model train through LoRA on all linear layers. The reference is
the policy without its adapter. Writes metrics.jsonl with the seconds of each phase, and the
policy's adapter.
"""

import json
import sys
import time
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    set_seed,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

CPU = {  # what ppo_vs_trl.py compares; a settings file may say otherwise
    "in_4bit": False,
    "use_cpu": True,
    "episodes": 16,
    "num_mini_batches": 1,
    "num_ppo_epochs": 4,
    "rollout_rows": 16,
    "response_length": 48,
    "temperature": 0.7,
}


def main(s: dict) -> None:
    assert trl.__version__ == "1.12.0", f"this is TRL {trl.__version__}"
    out = Path(s["output_dir"])
    out.mkdir(parents=True, exist_ok=True)
    s = CPU | s
    tokenizer = AutoTokenizer.from_pretrained(s.get("tokenizer", s["policy"]), padding_side="left")
    set_seed(s["seed"])
    options = {"dtype": torch.bfloat16} | (nf4() if s["in_4bit"] else {})
    policy = AutoModelForCausalLM.from_pretrained(s["policy"], **options)
    policy = get_peft_model(policy, lora("CAUSAL_LM"))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(s["reward"], num_labels=1, **options)
        for _ in range(2)
    )
    for model in (reward, value):
        model.config.pad_token_id = tokenizer.pad_token_id
    if s["value"] == "lora":
        value = get_peft_model(value, lora("SEQ_CLS"))
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for p in policy.parameters() if p.requires_grad],
                "lr": s["learning_rate"],
            },
            {
                "params": [p for p in value.parameters() if p.requires_grad],
                "lr": s["value_learning_rate"],
            },
        ],
        eps=1e-5,
        weight_decay=0.0,
    )
    updates = s["updates"]
    prompts = Dataset.from_dict({"input_ids": json.loads(Path(s["prompts"]).read_text())})
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(out / "trainer"),
            total_episodes=s["episodes"] * updates,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=s["episodes"] // 4,
            num_mini_batches=s["num_mini_batches"],
            num_ppo_epochs=s["num_ppo_epochs"],
            local_rollout_forward_batch_size=s["rollout_rows"],
            response_length=s["response_length"],
            temperature=s["temperature"],
            kl_coef=0.05,
            stop_token="eos",
            missing_eos_penalty=1.0,
            seed=s["seed"],
            bf16=False,  # the weights are bfloat16 already; autocast on top of it was slower
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            use_cpu=s["use_cpu"],
        ),
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=reward.requires_grad_(False),
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(8)),  # asked for, never used
        optimizers=(
            optimizer,
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / updates),
        ),
    )
    take_times(trainer, out / "metrics.jsonl")
    trainer.train()
    trainer.model.policy.save_pretrained(out)


def nf4() -> dict:
    quantised = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    quantised |= {
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": ["lm_head", "score"],
    }
    return {"quantization_config": BitsAndBytesConfig(**quantised), "device_map": {"": 0}}


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


def take_times(trainer: PPOTrainer, path: Path) -> None:
    """Note when generation starts and ends, when scoring ends, and when an update ends."""
    clock: list[float] = []

    def after(function, before: bool = False):
        def timed(*args, **kwargs):
            if before:
                clock.append(now())
            result = function(*args, **kwargs)
            clock.append(now())
            return result

        return timed

    def log(metrics: dict, *_, **__) -> None:
        clock.append(now())
        times = {
            f"time/{name}": clock[i + 1] - clock[i]
            for i, name in enumerate(("rollout", "measure", "optimise"))
        }
        clock.clear()
        if torch.cuda.is_available():
            times["memory/allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with path.open("a") as file:
            file.write(
                json.dumps({name: float(value) for name, value in metrics.items()} | times) + "\n"
            )

    ppo_trainer.batch_generation = after(ppo_trainer.batch_generation, before=True)
    ppo_trainer.masked_whiten = after(ppo_trainer.masked_whiten)
    trainer.log = log


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
