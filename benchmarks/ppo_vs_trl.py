"""Our PPO beside the last PPO that TRL had (1.12.0): speed, memory, and what was learned.

    make demo     # trains the SFT and the reward model that both start from
    make bench

Each run is a process of its own. The runs alternate, so that a slow spell of the machine meets all
of them. TRL is installed into benchmarks/work, apart from the pinned one. All start from the same
SFT policy and reward model, on the same prompts, with 16 episodes of up to 48 tokens an update and
LoRA of rank 16:

- trl: TRL's PPOTrainer at its best settings for a CPU (trl_ppo.py).
- same_algorithm: ppo_train.py told to do what TRL does: adapters of policy and value on all layers,
  4 epochs, one minibatch, a fixed KL coefficient, no KL stop, no warm-up.
- shipped_defaults: ppo_train.py as it comes (`--preset demo`, its own learning rates), with its
  warm-ups cut to fit so short a run.

At the end all policies answer the held-out prompts with the same seeds and are judged by the same
reward model.
"""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import rlhf  # noqa: F401  before the libraries that it sets up

import torch
from install import install
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

import ppo_train
from rlhf.data.format import PromptFormat, tokenize_prompts
from rlhf.data.sources import load_pairs
from rlhf.engine.adapters import read_stacked, save_stacked
from rlhf.engine.loading import read_adapter
from rlhf.engine.tokenizers import load_format, load_tokenizer
from rlhf.runs.checkpoints import read_run, sha256
from rlhf.runs.cli import run
from rlhf.runs.device import hardware
from rlhf.runs.errors import UserError
from rlhf.runs.statistics import mean_interval
from rlhf.runs.terminal import console

WORK = ROOT / "benchmarks" / "work"
TRL = WORK / "trl-1.12.0"
BATCH = 16  # episodes of a TRL update
SAME_ALGORITHM = (
    "--episodes-per-update 16 --num-mini-batches 1 --num-ppo-epochs 4 --role-layers 0 "
    "--rollout-batch-size 16 --warmup-updates 0 --critic-warmup-updates 0 --kl-stop 1e9 "
    "--kl-controller fixed --kl-coef 0.05"
)
SHIPPED_DEFAULTS = "--warmup-updates 1 --critic-warmup-updates 0"
SHORT = "--max-eval-samples 4 --num-printed-samples 0"


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "runs/demo/sft"
    reward_checkpoint: str = "runs/demo/reward"
    dataset: str = "demo/data"
    max_train_samples: int | None = None  # prompts to train on; None: all
    max_eval_samples: int | None = 80  # held-out prompts
    runs: int = 3  # of each trainer, each with a seed of its own
    episodes: int = 384  # of each run; a multiple of 32
    # of TRL's policy and of same_algorithm's; at the demo's 1e-3 both lose in score
    learning_rate: float = 3e-4
    value_learning_rate: float = 5e-4  # of their value adapters
    output: str = "benchmarks/results/ppo_vs_trl.json"


def main(config: Config) -> None:
    if config.episodes % 32 or config.episodes < 1 or config.runs < 1:
        raise UserError("--episodes must be a multiple of 32, and --runs at least 1")
    output = ROOT / config.output
    output.parent.mkdir(parents=True, exist_ok=True)
    # In a process of its own: a child's peak memory counts what its parent held when it was
    # started.
    step = multiprocessing.get_context("spawn").Process(target=prepare, args=(config,))
    step.start()
    step.join()
    if step.exitcode:
        sys.exit(step.exitcode)
    runs: list[dict[str, Any]] = []
    for seed in range(config.runs):
        for name in ("trl", "same_algorithm", "shipped_defaults"):
            runs.append(measure(config, name, seed))
    runs.append(measure(replace(config, episodes=2 * BATCH), "trl_full_value", 0))
    results = summary(config, runs)
    output.write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    console.print(f"Saved {config.output}.")


# ---------------------------------------------------------------- before


def prepare(config: Config) -> None:
    """TRL 1.12.0, with both checkpoints in the form that TRL and `same_algorithm` need."""
    WORK.mkdir(exist_ok=True)
    (WORK / ".gitignore").write_text("*\n")
    if not (TRL / "trl").exists():
        problem = install(TRL, "trl==1.12.0")
        if problem:
            raise UserError(f"TRL 1.12.0 cannot be installed into {TRL}: {problem}")
    tokenizer = load_tokenizer(config.sft_checkpoint)
    prompt_format = PromptFormat(read_run(config.sft_checkpoint, "sft")["prompt_format"], tokenizer)
    pairs = load_pairs(config.dataset, "train", config.max_train_samples)
    prompts = tokenize_prompts(pairs, prompt_format, ours(config).max_prompt_length)
    (WORK / "prompts.json").write_text(json.dumps(prompts))
    # TRL's models are whole ones, so the adapters are merged into copies of the base.
    options = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "dtype": torch.float32}
    for name, model in (
        (
            "policy",
            AutoPeftModelForCausalLM.from_pretrained(config.sft_checkpoint, dtype=torch.float32),
        ),
        (
            "reward",
            AutoPeftModelForSequenceClassification.from_pretrained(
                config.reward_checkpoint, **options
            ),
        ),
    ):
        model.merge_and_unload().to(torch.bfloat16).save_pretrained(WORK / name)
        tokenizer.save_pretrained(WORK / name)
    widen_reward(config)


def widen_reward(config: Config) -> None:
    """The same reward model with its adapter on all layers, zero where it had none.

    The value model is a copy of it.
    """
    sft = read_run(config.sft_checkpoint, "sft")
    prompt_format = load_format(config.sft_checkpoint, sft)
    shared, base = ppo_train.load_models(ours(config), sft, prompt_format)
    scorer = read_stacked(config.reward_checkpoint, shared)
    shared.add_role("wide", **scorer | {"num_layers": 0, "state": None})
    with torch.no_grad():
        for name, weight in shared.peft.named_parameters():
            if ".wide." in name:
                narrow = scorer["state"].get(name.replace(".wide.", "."))
                if narrow is not None:
                    weight.copy_(narrow)
    save_stacked(WORK / "reward_all_layers", shared, "wide", prompt_format, base)
    facts = read_run(config.reward_checkpoint, "reward")
    facts["adapter_sha256"] = sha256(WORK / "reward_all_layers" / "adapter_model.safetensors")
    (WORK / "reward_all_layers" / "run.json").write_text(json.dumps(facts))


def ours(config: Config) -> ppo_train.Config:
    return replace(
        ppo_train.PRESETS["demo"],
        sft_checkpoint=config.sft_checkpoint,
        reward_checkpoint=config.reward_checkpoint,
        dataset=config.dataset,
        max_train_samples=config.max_train_samples,
        max_eval_samples=config.max_eval_samples,
    )


# ---------------------------------------------------------------- a run


def measure(config: Config, name: str, seed: int) -> dict[str, Any]:
    """Run one trainer in a process of its own: its speed, its phases and its peak memory."""
    out = WORK / f"{name}_{seed}"
    if name.startswith("trl"):
        settings = {
            "policy": str(WORK / "policy"),
            "reward": str(WORK / "reward"),
            "prompts": str(WORK / "prompts.json"),
            "value": "full" if name == "trl_full_value" else "lora",
            "updates": config.episodes // BATCH,
            "learning_rate": config.learning_rate,
            "value_learning_rate": config.value_learning_rate if name == "trl" else 1e-5,
            "seed": seed,
            "output_dir": str(out),
        }
        (out / "metrics.jsonl").unlink(missing_ok=True)
        (WORK / "settings.json").write_text(json.dumps(settings))
        command = [sys.executable, f"{ROOT}/benchmarks/trl_ppo.py", f"{WORK}/settings.json"]
    else:
        flags = {
            "--sft-checkpoint": config.sft_checkpoint,
            "--reward-checkpoint": config.reward_checkpoint,
            "--dataset": config.dataset,
            "--output-dir": out,
            "--seed": seed,
            "--total-episodes": config.episodes,
        }
        if config.max_train_samples:
            flags["--max-train-samples"] = config.max_train_samples
        if name == "same_algorithm":
            flags |= {
                "--learning-rate": config.learning_rate,
                "--value-learning-rate": config.value_learning_rate,
                "--reward-checkpoint": WORK / "reward_all_layers",
            }
        command = [sys.executable, f"{ROOT}/ppo_train.py", "--preset", "demo", "--overwrite"]
        same = name == "same_algorithm"
        command += [*SHORT.split(), *(SAME_ALGORITHM if same else SHIPPED_DEFAULTS).split()]
        command += [str(word) for flag in flags.items() for word in flag]
    console.print(f"{name}, seed {seed} ...")
    env = os.environ | ({"PYTHONPATH": str(TRL)} if name.startswith("trl") else {})
    with open(WORK / f"{name}_{seed}.log", "wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{name} failed; see {log.name}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "time/rollout" in row]
    seconds = {
        phase: sum(row[f"time/{phase}"] for row in rows)
        for phase in ("rollout", "measure", "optimise")
    }
    result = {
        "trainer": name,
        "seed": seed,
        "episodes": config.episodes,
        "samples_per_second": config.episodes / sum(seconds.values()),
        "peak_rss_gb": usage.ru_maxrss * 1024 / 1e9,
        "seconds_per_update": {phase: total / len(rows) for phase, total in seconds.items()},
        "training_score": [row["objective/scores"] for row in rows],
    }
    console.print(
        f"  {result['samples_per_second']:.3f} samples/s, {result['peak_rss_gb']:.2f} GB peak"
    )
    return result


# ---------------------------------------------------------------- after


def summary(config: Config, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, ratios over TRL's, and what each policy learned."""
    sft = judge(config, "sft", 0)
    learned = {
        (name, seed): judge(config, name, seed)
        for name in ("trl", "same_algorithm", "shipped_defaults")
        for seed in range(config.runs)
    }

    def median(name: str, what: str) -> float:
        return statistics.median(entry[what] for entry in runs if entry["trainer"] == name)

    def learning(name: str) -> dict[str, Any]:
        results = [learned[name, seed] for seed in range(config.runs)]
        gains = torch.stack([result.scores - sft.scores for result in results])  # [seeds, prompts]
        low, high = mean_interval(gains.mean(0).tolist())
        return {
            "score_gain": gains.mean().item(),
            "score_gain_interval": [low, high],
            "score_gain_by_seed": gains.mean(1).tolist(),
            "kl_by_seed": [result.kl.mean().item() for result in results],
            "response_length_by_seed": [result.response_length.mean().item() for result in results],
        }

    results: dict[str, Any] = {
        "hardware": hardware(),
        "config": {name: str(value) for name, value in vars(config).items()},
        "sft_score": sft.scores.mean().item(),
        "sft_score_std": sft.scores.std().item(),
        "trl": {what: median("trl", what) for what in ("samples_per_second", "peak_rss_gb")}
        | learning("trl"),
        "trl_full_value": {
            what: median("trl_full_value", what) for what in ("samples_per_second", "peak_rss_gb")
        },
    }
    for name in ("same_algorithm", "shipped_defaults"):
        difference = torch.stack(
            [
                learned[name, seed].scores - learned["trl", seed].scores
                for seed in range(config.runs)
            ]
        )
        results[name] = {
            "speed_ratio": median(name, "samples_per_second") / median("trl", "samples_per_second"),
            "memory_ratio": median(name, "peak_rss_gb") / median("trl", "peak_rss_gb"),
            "samples_per_second": median(name, "samples_per_second"),
            "peak_rss_gb": median(name, "peak_rss_gb"),
            **learning(name),
            "score_above_trl": difference.mean().item(),
            "score_above_trl_interval": list(mean_interval(difference.mean(0).tolist())),
        }
    return results | {"runs": runs}


def judge(config: Config, name: str, seed: int) -> ppo_train.Evaluation:
    """Answers to the held-out prompts, scored: SFT's, or those of a run's policy on top of it."""
    sft = read_run(config.sft_checkpoint, "sft")
    settings = replace(ours(config), dtype="bf16")
    state = None
    prompt_format = load_format(config.sft_checkpoint, sft)
    shared, _ = ppo_train.load_models(settings, sft, prompt_format)
    folder = str(WORK / f"{name}_{seed}")
    if name == "trl":
        lora, state = read_adapter(folder)
        shape = {"lora_rank": lora.r, "lora_alpha": lora.lora_alpha, "role_layers": 0}
    elif name != "sft":
        policy = read_stacked(folder, shared)
        state = policy["state"]
        shape = {
            "lora_rank": policy["rank"],
            "lora_alpha": policy["alpha"],
            "role_layers": policy["num_layers"],
        }
    if state is not None:
        shared, _ = ppo_train.load_models(replace(settings, **shape), sft, prompt_format)
        shared.load("policy", state)
    prompts = ppo_train.load_prompts(settings, prompt_format).held_out
    return ppo_train.evaluate(settings, shared, prompt_format, lambda scores, _: scores, prompts)


def show(results: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", "samples/s", "peak GB", "score gain", "KL", title=results["hardware"])
    for name in ("trl", "same_algorithm", "shipped_defaults"):
        r = results[name]
        low, high = r["score_gain_interval"]
        kl = statistics.mean(r["kl_by_seed"])
        ratios = [
            f" ({r[ratio]:.2f}x)" if ratio in r else "" for ratio in ("speed_ratio", "memory_ratio")
        ]
        table.add_row(
            name,
            f"{r['samples_per_second']:.3f}{ratios[0]}",
            f"{r['peak_rss_gb']:.2f}{ratios[1]}",
            f"{r['score_gain']:.2f} ({low:.2f} to {high:.2f})",
            f"{kl:.2f}",
        )
    full = results["trl_full_value"]
    table.add_row(
        "trl, all of the value model",
        f"{full['samples_per_second']:.3f}",
        f"{full['peak_rss_gb']:.2f}",
        "",
        "",
    )
    console.print(table)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
