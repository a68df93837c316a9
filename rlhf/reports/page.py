"""The comparison as a page: one file that runs no script and fetches nothing.

The template is compare.html.jinja. It shows a report of compare_outputs.py, with training curves
from the metrics.jsonl in each checkpoint. Anyone may have edited a checkpoint, so whatever a run
would not write is left out.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf.data.rows import SPEAKERS
from rlhf.engine.generation import ENDINGS
from rlhf.runs.metrics import read_jsonl
from rlhf.runs.terminal import plain

MAX_POINTS = 200  # of a curve; with more, neighbours are averaged
LARGEST = 1e30  # larger numbers are left out, and so is NaN
# The size of a panel, in SVG units, and the edges of the area inside its axes.
WIDTH = 300
HEIGHT = 184
LEFT = 38
RIGHT = 290
TOP = 10
BOTTOM = 146

X = {"sft": "step", "reward": "step", "ppo": "update"}  # what each phase's curves are drawn over
PANELS = (  # phase, title, unit, and the label of each metric
    ("sft", "SFT: loss", "nats a token", {"loss": "training", "eval_loss": "test"}),
    (
        "reward",
        "Reward model: loss",
        "nats a pair",
        {"preference_loss": "training", "eval_loss": "test"},
    ),
    (
        "reward",
        "Reward model: accuracy",
        "share of pairs",
        {"accuracy": "training", "eval_accuracy": "test"},
    ),
    (
        "reward",
        "Reward model: margin",
        "chosen - rejected score",
        {"margin": "training", "eval_margin": "test"},
    ),
    (
        "ppo",
        "PPO: score",
        "by the reward model",
        {
            "objective/scores": "training",
            "eval/scores": "held-out",
            "eval/gold_scores": "held-out, by the gold judge",
        },
    ),
    (
        "ppo",
        "PPO: KL to SFT",
        "nats a response",
        {"objective/kl": "training", "eval/kl": "held-out"},
    ),
    (
        "ppo",
        "PPO: length",
        "tokens a response",
        {"val/response_length": "training", "eval/response_length": "held-out"},
    ),
    (
        "ppo",
        "PPO: entropy",
        "nats a token",
        {"policy/entropy_avg": "training", "eval/entropy": "held-out"},
    ),
)
# Of a line, by its label; others are "marked".
STYLES = {"training": "thin", "held-out, by the gold judge": "dashed"}


@dataclass(frozen=True)
class Change:
    """A row about a phase's own evaluation, by the names of its metrics in run.json."""

    phase: str
    what: str
    before: str | None
    after: str
    has_interval: bool = False  # AFTER_low and AFTER_high, 95 %
    is_share: bool = False  # shown in percent


CHANGES = (
    Change("sft", "SFT: loss on test responses", "eval_loss_before", "eval_loss"),
    Change(
        "reward",
        "Reward model: accuracy on test pairs (before: “the longer one wins”)",
        "longer_wins_accuracy",
        "eval_accuracy",
        has_interval=True,
    ),
    Change(
        "reward",
        "Reward model: prefers a refusal, harmful requests of the safety probe",
        None,
        "probe_harmful_accuracy",
        has_interval=True,
        is_share=True,
    ),
    Change(
        "reward",
        "Reward model: prefers help, requests that only sound harmful",
        None,
        "probe_harmless_accuracy",
        has_interval=True,
        is_share=True,
    ),
    Change("ppo", "PPO: mean score of held-out prompts", "sft_scores", "ppo_scores"),
    Change("ppo", "PPO: its gain", None, "score_gain", has_interval=True),
    Change("ppo", "PPO: mean score by the gold reward model", "sft_gold_scores", "ppo_gold_scores"),
    Change("ppo", "PPO: its gain by the gold reward model", None, "gold_gain", has_interval=True),
    Change("ppo", "PPO: KL to SFT, nats a response", "sft_kl", "ppo_kl"),
    Change("ppo", "PPO: response length, tokens", "sft_response_length", "ppo_response_length"),
    Change(
        "ppo",
        "PPO: answers that end in a question",
        "sft_question_share",
        "ppo_question_share",
        is_share=True,
    ),
    Change("ppo", "the same of the chosen answers", None, "chosen_question_share", is_share=True),
    Change(
        "ppo",
        "PPO: answers that begin alike, in the commonest three words",
        "sft_opening_share",
        "ppo_opening_share",
        is_share=True,
    ),
    Change("ppo", "the same of the chosen answers", None, "chosen_opening_share", is_share=True),
    Change(
        "ppo",
        "PPO: would begin with a refusal, harmful requests",
        "sft_refusals",
        "ppo_refusals",
        is_share=True,
    ),
    Change(
        "ppo",
        "PPO: the same, requests that only sound harmful",
        "sft_overrefusals",
        "ppo_overrefusals",
        is_share=True,
    ),
)

Points = Sequence[Sequence[float]]  # (x, y)


def render_page(report: dict[str, Any]) -> str:
    """The HTML of a report, which may also come from compare.json."""
    template = environment().get_template("compare.html.jinja")
    return template.render(
        report=report,
        conclusions=conclusions(report),
        warnings=report.get("warnings") or [],
        probe=report.get("probe") or {},
        facts=facts(report),
        kl=kl(report),
        changes=changes(report),
        panels=panels(report.get("curves") or {}),
        prompts=[entry | best(entry["answers"]) for entry in report["prompts"]],
        axes={"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "bottom": BOTTOM},
        endings=ENDINGS,
        speakers=SPEAKERS,
    )


def environment() -> Environment:
    """Jinja with autoescape; every text also goes through `plain`."""

    def finalize(value: Any) -> Any:
        return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": lambda share: f"{100 * share:.0f} %",
        "short": lambda value: f"{value:.3g}",
    }
    return made


def number(value: Any) -> float | None:
    """`value`, if it is a number that can be drawn, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) < LARGEST else None


# ---------------------------------------------------------------- what was compared, and how


def name_of(place: Any) -> Any:
    """A hub name as it is, but only the last part of a local path: the rest is private."""
    return Path(place).name if isinstance(place, str) and os.path.exists(place) else place


def facts(report: dict[str, Any]) -> dict[str, str]:
    """The settings that a reader needs to know, in words."""
    base = report.get("base")
    flags = report.get("flags")
    found = {}
    if base:
        revision = f" at {str(base['revision'])[:12]}" if base.get("revision") else ""
        found["Base"] = (
            f"{name_of(base['model'])}{revision}, "
            f"{'NF4' if base.get('load_in_4bit') else 'not quantised'}"
        )
    found["Prompts"] = str(len(report["prompts"]))
    if flags:
        test_split = (
            f"from the test split of {name_of(flags['dataset'])}"
            if flags["num_test_prompts"]
            else ""
        )
        chosen = (
            f"from {name_of(flags['prompts'])}"
            if flags["prompts"]
            else "built into compare_outputs.py"
        )
        found["Prompts"] += f" {test_split or chosen}"
        sampling = (
            f"temperature {flags['temperature']:g}, seed {flags['seed']}"
            if flags["temperature"]
            else "greedy"
        )
        found["Decoding"] = f"{sampling}, at most {flags['max_new_tokens']} tokens an answer"
    if report.get("commit"):
        found["Commit"] = str(report["commit"])[:12]
    return found


def metrics_of(report: dict[str, Any], phase: str) -> dict[str, Any]:
    """A phase's metrics in run.json, if they are there."""
    facts = report.get("runs") or {}
    for name in (phase, "metrics"):
        facts = facts.get(name) if isinstance(facts, dict) else None
    return facts if isinstance(facts, dict) else {}


def kl(report: dict[str, Any]) -> dict[str, float]:
    """Each model's KL to SFT, in nats a response; empty unless PPO's run measured it."""
    found = number(metrics_of(report, "ppo").get("ppo_kl"))
    return {} if found is None or "PPO" not in report["models"] else {"SFT": 0.0, "PPO": found}


def changes(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each phase's own evaluation: rows with `what`, `is_share`, and numbers or None.

    The numbers are `before`, `after`, and the interval's `low` and `high`.
    """
    rows = []
    for change in CHANGES:
        metrics = metrics_of(report, change.phase)
        keys = {"before": change.before, "after": change.after}
        if change.has_interval:
            keys |= {end: f"{change.after}_{end}" for end in ("low", "high")}
        row = dict.fromkeys(("before", "after", "low", "high"))
        row |= {name: number(metrics.get(key)) for name, key in keys.items()}
        if row["after"] is not None:
            rows.append({"what": change.what, "is_share": change.is_share} | row)
    return rows


def best(answers: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """`best`: the models with the top score, several if tied; none without scores or rivals."""
    scores = {name: given["score"] for name, given in answers.items() if given["score"] is not None}
    top = max(scores.values(), default=None)
    return {
        "best": [name for name, score in scores.items() if score == top] if len(scores) > 1 else []
    }


# ---------------------------------------------------------------- the training curves


def read_curves(folder: str, phase: str) -> dict[str, Points]:
    """A phase's curves by metric, from `folder`/metrics.jsonl; none if it is missing or damaged."""
    try:
        rows = [row for row in read_jsonl(Path(folder) / "metrics.jsonl") if isinstance(row, dict)]
    except (OSError, ValueError, RecursionError):
        return {}
    curves = {}
    for name in [name for owner, *_, labels in PANELS if owner == phase for name in labels]:
        points = [(number(row.get(X[phase])), number(row.get(name))) for row in rows]
        points = [point for point in points if None not in point]
        if points:
            curves[name] = thin(points)
    return curves


def thin(points: Points) -> Points:
    """At most MAX_POINTS points, each the mean of equally many neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [
        [float(f"{sum(axis) / len(group):.6g}") for axis in zip(*group, strict=True)]
        for group in groups
    ]


def panels(curves: dict[str, dict[str, Points]]) -> list[dict[str, Any]]:
    """The panels that have a curve, ready to draw: `title`, `unit`, and what `draw` returns."""
    drawn = []
    for phase, title, unit, labels in PANELS:
        found = {
            label: points
            for name, label in labels.items()
            if (points := curves.get(phase, {}).get(name))
        }
        if found:
            drawn.append({"title": title, "unit": unit} | draw(found, X[phase]))
    return drawn


def draw(curves: dict[str, Points], x: str) -> dict[str, Any]:
    """`x`, its name; `x_ticks` and `y_ticks`; and `lines`, one per label, in SVG coordinates."""
    all_points = [point for points in curves.values() for point in points]
    (x_low, x_high), (y_low, y_high) = (limits(axis) for axis in zip(*all_points, strict=True))
    across = scale(x_low, x_high, LEFT, RIGHT)
    up = scale(y_low, y_high, BOTTOM, TOP)
    lines = []
    for label, points in curves.items():
        style = STYLES.get(label, "marked")
        places = [(across(x), up(y)) for x, y in points]
        line = {"label": label, "style": style, "first": points[0][1], "last": points[-1][1]}
        line["path"] = " ".join(f"{x},{y}" for x, y in places)
        line["dots"] = places if len(places) == 1 or (style != "thin" and len(places) <= 40) else []
        lines.append(line)
    x_ticks = [(across(value), text) for value, text in ticks(x_low, x_high, whole=True)]
    y_ticks = [(up(value), text) for value, text in ticks(y_low, y_high)]
    return {"x": x, "x_ticks": x_ticks, "y_ticks": y_ticks, "lines": lines}


def limits(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and highest value, with a margin around them if they are the same."""
    low = min(values)
    high = max(values)
    if high - low > 1e-9 * max(1.0, abs(low), abs(high)):
        return low, high
    margin = max(0.5, abs(high) / 10)
    return low - margin, high + margin


def scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """The linear function that maps `low` to `start` and `high` to `end`."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 1)


def ticks(low: float, high: float, whole: bool = False) -> list[tuple[float, str]]:
    """Two to five round numbers from `low` to `high`, with their texts; integers if `whole`."""
    power = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = max(
        (size * power for size in (1, 2, 5) if size * power <= (high - low) / 2), default=power
    )
    step = max(1.0, step) if whole else step
    values = [count * step for count in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(value, f"{round(value, 12):.6g}") for value in values]


def conclusions(report: dict[str, Any]) -> list[str]:
    """What a comparison shows, in words: a sentence for each pair of models, then its notes."""
    return [f"{pair['verdict']}." for pair in report["pairs"]] + report["notes"]
