"""What a PPO run writes on the way: metrics, samples, curves, progress, and warnings."""

import os
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.data.format import PromptFormat
from rlhf.engine.roles import SharedBase
from rlhf.engine.speed import Work, memory_gib, mfu
from rlhf.ppo.batch import Batch, Measured, count_tokens
from rlhf.ppo.evaluation import Evaluation, compare, penalty_warnings
from rlhf.runs.curves import Curves, Panel
from rlhf.runs.metrics import JsonLines
from rlhf.runs.processes import is_main, moments, sum_numbers
from rlhf.runs.run_warnings import policy_warnings
from rlhf.runs.terminal import Progress, console, plain

PANELS = (
    Panel(
        "Score",
        "by the reward model",
        {
            "objective/scores": "training",
            "eval/scores": "held-out",
            "eval/gold_scores": "held-out, by the gold judge",
        },
    ),
    Panel("KL to SFT", "nats a response", {"objective/kl": "training", "eval/kl": "held-out"}),
    Panel(
        "Length",
        "tokens a response",
        {"val/response_length": "training", "eval/response_length": "held-out"},
    ),
    Panel(
        "Entropy", "nats a token", {"policy/entropy_avg": "training", "eval/entropy": "held-out"}
    ),
    Panel(
        "Critic",
        "loss, and share of variance",
        {"loss/value_avg": "value loss", "val/explained_variance": "returns explained"},
    ),
    Panel(
        "How far an update moves the policy",
        "nats a token, and share of tokens",
        {"policy/approxkl_avg": "approximate KL", "policy/clipfrac_avg": "clipped"},
    ),
)
FAR_SAMPLER = 0.01  # nats a token


def open_tracker(
    name: str | None, folder: Path, hyperparameters: dict[str, Any]
) -> Accelerator | None:
    """The tracker that --log-with names, on the main process."""
    if name is None or not is_main():
        return None
    tracker = Accelerator(log_with=name, project_dir=folder)
    given = {flag: value for flag, value in hyperparameters.items() if value is not None}
    tracker.init_trackers("human-feedback-llama-ppo", given)
    return tracker


class Log:
    """Writes and shows the rows of a run; a tracker gets the same rows.

    Args:
        folder: of the run.
        total: updates of the run.
        num_printed_samples: held-out responses that each evaluation prints.
        chosen_style: of the answers chosen for the held-out prompts, if there are any.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        num_printed_samples: int = 0,
        missing_eos_penalty: float = 0.0,
        chosen_style: dict[str, float] | None = None,
        tracker: Accelerator | None = None,
    ):
        self.total = total
        self.num_printed_samples = num_printed_samples
        self.missing_eos_penalty = missing_eos_penalty
        self.chosen_style = chosen_style or {}
        self.tracker = tracker
        self.curves = Curves(folder, "update", PANELS)
        self.sampler_is_close = True
        # The first evaluation, which later ones are compared with.
        self.sft: Evaluation | None = None
        files = "metrics.jsonl", "samples.jsonl"
        self.metrics, self.samples = (
            JsonLines(folder / name if is_main() else Path(os.devnull)) for name in files
        )

    def __enter__(self) -> "Log":
        self.progress = Progress("PPO", "update", self.total)
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()
        self.metrics.file.close()
        self.samples.file.close()
        for tracker in self.tracker.trackers if self.tracker else ():
            # Not end_training(), which would also end the process group, before the last wait.
            tracker.finish()

    def positions(self) -> tuple[int, int]:
        """Where metrics.jsonl and samples.jsonl end, in bytes."""
        return self.metrics.position(), self.samples.position()

    def rewind(
        self, metrics: int, samples: int, sft: Evaluation | None = None, update: int = 0
    ) -> None:
        """Forget what was written after these positions; `update` updates are done."""
        if is_main():
            self.metrics.cut(metrics)
            self.samples.cut(samples)
        self.sft = sft
        self.progress.begin(update)

    def row(self, row: dict[str, float]) -> None:
        self.metrics.write(row)
        if self.tracker:
            self.tracker.log(row, step=row["update"])

    def update(self, row: dict[str, float]) -> None:
        """One update's metrics."""
        self.row(row)
        if not row["policy/sampler_kl"] <= FAR_SAMPLER and self.sampler_is_close:
            self.sampler_is_close = False  # said once
            console.print(
                f"warning: the sampler is {row['policy/sampler_kl']:.3f} nats a token away from "
                "the policy that is trained, and rounding explains some 0.002; try "
                "--rollout-weights base, or --dtype fp32"
            )
        self.progress.update(
            row["update"],
            score=row["objective/scores"],
            kl=row["objective/kl"],
            speed=row["speed/tokens_per_second"],
        )
        if is_main():
            self.curves.draw_when_due()

    def evaluation(
        self, update: int, result: Evaluation, prompts: list[list[int]], prompt_format: PromptFormat
    ) -> None:
        """Log held-out means. Responses go to samples.jsonl, the first few also to the terminal."""
        means = result.means()
        self.row({"update": update, **{f"eval/{name}": value for name, value in means.items()}})
        shown = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
        console.print(f"update {update}, held-out: {shown}")
        found = []
        if not self.sft:
            self.sft = result
            self.progress.begin(update)  # training steps take another time
            found = penalty_warnings(result, self.missing_eos_penalty)
        elif update < self.total:  # after the last one the script says it
            found = policy_warnings(compare(self.sft, result) | self.chosen_style)
        for warning in found:
            console.print(f"warning: {warning}")
        for i, (prompt, response) in enumerate(zip(prompts, result.responses, strict=True)):
            text = {"prompt": prompt_format.decode(prompt), "response": result.texts[i]}
            numbers = {"score": result.scores[i].item(), "kl": result.kl[i].item()}
            if result.gold_scores is not None:
                numbers["gold_score"] = result.gold_scores[i].item()
            self.samples.write({"update": update, **text, **numbers, "ended_by": response.ended_by})
            if i < self.num_printed_samples:
                console.print(f"  > {plain(text['prompt'][-160:])}")
                console.print(f"    {plain(text['response'])}")
                console.print(f"    score {numbers['score']:.2f}, kl {numbers['kl']:.2f}")


def batch_metrics(
    batch: Batch,
    measured: Measured,
    returns: Tensor,
    update: int,
    kl_coef: float,
    episodes: int,
    missing_eos_penalty: float,
) -> dict[str, float]:
    """Metrics of an update's episodes, under TRL's names; KL in nats a response.

    Args:
        episodes: of an update, over all processes.
    """
    scores = moments(measured.scores)[0].item()
    ended = moments(batch.ended.float())[0].item()
    kl = measured.mean_kl(batch)
    tokens = sum(count_tokens(batch))
    penalty = missing_eos_penalty * (1 - ended)
    unexplained = moments(returns - measured.values)[1] / moments(returns)[1].clamp(min=1e-8)
    return {
        "update": update,
        "episode": update * episodes,
        "objective/scores": scores,
        "objective/kl": kl,
        "objective/kl_coef": kl_coef,
        "objective/rlhf_reward": scores - penalty - kl_coef * kl,
        "policy/entropy_avg": sum_numbers({"sum": measured.entropy.sum().item()})["sum"] / tokens,
        "policy/sampler_kl": sum_numbers({"sum": sampler_kl(batch, measured)})["sum"] / tokens,
        "val/num_eos_tokens": round(ended * episodes),
        "val/response_length": tokens / episodes,
        "val/explained_variance": 1 - unexplained.item(),
    }


def sampler_kl(batch: Batch, measured: Measured) -> float:
    """How far the sampler was from the trained policy, in nats summed over this process's tokens.

    Both are the same policy, in other shapes and perhaps in merged weights, so only rounding sets
    them apart. With the sampler's probabilities q and the measured p, it is the sum of
    p/q - 1 - log(p/q); its mean estimates KL(q, p).
    """
    sampled = [number for response in batch.responses for number in response.logprobs]
    distance = measured.logprobs - torch.tensor(sampled)
    return (distance.exp() - 1 - distance).sum().item()


def speed_metrics(
    shared: SharedBase,
    batch: Batch,
    stats: dict[str, float],
    seconds: dict[str, float],
    num_mini_batches: int,
) -> dict[str, float]:
    """How fast an update was. Tokens are those of all processes, memory is this process's.

    Args:
        stats: what `optimise` returned.
        seconds: of each part of the update.
    """
    counts = sum_numbers(
        {"texts": sum(map(len, batch.texts)), "sampled": sum(batch.response_lengths)}
    )
    epochs = stats["policy/optimizer_steps"] / num_mini_batches
    work = Work.of(shared.decoder, shared.first_role_layer, shared.lm_head_weight())
    operations = work.ppo_update(
        **counts, policy_epochs=epochs * ("policy/approxkl_avg" in stats), value_epochs=epochs
    )
    whole = sum(seconds.values())
    return {
        **{f"time/{part}": spent for part, spent in seconds.items()},
        "speed/tokens_per_second": counts["texts"] / whole,
        "speed/sampled_tokens_per_second": counts["sampled"] / seconds["rollout"],
        **mfu(operations, whole, shared.device, shared.dtype),
        **memory_gib(shared.device),
    }


def whole_speed(rows: list[dict[str, float]]) -> dict[str, float]:
    """Tokens/s over a whole run, and the seconds of each part, from its metrics."""
    rows = [row for row in rows if "episode" in row]
    parts = [name for name in rows[0] if name.startswith("time/")]
    seconds = {name: sum(row[name] for row in rows) for name in parts}
    tokens = sum(row["speed/tokens_per_second"] * sum(row[name] for name in parts) for row in rows)
    return {"speed/tokens_per_second": tokens / sum(seconds.values())} | seconds


def mean_stats(history: list[dict[str, float]]) -> dict[str, float]:
    """Each number's mean over the optimizer steps that have it, and how many steps there were."""
    columns = {
        name: [stats[name] for stats in history if name in stats]
        for name in dict.fromkeys(chain(*history))
    }
    means = {name: sum(column) / len(column) for name, column in columns.items()}
    return means | {"policy/optimizer_steps": len(history)}
