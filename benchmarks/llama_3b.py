"""Llama-3.2-3B's shape on a CPU: two steps of SFT and reward, one PPO update, memory by owner.

    make bench-3b

Writes a model folder with the real configuration and random weights (6.4 GB in runs/llama-3b, one
layer at a time, so the 16-bit model is never in memory), then runs the three training scripts on it
with the NF4 base, each in a process of its own. Every tensor is counted while they run
(tensor_memory.py) and held beside the plan that --dry-run prints. PPO runs twice: as on a small
card, and with a merged copy and keys and values that stay between rollouts, as on a larger one.
Random weights change no shape and no byte; nothing here says anything of quality, or of a GPU's
speed.
"""

import json
import multiprocessing
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import rlhf  # noqa: F401  before the libraries that it sets up

import torch
from rich.table import Table
from safetensors.torch import save_file
from tensor_memory import TensorMemory
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ppo_train
import reward_train
import sft_train
from rlhf.data.format import PromptFormat, tokenize_pairs, tokenize_prompt
from rlhf.data.rows import Pair
from rlhf.engine.card import Rollouts
from rlhf.engine.micro_batches import CPU_TOKENS
from rlhf.engine.plan import (
    OWNERS,
    Lora,
    UpdateSizes,
    plan_ppo,
    plan_reward,
    plan_sft,
    read_shape,
)
from rlhf.engine.roles import SharedBase
from rlhf.engine.tokenizers import load_tokenizer
from rlhf.reports.dry_run import show_plan
from rlhf.runs.checkpoints import read_run
from rlhf.runs.cli import quiet_libraries, run
from rlhf.runs.device import hardware, peak_memory_gib
from rlhf.runs.terminal import console

WORK = ROOT / "runs" / "llama-3b"
LLAMA_3B = LlamaConfig(
    vocab_size=128_256,
    hidden_size=3072,
    intermediate_size=8192,
    num_hidden_layers=28,
    num_attention_heads=24,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    tie_word_embeddings=True,
)
SFT = Lora(16)  # of the scripts' defaults, as are
ROLE = Lora(16, 14)
ADAPTERS = {"sft": SFT, "reward": ROLE, "policy": ROLE}
PROMPT = 128  # tokens
RESPONSE = 32  # tokens
MERGED = "ppo_merged"


@dataclass(frozen=True)
class Config:
    tokenizer: str = "models/SmolLM2-135M-Instruct"  # any will do: weights and texts are random
    output: str = "benchmarks/results/llama_3b.json"


def main(config: Config) -> None:
    (ROOT / config.output).parent.mkdir(parents=True, exist_ok=True)
    write_model(WORK / "model", config.tokenizer)
    write_data(WORK / "data", config.tokenizer)
    results: dict[str, Any] = {"hardware": hardware()}
    context = multiprocessing.get_context("spawn")
    for phase in ("sft", "reward", "ppo", MERGED):
        process = context.Process(target=measure, args=(phase,))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(process.exitcode)
        results[phase] = json.loads((WORK / f"{phase}.json").read_text())
        show(phase, results[phase])
    (ROOT / config.output).write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"Saved {config.output}.")
    console.print("A 12 GB card at the scripts' defaults (a plan: nothing here ran on a GPU):")
    facts = read_run(str(WORK / "sft"), "sft")["base"]
    shape = read_shape(facts, "auto")
    plans = {
        "sft_train.py": (partial(plan_sft, shape, SFT, 16, 512, False), 512),
        "reward_train.py": (partial(plan_reward, shape, SFT, ROLE, 16, 640, False), 640),
        "ppo_train.py": (
            partial(plan_ppo, shape, ADAPTERS, UpdateSizes(64, 4, 384, 128), False, Rollouts(32)),
            512,
        ),
    }
    for name, (plan, longest) in plans.items():
        console.print(name)
        show_plan(plan, "auto", longest, card_gb=12.0, advice="lower --micro-batch-tokens")


# ---------------------------------------------------------------- model and data


def write_model(folder: Path, tokenizer: str, shape: LlamaConfig = LLAMA_3B) -> None:
    """A model folder of random weights in bfloat16, one file a layer, made one at a time."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        shapes = {
            name: tuple(weight.shape)
            for name, weight in LlamaForCausalLM(shape).state_dict().items()
        }
    shapes.pop("lm_head.weight")  # tied
    files: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if ".layers." in name else "rest"
        files.setdefault(f"model-{part}.safetensors", []).append(name)
    torch.manual_seed(0)
    for file, names in files.items():
        weights = {name: torch.empty(shapes[name], dtype=torch.bfloat16) for name in names}
        for name, weight in weights.items():
            nn.init.ones_(weight) if "norm" in name else nn.init.normal_(weight, std=0.02)
        save_file(weights, folder / file, metadata={"format": "pt"})
    config = replace_ids(AutoTokenizer.from_pretrained(tokenizer), folder, shape)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    index = {
        "metadata": {},
        "weight_map": {name: file for file, names in files.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_ids(tokenizer, folder: Path, shape: LlamaConfig) -> LlamaConfig:
    """The configuration with the special tokens of `tokenizer`, which is saved beside it."""
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(**shape.to_dict())
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    return config


def write_data(folder: Path, tokenizer: str) -> None:
    """Pairs whose prompts have exactly PROMPT tokens and whose responses RESPONSE, EOS included."""
    prompt_format = PromptFormat("hh", load_tokenizer(tokenizer))

    def pair(words: int, good: str, bad: str) -> Pair:
        return Pair(
            (("user", " ".join(["a"] * words)),),
            " ".join([good] * (RESPONSE - 1)),
            " ".join([bad] * (RESPONSE - 1)),
        )

    words = PROMPT - len(tokenize_prompt(pair(1, "b", "c").turns, prompt_format, PROMPT)) + 1
    pairs = [pair(words, good, bad) for good, bad in zip("bcdefghijk", "BCDEFGHIJK", strict=True)]
    for tokens in tokenize_pairs(pairs, prompt_format, PROMPT + RESPONSE + 1, "made pairs"):
        assert (len(tokens.prompt_ids), len(tokens.chosen_ids)) == (PROMPT, RESPONSE), (
            "a word is not one token"
        )
    rows = [
        {
            "prompt": f"\n\nHuman: {pair.turns[0][1]}\n\nAssistant:",
            "chosen": pair.chosen,
            "rejected": pair.rejected,
        }
        for pair in pairs
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(text)


# ---------------------------------------------------------------- a phase


def measure(phase: str) -> None:
    """Run one script for two steps, or one PPO update, under the count; writes PHASE.json."""
    quiet_libraries()
    shared = {
        "dataset": str(WORK / "data"),
        "output_dir": str(WORK / phase),
        "overwrite": True,
        "dtype": "bf16",
    }
    shared["gradient_checkpointing"] = True
    step = {"max_steps": 2, "max_eval_samples": 2, "max_length": PROMPT + RESPONSE + 1}
    sft = {"sft_checkpoint": str(WORK / "sft")}
    if phase == "sft":
        base = {"base_model": str(WORK / "model"), "batch_size": 1}
        script = sft_train
        config = replace(sft_train.Config(), **base, **shared, **step)
    elif phase == "reward":
        script = reward_train
        config = replace(reward_train.Config(), batch_size=2, **sft, **shared, **step)
    else:
        script = ppo_train
        rollouts = Rollouts(8, merged=phase == MERGED, kept=phase == MERGED)
        ppo_train.choose_rollouts = lambda *_: rollouts  # a CPU would keep nothing
        config = replace(
            ppo_train.Config(),
            **sft,
            **shared,
            reward_checkpoint=str(WORK / "reward"),
            max_prompt_length=PROMPT,
            response_length=RESPONSE,
            total_episodes=8,
            episodes_per_update=8,
            num_mini_batches=1,
            rollout_weights="merged" if rollouts.merged else "base",
            critic_warmup_updates=0,
            max_eval_samples=2,
        )
    memory = TensorMemory(LLAMA_3B.vocab_size, (LLAMA_3B.num_key_value_heads, LLAMA_3B.head_dim))
    watch(script, memory)
    started = time.monotonic()
    with memory:
        script.main(config)
    facts = read_run(str(WORK / "sft"), "sft")["base"]
    shape = read_shape(facts, "bf16", fused_attention=False)
    if phase == "sft":
        plan = plan_sft(shape, SFT, 1, PROMPT + RESPONSE, True, CPU_TOKENS)
    elif phase == "reward":
        plan = plan_reward(shape, SFT, ROLE, 2, PROMPT + 2 * RESPONSE, True, CPU_TOKENS)
    else:
        update = UpdateSizes(8, 1, PROMPT, RESPONSE)
        plan = plan_ppo(shape, ADAPTERS, update, True, rollouts, CPU_TOKENS)
    result = {
        "counted_gb": {owner: memory.peak[owner] / 1e9 for owner in OWNERS},
        "planned_gb": {owner: plan.get(owner, 0) / 1e9 for owner in OWNERS},
        "loading_gb": memory.loading / 1e9,
        "peak_rss_gb": peak_memory_gib() * 2**30 / 1e9,
        "seconds": time.monotonic() - started,
    }
    (WORK / f"{phase}.json").write_text(json.dumps(result))


def watch(script, memory: TensorMemory) -> None:
    """Tell `memory` whose tensors are whose, as soon as the script's model is loaded."""
    name = "load_models" if script is ppo_train else "make_trainer"
    inner = getattr(script, name)

    def outer(*args, **kwargs):
        result = inner(*args, **kwargs)
        models = (
            [result[0].peft, *result[0].heads.values()] if script is ppo_train else [result.model]
        )
        for model in models:
            register(model, memory)
        owner = result[0] if script is ppo_train else getattr(result, "shared", result)
        for stack in (
            stack
            for layer in owner.decoder.layers
            for m in layer.maps
            for stack in m.stacks.values()
        ):
            for tensor in (stack.a, stack.b) if stack else ():
                memory.add(tensor, "adapters", again=True)
        memory.loading = sum(memory.peak.values())
        memory.reset()
        return result

    setattr(script, name, outer)
    merge = SharedBase.merge

    def count_merged(shared, role):
        merge(shared, role)
        for linear in (linear for layer in shared.merged.layers for linear in layer.maps):
            memory.add(linear.weight, "merged copy", again=True)

    SharedBase.merge = count_merged
    if hasattr(script, "save_stacked"):
        save = script.save_stacked

        def stop_and_save(*args):
            memory.stopped = True  # saving copies the adapters, on the CPU
            save(*args)

        script.save_stacked = stop_and_save


def register(model: nn.Module, memory: TensorMemory) -> None:
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        lora = "lora_" in name or weight.shape[0] == 1
        memory.add(weight.data, "adapters" if lora else "base", again=True)
        if lora:
            memory.lora_shapes.add(tuple(weight.shape))
        state = getattr(weight, "quant_state", None)
        while state is not None:
            for tensor in (state.absmax, state.code, getattr(state, "offset", None)):
                if tensor is not None:
                    memory.add(tensor, "base", again=True)
            state = getattr(state, "state2", None)


def show(phase: str, result: dict[str, Any]) -> None:
    table = Table(title=f"{phase}: GB of tensors at the largest moment ({result['seconds']:.0f} s)")
    for column in ("owner", "counted", "planned"):
        table.add_column(column, justify="left" if column == "owner" else "right")
    for owner in OWNERS:
        table.add_row(
            owner, f"{result['counted_gb'][owner]:.2f}", f"{result['planned_gb'][owner]:.2f}"
        )
    counted, planned = (sum(result[what].values()) for what in ("counted_gb", "planned_gb"))
    table.add_row("all", f"{counted:.2f}", f"{planned:.2f}")
    console.print(table)
    console.print(
        f"plan / count {planned / counted:.2f}; while loading {result['loading_gb']:.2f} GB of "
        f"tensors; the process held {result['peak_rss_gb']:.2f} GB at its peak"
    )


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
