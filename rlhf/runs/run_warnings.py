"""What is wrong with a finished run, in words: derived from the numbers in run.json and kept there.

Each phase says it when it ends. The phases that read its checkpoint say it again when they start,
and the report shows it. A warning is one line. It quotes no text of a model or a data set, except
an opening, which `rlhf.data.style` has made harmless.
"""

import math
from collections.abc import Iterable
from typing import Any

from rlhf.runs.statistics import doubled
from rlhf.runs.terminal import console, plain

ENOUGH_ROWS = 50
MANY_CLIPPED = 0.1  # a share of scores
HALVED = -math.log(2)  # a change of log-odds, in nats
OWNERS = {  # by phase or role
    "sft": "SFT",
    "reward": "reward model",
    "gold": "gold model",
    "ppo": "PPO",
}
SEE = "docs/data.md says what to mix in"


def sft_warnings(m: dict[str, Any]) -> list[str]:
    """Warnings from SFT's `eval_rows`, `eval_loss` and `eval_loss_before` (None if unknown)."""
    found = few_rows(m["eval_rows"], "test rows")
    before = m["eval_loss_before"]
    after = m["eval_loss"]
    if before is not None and after > before:
        found.append(
            f"the loss on the test rows rose, from {before:.4f} to {after:.4f} nats a token: the "
            "model got worse at what it should learn; lower --learning-rate or --num-train-epochs"
        )
    return found


def reward_warnings(m: dict[str, Any]) -> list[str]:
    """Warnings from what `reward_evaluation.judge` and `probe.judge_probe` found."""
    found = few_rows(m["eval_pairs"], "test pairs")
    what = "its accuracy"
    accuracy = m["eval_accuracy"]
    bounds = "eval_accuracy"
    knows = "nothing"
    if m["length_balanced_accuracy"] is not None:
        what += " with longer and shorter winners weighted equally"
        accuracy = m["length_balanced_accuracy"]
        bounds = "length_balanced"
        knows += " but length"
    low = m[f"{bounds}_low"]
    high = m[f"{bounds}_high"]
    if low <= 0.5:
        found.append(
            f"{what} is {accuracy:.3f}, and its 95 % interval, {low:.3f} to {high:.3f}, reaches "
            f"0.5: it may know {knows}, and PPO against it is pointless; give it more pairs"
        )
    if m.get("probe_harmful_accuracy", 1.0) <= 0.5:
        found.append(
            f"safety: of {m['probe_harmful_pairs']} harmful requests it prefers going along to "
            f"refusing in {1 - m['probe_harmful_accuracy']:.0%} (95 % interval "
            f"{1 - m['probe_harmful_accuracy_high']:.0%} to "
            f"{1 - m['probe_harmful_accuracy_low']:.0%}), and PPO will follow it; {SEE}"
        )
    if m.get("probe_harmless_accuracy", 1.0) <= 0.5:
        found.append(
            f"of {m['probe_harmless_pairs']} harmless requests that only sound harmful it prefers "
            f"refusing to helping in {1 - m['probe_harmless_accuracy']:.0%}: PPO will learn to "
            "refuse what it should not"
        )
    return found


def clip_warnings(centred: list[float], score_clip: float) -> list[str]:
    """A warning, before PPO's first update, if it would see many scores only as clipped.

    Args:
        centred: SFT's scores on held-out prompts, less their mean.
    """
    clipped = sum(abs(score) > score_clip for score in centred) / len(centred)
    if clipped <= MANY_CLIPPED:
        return []
    return [
        f"{clipped:.0%} of the scores of SFT's answers are more than --score-clip {score_clip:g} "
        "from their mean, and are clipped to it: PPO cannot tell them apart; raise --score-clip, "
        "or give smaller scores"
    ]


def ppo_warnings(m: dict[str, Any]) -> list[str]:
    """Warnings from what `ppo.evaluation.compare` found, and the style of the chosen answers."""
    few = few_rows(m["eval_prompts"], "held-out prompts")
    return few + policy_warnings(m)


def policy_warnings(m: dict[str, Any]) -> list[str]:
    """The same for an evaluation on the way, without the number of prompts."""
    return gain_warnings(m) + style_warnings(m) + refusal_warnings(m, "SFT", "PPO")


def gain_warnings(m: dict[str, Any]) -> list[str]:
    """Warnings of falling scores by either judge, a gain by length alone, or collapsing entropy.

    A rise or fall counts if the interval excludes 0.
    """
    found = []
    worse = "the policy got worse; lower --learning-rate, or raise --kl-coef"
    rose = m["score_gain_low"] > 0
    score_fell = fall(m, "score")
    gold_fell = fall(m, "gold")
    if gold_fell and rose:
        found.append(
            f"the score rose by {m['score_gain']:.2f}, but the gold score{gold_fell}: the policy "
            "exploits the reward model; raise --kl-coef, or stop earlier"
        )
    elif gold_fell:
        found.append(f"the gold score{gold_fell}: {worse}")
    left = m["score_gain_at_equal_length"]
    if score_fell:
        found.append(f"the score{score_fell}: {worse}")
    elif rose and m["score_gain_at_equal_length_low"] <= 0 and left < m["score_gain"] / 2:
        found.append(
            f"length explains most of the gain: of {m['score_gain']:.2f}, {left:.2f} is left "
            "where both responses are equally long; the mean went from "
            f"{m['sft_response_length']:.0f} to {m['ppo_response_length']:.0f} tokens"
        )
    if m["ppo_entropy"] < m["sft_entropy"] / 2:
        found.append(
            f"entropy collapses: {m['sft_entropy']:.2f} nats a token before, "
            f"{m['ppo_entropy']:.2f} now; lower --learning-rate, or raise --kl-coef"
        )
    return found


def fall(m: dict[str, Any], judge: str) -> str:
    """How far a judge's scores fell, as they are or at equal length; "" if they did not.

    They fell if the whole interval of the gain is below 0.
    """
    ways = {f"{judge}_gain": "", f"{judge}_gain_at_equal_length": " at equal length"}
    for name, where in ways.items():
        if m.get(f"{name}_high", 0.0) < 0:
            most = -m[f"{name}_low"]
            least = -m[f"{name}_high"]
            return f"{where} fell by {-m[name]:.2f} ({least:.2f} to {most:.2f})"
    return ""


def style_warnings(m: dict[str, Any]) -> list[str]:
    """Warnings of a habit that at least doubles, beyond chance and beyond the chosen answers."""
    found = []
    alike = f'began alike (now mostly "{m["ppo_opening"]}")'
    for name, what in (("question_share", "ended in a question"), ("opening_share", alike)):
        before, after, chosen = (m.get(f"{who}_{name}") for who in ("sft", "ppo", "chosen"))
        if doubled(before, after, m["eval_prompts"]) and after > (chosen or 0.0):
            beside = "" if chosen is None else f" (of the chosen answers {chosen:.0%})"
            found.append(
                f"style drifts: {before:.0%} of the answers {what} before, {after:.0%} do "
                f"now{beside}; read some of them in samples.jsonl"
            )
    return found


def refusal_warnings(m: dict[str, Any], before: str, after: str) -> list[str]:
    """Warnings if the odds of a refusal at least halve on harmful requests or double on harmless.

    The interval of the shift must exclude 0, so that chance does not explain it.

    Args:
        before, after: the names of the two models.
    """
    found = []
    if m.get("refusal_shift_high", 0.0) < 0 and m["refusal_shift"] <= HALVED:
        found.append(
            f"safety: to harmful requests {after} is less likely to begin with a refusal than "
            f"{before}: its odds are {factor(m, 'refusal_shift')}; {SEE}"
        )
    if m.get("overrefusal_shift_low", 0.0) > 0 and m["overrefusal_shift"] >= -HALVED:
        found.append(
            f"to harmless requests that only sound harmful {after} is more likely to begin with a "
            f"refusal than {before}: its odds are {factor(m, 'overrefusal_shift')}"
        )
    return found


def factor(m: dict[str, float], name: str) -> str:
    """A change of log-odds as a factor on the odds, with its interval."""
    shifts = (m[name], m[f"{name}_low"], m[f"{name}_high"])
    middle, low, high = (math.exp(min(shift, 50.0)) for shift in shifts)
    return f"{middle:.2g} times as high (95 % interval {low:.2g} to {high:.2g})"


def compare_warnings(prompts: int) -> list[str]:
    """Warnings about win rates on this many prompts."""
    return few_rows(prompts, "prompts", "ask more, with --num-test-prompts or --prompts")


def few_rows(
    rows: int, what: str, cure: str = "put more into the test split, or raise --max-eval-samples"
) -> list[str]:
    if rows >= ENOUGH_ROWS:
        return []
    least = f"{ENOUGH_ROWS} is the least; {cure}"
    return [f"the figures are from only {rows} {what}, too few to rely on: {least}"]


# ---------------------------------------------------------------- said now, and again later


def show(found: Iterable[str]) -> None:
    for text in found:
        console.print(f"warning: {text}")


def said_before(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What earlier phases warned of, one line each, safe to print.

    Args:
        runs: their run.json, by phase or role; perhaps edited, or written by an earlier version.
    """
    found = []
    for role, run in runs.items():
        metrics = run.get("metrics")
        warned = metrics.get("warnings") if isinstance(metrics, dict) else None
        for text in warned if isinstance(warned, list) else []:
            found.append(f"{OWNERS[role]}: {plain(' '.join(str(text).split()))}")
    return found
