"""What each stabiliser of PPO is worth: one taken away at a time, beside PPO as it comes.

    python benchmarks/ppo_ablation.py --dataset Dahoas/rm-static

From an SFT model, a reward model of the first half of the pairs and a gold one of the second half. Each run is judged on the same
held-out prompts, with the same sampling seeds, by the reward model it trained against and by the gold one. Finished
runs are kept in --work and not done again. What ppo_train.py has no flag for is taken away here, around it.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import ppo_train  # noqa: E402
from rlhf.cli import UserError, run  # noqa: E402
from rlhf.reporting import console  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from reward_ablation import keep_config  # noqa: E402
from rich.table import Table  # noqa: E402


def value_from_scratch(stack: ExitStack) -> None:
    """The value model starts at 0 for every token instead of as the reward model."""
    load, token_values = ppo_train.load_models, ppo_train.token_values

    def load_models(*args):
        shared, base = load(*args)
        with torch.no_grad():
            shared.heads["value"].weight.zero_()
            for name, weight in shared.peft.named_parameters():
                if ".value." in name and "lora_B" in name:
                    weight.zero_()
        return shared, base

    changes: dict[str, Callable] = {
        "load_models": load_models,
        "token_values": lambda shared, micro, _: token_values(shared, micro, 0.0),  # in centred scores from the start
    }
    stack.enter_context(mock.patch.multiple(ppo_train, **changes))


def unwhitened(stack: ExitStack) -> None:
    """Advantages as they are, neither centred nor scaled."""
    stack.enter_context(mock.patch.object(ppo_train, "whiten", lambda tensors, masks, shift_mean=True: tensors))


def uncentred(stack: ExitStack) -> None:
    """Scores as they are, without SFT's mean taken off."""
    set_advantages, token_values = ppo_train.set_advantages, ppo_train.token_values
    changes: dict[str, Callable] = {
        "set_advantages": lambda batch, kl_coef, _, config: set_advantages(batch, kl_coef, 0.0, config),
        "token_values": lambda shared, micro, _: token_values(shared, micro, 0.0),
    }
    stack.enter_context(mock.patch.multiple(ppo_train, **changes))


@dataclass(frozen=True)
class Variant:
    changes: dict[str, Any] = field(default_factory=dict)  # of ppo_train.Config
    patch: Callable[[ExitStack], None] | None = None


NONE = 1e9  # a limit that is never met
# rm-static's texts are longer than the demo's, and its scores closer together: half a standard deviation for an end.
PPO = {"max_prompt_length": 160, "response_length": 64, "missing_eos_penalty": 0.3, "num_printed_samples": 0}
SHOWN = ("score_gain", "gold_gain", "ppo_kl", "ppo_response_length", "ppo_eos_rate", "ppo_entropy")
VARIANTS = {
    "as it comes": Variant(),
    "value model from scratch": Variant(patch=value_from_scratch),
    "no critic warm-up": Variant({"critic_warmup_updates": 0}),
    "advantages not whitened": Variant(patch=unwhitened),
    "rewards whitened": Variant({"whiten_rewards": True}),
    "scores not centred, not clipped": Variant({"score_clip": NONE}, uncentred),
    "fixed KL coefficient": Variant({"kl_controller": "fixed"}),
    "no KL penalty": Variant({"kl_coef": 0.0, "kl_controller": "fixed"}),
    "no KL stop": Variant({"kl_stop": NONE}),
    "lambda 1": Variant({"lam": 1.0}),
}


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "runs/results/sft"
    reward_checkpoint: str = "runs/results/reward_model"
    gold_checkpoint: str = "runs/results/gold"
    dataset: str = "Dahoas/rm-static"
    total_episodes: int = 512
    max_eval_samples: int = 128  # held-out prompts
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 2
    work: str = "runs/results/ppo_ablation"  # a folder a run; what is there is not trained again
    output: str = "runs/results/ppo_ablation.json"


def main(config: Config) -> None:
    unknown = set(config.variants) - set(VARIANTS)
    if unknown or config.seeds < 1:
        raise UserError(f"--variants are any of {', '.join(VARIANTS)}; --seeds at least 1")
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    names = "sft_checkpoint", "reward_checkpoint", "gold_checkpoint", "dataset", "total_episodes", "max_eval_samples"
    keep_config(Path(config.work), config, names)
    for seed in range(config.seeds):
        for name in config.variants:
            here = folder(config, name, seed)
            if not (here / "run.json").exists() and not here.with_suffix(".failed").exists():
                console.print(f"{name}, seed {seed} ...")
                try:
                    train(config, name, seed)
                except UserError as error:  # it diverged, and that is a result
                    here.with_suffix(".failed").write_text(str(error))
    results = summary(config)
    Path(config.output).write_text(json.dumps(results, indent=2) + "\n")
    show(results)
    console.print(f"Saved {config.output}.")


def folder(config: Config, name: str, seed: int) -> Path:
    return Path(config.work) / f"{name.replace(',', '').replace(' ', '_')}_{seed}"


def train(config: Config, name: str, seed: int) -> None:
    variant = VARIANTS[name]
    parents = {name: getattr(config, name) for name in ("sft_checkpoint", "reward_checkpoint", "gold_checkpoint")}
    settings = replace(
        ppo_train.PRESETS["demo"],
        **parents,
        **PPO,
        dataset=config.dataset,
        total_episodes=config.total_episodes,
        max_eval_samples=config.max_eval_samples,
        output_dir=str(folder(config, name, seed)),
        overwrite=True,
        seed=seed,
        **variant.changes,
    )
    with ExitStack() as stack:
        if variant.patch:
            variant.patch(stack)
        ppo_train.main(settings)


def summary(config: Config) -> dict[str, Any]:
    rows, sft = {}, {}
    for name in config.variants:
        files = [folder(config, name, seed) / "run.json" for seed in range(config.seeds)]
        runs = [json.loads(file.read_text())["metrics"] for file in files if file.exists()]
        rows[name] = {key: [metrics[key] for metrics in runs] for key in SHOWN}
        rows[name]["failed"] = len(files) - len(runs)
        for gain in ("score_gain", "gold_gain"):
            halves = [(metrics[f"{gain}_high"] - metrics[f"{gain}_low"]) / 2 for metrics in runs]
            rows[name][f"{gain}_half_width"] = float(np.mean(halves)) if halves else None
        sft = sft or next(({k: v for k, v in metrics.items() if k.startswith("sft_")} for metrics in runs), {})
    return {"config": asdict(config), "sft": sft, "variants": rows}


def show(results: dict[str, Any]) -> None:
    table = Table("", "score gain, by seed", "gold gain, by seed", "KL", "tokens", "EOS", "entropy", "failed")
    for name, r in results["variants"].items():
        if not r["score_gain"]:
            table.add_row(name, *[""] * 6, str(r["failed"]))
            continue
        table.add_row(
            name,
            f"{', '.join(f'{v:.2f}' for v in r['score_gain'])} (+-{r['score_gain_half_width']:.2f})",
            f"{', '.join(f'{v:.2f}' for v in r['gold_gain'])} (+-{r['gold_gain_half_width']:.2f})",
            *(f"{np.mean(r[key]):.2f}" for key in SHOWN[2:]),
            str(r["failed"]),
        )
    console.print(table)


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
