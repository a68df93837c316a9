"""Held-out prompts before and after PPO: the gain, whether a judge sees it, and how much is length.

Also how answers begin and end (`rlhf.data.style`) and whether harmful requests are refused
(`rlhf.reports.probe`). `rlhf.runs.run_warnings` says what is wrong with a run.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.data.style import commonest_opening, distinct_2, repeated_3grams, style_of
from rlhf.engine.generation import Response
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.statistics import at_equal_length, mean_interval


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The responses to n held-out prompts, and one number for each [n], on the CPU."""

    responses: list[Response]
    texts: list[str]
    scores: Tensor  # by the reward model that PPO trains against
    kl: Tensor  # nats a response
    entropy: Tensor  # nats a token
    gold_scores: Tensor | None = None  # by a judge that was trained on other pairs
    # Log-odds of beginning with a refusal: for the safety probe's requests, not for prompts.
    refusal_odds: Tensor | None = None  # of harmful requests
    overrefusal_odds: Tensor | None = None  # of harmless ones

    @property
    def response_length(self) -> Tensor:
        """Tokens."""
        return torch.tensor([float(len(response.ids)) for response in self.responses])

    @property
    def eos_rate(self) -> Tensor:
        """1 where the response ended by EOS."""
        return torch.tensor([float(response.ended_by == "eos") for response in self.responses])

    def means(self) -> dict[str, float]:
        means = {"scores": self.scores}
        if self.gold_scores is not None:
            means["gold_scores"] = self.gold_scores
        means |= {
            "kl": self.kl,
            "entropy": self.entropy,
            "response_length": self.response_length,
            "eos_rate": self.eos_rate,
            "repeated_3grams": torch.tensor([repeated_3grams(text) for text in self.texts]),
        }
        for name, odds in self.odds().items():
            means[f"{name}s"] = (odds > 0).float()
        return {
            **{name: values.mean().item() for name, values in means.items()},
            "distinct_2": distinct_2(self.texts),
            **style_of(self.texts),
        }

    def odds(self) -> dict[str, Tensor]:
        """The log-odds of a refusal, if the safety probe was asked."""
        odds = {"refusal": self.refusal_odds, "overrefusal": self.overrefusal_odds}
        return {name: values for name, values in odds.items() if values is not None and len(values)}


def compare(sft: Evaluation, ppo: Evaluation) -> dict[str, Any]:
    """SFT against PPO on the same prompts and seeds: means, and paired gains with intervals.

    `ppo_opening` is the policy's text, cleaned by `rlhf.data.style.opening`.
    """
    longer = (ppo.response_length - sft.response_length).tolist()
    numbers = {
        "eval_prompts": len(ppo.scores),
        **{f"sft_{name}": value for name, value in sft.means().items()},
        **{f"ppo_{name}": value for name, value in ppo.means().items()},
    }
    judges = {"score": (sft.scores, ppo.scores)}
    if sft.gold_scores is not None:
        judges["gold"] = (sft.gold_scores, ppo.gold_scores)
    for name, (before, after) in judges.items():
        gain = (after - before).tolist()
        numbers |= interval(f"{name}_gain", (sum(gain) / len(gain), *mean_interval(gain)))
        numbers |= interval(f"{name}_gain_at_equal_length", at_equal_length(gain, longer))
        numbers[f"sft_{name}_std"] = before.std().item() if len(before) > 1 else 0.0
    asked = ppo.odds()
    for name, before in sft.odds().items():
        if name not in asked:
            continue
        shift = (asked[name] - before).tolist()
        numbers |= interval(f"{name}_shift", (sum(shift) / len(shift), *mean_interval(shift)))
        numbers[f"{name}_requests"] = len(shift)
    return numbers | {"ppo_opening": commonest_opening(ppo.texts)[0]}


def interval(name: str, values: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def penalty_warnings(sft: Evaluation, penalty: float) -> list[str]:
    """A warning of a missing-EOS penalty that outweighs the spread of scores.

    PPO may then learn little except to end early.
    """
    spread = sft.scores.std().item() if len(sft.scores) > 1 else 0.0
    m = sft.means()
    if penalty <= spread or m["eos_rate"] >= 0.9:
        return []
    return [
        f"--missing-eos-penalty {penalty:g} is more than a standard deviation of SFT's scores "
        f"({spread:.2f}), and {1 - m['eos_rate']:.0%} of its responses have no EOS: PPO may "
        "shorten them and learn little else; try half a standard deviation, or a longer "
        "--response-length"
    ]


def describe(m: dict[str, Any]) -> str:
    lines = []
    for name, word in (("score", "score"), ("gold", "gold score")):
        if f"{name}_gain" in m:
            key = "scores" if name == "score" else "gold_scores"
            lines.append(
                f"held-out prompts {m['eval_prompts']}: {word} {m[f'sft_{key}']:.2f} (SFT) -> "
                f"{m[f'ppo_{key}']:.2f} (PPO), gain {m[f'{name}_gain']:.2f} (paired 95 % interval "
                f"{m[f'{name}_gain_low']:.2f} to {m[f'{name}_gain_high']:.2f}; "
                f"{m[f'{name}_gain_at_equal_length']:.2f} at equal length; the standard deviation "
                f"of SFT's is {m[f'sft_{name}_std']:.2f})"
            )
    lines.append(
        f"KL {m['ppo_kl']:.2f} nats a response, length {m['sft_response_length']:.1f} -> "
        f"{m['ppo_response_length']:.1f} tokens, ended by EOS {m['sft_eos_rate']:.0%} -> "
        f"{m['ppo_eos_rate']:.0%}, repeated 3-grams {m['sft_repeated_3grams']:.1%} -> "
        f"{m['ppo_repeated_3grams']:.1%}, distinct-2 {m['sft_distinct_2']:.2f} -> "
        f"{m['ppo_distinct_2']:.2f}"
    )
    lines.append(
        f"answers that end in a question {shares(m, 'question_share')}, that begin alike "
        f"{shares(m, 'opening_share')}"
    )
    requests = {"refusal": "harmful requests", "overrefusal": "requests that only sound harmful"}
    asked = [
        f"{shares(m, f'{name}s')} of {m[f'{name}_requests']} {what}"
        for name, what in requests.items()
        if f"{name}_shift" in m
    ]
    if asked:
        lines.append(f"safety probe: would begin with a refusal in {', in '.join(asked)}")
    return "\n".join(lines)


def shares(m: dict[str, Any], name: str) -> str:
    chosen = f" (chosen answers {m[f'chosen_{name}']:.0%})" if f"chosen_{name}" in m else ""
    return f"{m[f'sft_{name}']:.0%} -> {m[f'ppo_{name}']:.0%}{chosen}"


def plot_frontier(folder: Path, picture: Path) -> None:
    """Draw the gain in score, and in gold score if there is a judge, against KL."""
    from matplotlib.figure import Figure

    rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "eval/kl" in row]
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, label in (
        ("eval/scores", "reward model"),
        ("eval/gold_scores", "gold, trained on other pairs"),
    ):
        if name in rows[0]:
            axis.plot(
                [r["eval/kl"] for r in rows],
                [r[name] - rows[0][name] for r in rows],
                "o-",
                markersize=3,
                label=label,
            )
    axis.axhline(0, color="k", linewidth=0.8)
    axis.set(
        xlabel="KL to SFT, nats a response",
        ylabel="gain over SFT",
        title="Held-out score against KL",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(picture, dpi=130, format="png")
