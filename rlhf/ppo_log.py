"""What a PPO run tells: metrics.jsonl, samples.jsonl, a progress bar, printed samples, and the gain over SFT at its end."""

import dataclasses
from pathlib import Path
from typing import Any

from rlhf.data import PromptFormat
from rlhf.generation import Response
from rlhf.ppo_batch import MicroBatch, mean_kl
from rlhf.reporting import JsonLines, mean_interval, plain, progress

import torch
from accelerate import Accelerator
from torch import Tensor

CURVES = {
    "score": ["objective/scores", "eval/scores"],
    "KL to SFT, nats a response": ["objective/kl", "eval/kl"],
    "response length, tokens": ["val/response_length", "eval/response_length"],
    "losses": ["loss/policy_avg", "loss/value_avg"],
    "entropy, nats a token": ["policy/entropy_avg", "eval/entropy"],
    "approxkl and clipped share": ["policy/approxkl_avg", "policy/clipfrac_avg"],
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One number a held-out prompt, [n] on the CPU, and the responses they are of."""

    scores: Tensor
    kl: Tensor  # nats a response
    entropy: Tensor  # nats a token
    response_length: Tensor  # tokens
    eos_rate: Tensor  # 1 where the response ended by EOS
    responses: list[Response]

    def means(self) -> dict[str, float]:
        names = [field.name for field in dataclasses.fields(self) if field.name != "responses"]
        return {name: getattr(self, name).mean().item() for name in names}


class Log:
    """Writes and shows the rows of a run; a tracker gets the same rows if the config names one."""

    def __init__(self, config: Any, folder: Path, total: int):
        self.bar, self.num_printed_samples, self.tracker = progress(), config.num_printed_samples, None
        self.metrics, self.samples = JsonLines(folder / "metrics.jsonl"), JsonLines(folder / "samples.jsonl")
        self.task = self.bar.add_task("PPO", total=total, note="")
        if config.log_with:
            self.tracker = Accelerator(log_with=config.log_with, project_dir=folder)
            settings = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
            self.tracker.init_trackers("human-feedback-llama-ppo", settings)

    def __enter__(self) -> "Log":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()
        if self.tracker:
            self.tracker.end_training()

    def row(self, row: dict[str, float]) -> None:
        self.metrics.write(row)
        if self.tracker:
            self.tracker.log(row, step=row["update"])

    def update(self, row: dict[str, float]) -> None:
        """One update's metrics."""
        self.row(row)
        note = f"score {row['objective/scores']:.2f} kl {row['objective/kl']:.2f}"
        self.bar.update(self.task, completed=row["update"], note=note)

    def evaluation(self, update: int, result: Evaluation, prompts: list[list[int]], form: PromptFormat) -> None:
        """The means over the held-out prompts, every response to samples.jsonl, the first few to the terminal."""
        means = result.means()
        self.row({"update": update, **{f"eval/{name}": value for name, value in means.items()}})
        shown = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
        self.bar.console.print(f"update {update}, held-out: {shown}")
        for i, (prompt, response) in enumerate(zip(prompts, result.responses, strict=True)):
            text = {"prompt": form.decode(prompt), "response": form.decode(response.text_ids)}
            numbers = {"score": result.scores[i].item(), "kl": result.kl[i].item()}
            self.samples.write({"update": update, **text, **numbers, "ended_by": response.ended_by})
            if i < self.num_printed_samples:
                self.bar.console.print(f"  > {plain(text['prompt'][-160:])}", markup=False)
                self.bar.console.print(f"    {plain(text['response'])}", markup=False)
                self.bar.console.print(f"    score {numbers['score']:.2f}, kl {numbers['kl']:.2f}")


def batch_metrics(
    batch: list[MicroBatch], update: int, kl_coef: float, clock: list[float], config: Any
) -> dict[str, float]:
    """What an update saw, under TRL's names; KL in nats a response; times in seconds between the readings of `clock`."""
    scores, ended = torch.cat([m.scores for m in batch]), torch.cat([m.ended for m in batch])
    kl, tokens = mean_kl(batch), sum(m.response_mask.sum().item() for m in batch)
    penalty = config.missing_eos_penalty * (~ended).float().mean().item()
    return {
        "update": update,
        "episode": update * config.batch_size,
        "objective/scores": scores.mean().item(),
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/rlhf_reward": scores.mean().item() - penalty - kl_coef * kl,
        "policy/entropy_avg": sum(m.entropy.sum().item() for m in batch) / tokens,
        "val/num_eos_tokens": ended.sum().item(),
        "val/response_length": tokens / len(ended),
        **{f"time/{name}": clock[i + 1] - clock[i] for i, name in enumerate(("rollout", "measure", "optimise"))},
    }


def add_means(stats: dict[str, float], parts: dict[str, Tensor], response_mask: Tensor, tokens: int) -> None:
    """Add a micro-batch's share of the minibatch's means over real tokens."""
    for name, values in parts.items():
        stats[name] = stats.get(name, 0.0) + values.detach()[response_mask].sum().item() / tokens


def mean_stats(history: list[dict[str, float]]) -> dict[str, float]:
    """Means over an update's optimizer steps, and how many there were."""
    means = {name: sum(stats[name] for stats in history) / len(history) for name in history[0]}
    return means | {"policy/optimizer_steps": len(history)}


def compare(sft: Evaluation, ppo: Evaluation) -> dict[str, float]:
    """SFT against PPO on the same prompts and seeds: means of both, and the paired gain in score with its interval."""
    gain = ppo.scores - sft.scores
    low, high = mean_interval(gain.tolist())
    return {
        "eval_prompts": len(gain),
        **{f"sft_{name}": value for name, value in sft.means().items()},
        **{f"ppo_{name}": value for name, value in ppo.means().items()},
        "sft_score_std": sft.scores.std().item(),
        "score_gain": gain.mean().item(),
        "score_gain_low": low,
        "score_gain_high": high,
    }


def describe(m: dict[str, float]) -> str:
    return (
        f"held-out prompts {m['eval_prompts']}: score {m['sft_scores']:.2f} (SFT) -> {m['ppo_scores']:.2f} (PPO), "
        f"gain {m['score_gain']:.2f} (paired 95 % interval {m['score_gain_low']:.2f} to {m['score_gain_high']:.2f}; "
        f"the standard deviation of SFT's scores is {m['sft_score_std']:.2f})\n"
        f"KL {m['ppo_kl']:.2f} nats a response, length {m['sft_response_length']:.1f} -> "
        f"{m['ppo_response_length']:.1f} tokens, ended by EOS {m['sft_eos_rate']:.0%} -> {m['ppo_eos_rate']:.0%}"
    )
