"""docs/results.md out of the records of results.py: several seeds, in tables and words.

A part whose records are not all there is left out, and says nothing.
"""

from typing import Any

import rlhf  # noqa: F401  before the libraries that it sets up

import numpy as np
import ppo_ablation
import reward_ablation
import rivals_page
from tables import deviations, interval, percent, pooled_interval, seeds, share, signed, span, table

import ppo_train
from compare_outputs import fenced
from rlhf.data.rows import SPEAKERS
from rlhf.runs.statistics import at_equal_length, preference

# Of the chains, of PPO's ablation, of the reward recipe, of the averaged adapters, and of stock.
SEEDS = (0, 1, 2)
ABLATION_SEEDS = (0, 1)  # of the other variants of the reward model
PERCENTILES = (100, 90, 50, 10, 0)  # of the gold gain over SFT: the samples that are shown
PLOTS = {"reward_0/evaluation.png": "reward_evaluation.png"} | {
    f"ppo_{seed}/frontier.png": f"ppo_frontier_{seed}.png" for seed in SEEDS
}
PICTURES = (*PLOTS.values(), rivals_page.PLOT)  # that may stand on the page
Records = dict[str, Any]


# ---------------------------------------------------------------- what came out


def summary(records: Records) -> dict[str, Any]:
    """The numbers of the page that are worked out from several records."""
    found: dict[str, Any] = {}
    if "reward_recipe_0" in records:
        found["reward"] = reward_summary(records)
    if finished(records, "compare"):
        found["wins"] = win_summary(
            [records[f"compare_{seed}"]["answers"] for seed in finished(records, "compare")]
        )
    if "metrics" in records.get("ppo_baseline_0", {}):
        found["ppo_ablation"] = ablation_summary(records)
    rivals = rivals_page.summary(records, SEEDS)
    return found | ({"rivals": rivals} if rivals else {})


def finished(records: Records, step: str) -> list[int]:
    """The seeds whose chains have got to this step."""
    before = {"reward": (), "ppo": ("reward", "gold"), "compare": ("reward", "gold", "ppo")}[step]
    return [seed for seed in SEEDS if all(f"{name}_{seed}" in records for name in (*before, step))]


def reward_summary(records: Records) -> dict[str, Any]:
    """For each variant the means over its seeds, with intervals, beside the recipe's."""
    names = ["half", *reward_ablation.VARIANTS, "averaged", *reward_ablation.STOCK]
    runs = {
        name: [records[key] for seed in SEEDS if (key := f"reward_{name}_{seed}") in records]
        for name in names
    }
    runs = {name: found for name, found in runs.items() if found}
    rows: dict[str, dict[str, Any]] = {name: {"seeds": len(found)} for name, found in runs.items()}
    for part, prefix in (("validation", "validation_"), ("test", "")):
        right = {
            name: marks([run[part] for run in found], "right")
            for name, found in runs.items()
            if part in found[0]
        }
        longer = marks([runs["recipe"][0][part]], "longer")
        for name, values in right.items():
            found = interval("accuracy", values) | interval("above_longer_wins", values, longer)
            if name not in ("recipe", "half"):
                found |= interval("above_recipe", values, right["recipe"])
            for key in (
                "length_balanced_accuracy",
                "eval_loss",
                "calibration_error",
                "score_length_correlation",
            ):
                found[key] = float(np.mean([run[part][key] for run in runs[name]]))
            rows[name] |= {f"{prefix}{key}": value for key, value in found.items()}
    for name, found in runs.items():
        rows[name] |= {
            key: float(np.mean([run[key] for run in found])) for key in ("pairs", "seconds")
        }
    recipe = runs["recipe"][0]
    return {
        "longer_wins": float(longer.mean()),
        "max_length": recipe["config"]["max_length"],
        "variants": rows,
    } | {f"{part}_pairs": recipe[part]["eval_pairs"] for part in ("validation", "test")}


def win_summary(compared: list[dict[str, Any]]) -> dict[str, Any]:
    """PPO's win rate over SFT by the gold models, over all seeds and prompts.

    Also at equal length, and where both ended.
    """
    wins = []
    longer = []
    ended = []
    gains = []
    for answers in compared:
        ppo = answers["PPO"]
        sft = answers["SFT"]
        wins.append(preference(ppo["score"], sft["score"]))
        longer.append(np.subtract(ppo["tokens"], sft["tokens"]))
        ended.append(np.logical_and(ppo["ended"], sft["ended"]))
        gains.append(np.subtract(ppo["score"], sft["score"]))
    wins = np.array(wins)
    longer = np.array(longer)
    ended = np.array(ended)
    equal = at_equal_length(wins, longer)
    found = {"seeds": len(wins), "prompts": wins.shape[1]} | interval("win_rate", wins)
    found |= dict(
        zip(("at_equal_length", "at_equal_length_low", "at_equal_length_high"), equal, strict=True)
    )
    found |= {
        "both_ended": int(ended.sum()),
        "win_rate_where_both_ended": float(wins[ended].mean()),
    }
    correlations = [np.corrcoef(gain, more)[0, 1] for gain, more in zip(gains, longer, strict=True)]
    return found | {"length_correlation": float(np.mean(correlations))}


def ablation_summary(records: Records) -> dict[str, Any]:
    """The gains of each PPO variant, and how far above the baseline's on the same prompts."""
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[dict[str, Any]]] = {}
    for variant in ppo_ablation.VARIANTS:
        found = [records[key] for seed in SEEDS if (key := f"ppo_{variant}_{seed}") in records]
        whole = [run for run in found if "metrics" in run]
        rows[variant] = {
            "failed": [run["failed"] for run in found if "failed" in run],
            "seeds": len(whole),
        }
        if whole:
            runs[variant] = whole
            for key in ("ppo_kl", "ppo_response_length", "ppo_eos_rate", "ppo_entropy"):
                rows[variant][key] = float(np.mean([run["metrics"][key] for run in whole]))
            explained = np.array([run["explained_variance"] for run in whole])  # [runs, updates]
            third = explained.shape[1] // 3
            rows[variant]["explained_variance_first_third"] = float(explained[:, :third].mean())
            rows[variant]["explained_variance_last_third"] = float(explained[:, -third:].mean())
    settings = records["ppo_baseline_0"]["config"]
    metrics = records["ppo_baseline_0"]["metrics"]
    sft = {key: metrics[f"sft_{key}"] for key in ("response_length", "eos_rate", "entropy")}
    summary = {
        "episodes": settings["total_episodes"],
        "prompts": settings["max_eval_samples"],
        "sft": sft,
    }
    for name in ("score", "gold_score"):
        gains = {
            variant: np.array([run["gains"][name] for run in whole])
            for variant, whole in runs.items()
        }
        for variant, found in gains.items():
            rows[variant][f"{name}_gains"] = found.mean(1).tolist()
        others = {
            variant: found for variant, found in gains.items() if variant not in ppo_ablation.SAME
        }
        baseline = np.concatenate(
            [found for variant, found in gains.items() if variant in ppo_ablation.SAME]
        )
        spread = deviations([baseline, *others.values()])
        summary[f"{name}_std"] = float(np.sqrt((spread.mean(1) ** 2).mean()))
        for variant, found in others.items():
            rows[variant] |= pooled_interval(f"{name}_above_baseline", found, baseline, spread)
    return summary | {"variants": rows}


def marks(parts: list[dict[str, Any]], key: str) -> np.ndarray:
    """[runs, pairs]: 1 right, 0.5 a tie, 0 wrong."""
    return np.array([[int(mark) / 2 for mark in part[key]] for part in parts])


# ---------------------------------------------------------------- the page


def markdown(report: dict[str, Any], plots: list[str]) -> str:
    """docs/results.md: of what there is a record, with the plots that are there."""
    records = report["records"]
    found = report["summary"]
    rivals = found.get("rivals", {})
    blocks = header(report, rivals_page.top(rivals, plots))
    if "reward" in found:
        blocks += reward_part(found["reward"])
    if finished(records, "ppo"):
        blocks += chains_part(records, plots)
    if "wins" in found:
        blocks += win_part(records, found["wins"])
    if "ppo_ablation" in found:
        blocks += ablation_part(found["ppo_ablation"])
    blocks += rivals_page.details(rivals, records)
    if "samples" in records:
        blocks += sample_part(records["samples"]["shown"])
    return "\n\n".join([*blocks, *how_part(report)]) + "\n"


def header(report: dict[str, Any], first: list[str]) -> list[str]:
    """The title, what was run, `first`, and a line for each part that follows."""
    return [
        "# Does it learn?",
        f"SmolLM2-135M-Instruct on the first {report['rows']['train']:,} training and "
        f"{report['rows']['test']} test rows of {report['dataset']}, on a CPU, made by `make "
        "results`; every number is in [results.json](results.json). Intervals are 95 %, by "
        "bootstrap over seeds and prompts or pairs; those over two or three seeds are rather too "
        "narrow.",
        *first,
        *(["## The rest in short"] if first else []),
        "\n".join(f"- {line}" for line in headlines(report)),
    ]


def headlines(report: dict[str, Any]) -> list[str]:
    """What came out, a line for the reward model and one for PPO."""
    found = report["summary"]
    records = report["records"]
    lines = []
    variants = found.get("reward", {}).get("variants", {})
    if "half" in variants:
        half = variants["half"]
        lines.append(
            f"Reward models of half the pairs ({half['pairs']:.0f}, {seeds(half)}): accuracy "
            f"{share(half, 'accuracy')} on {found['reward']['test_pairs']} test pairs, "
            f'{signed(half, "above_longer_wins", ".3f")} above "the longer response wins", '
            f"and {share(half, 'validation_accuracy')} on {found['reward']['validation_pairs']} "
            f"validation pairs, {signed(half, 'validation_above_longer_wins', '.3f')} above it."
        )
    if "stock" in variants:
        recipe = variants["recipe"]
        stock = variants["stock"]
        whole = variants.get("stock_epoch")
        lines.append(
            f"On {recipe['pairs']:.0f} pairs ours gets {share(recipe, 'accuracy')} "
            f"({seeds(recipe)}). TRL's stock trainer gets through {stock['pairs']:.0f} of them in "
            f"about that time, to {share(stock, 'accuracy')} ({seeds(stock)}), a difference of "
            f"{signed(stock, 'above_recipe', '.3f')}."
            + (
                f" Given all of them and {whole['seconds'] / recipe['seconds']:.1f} times as "
                f"long, it gets {share(whole, 'accuracy')} ({seeds(whole)})."
                if whole
                else ""
            )
        )
    if "wins" in found:
        wins = found["wins"]
        runs = [records[f"ppo_{seed}"]["metrics"] for seed in finished(records, "ppo")]
        score, gold, kl = (span(runs, key) for key in ("score_gain", "gold_gain", "ppo_kl"))
        lines.append(
            f"PPO, {seeds(wins)}, every one with SFT, reward and gold models of its own: its "
            f"answers win against SFT's on {percent(wins, 'win_rate')} of {wins['prompts']} "
            "held-out prompts by the gold models, which learned from other pairs (at equal "
            f"length {percent(wins, 'at_equal_length')}). Gains: score {score}, gold score "
            f"{gold}; KL {kl} nats; length {span(runs, 'sft_response_length', '.0f')} tokens "
            f"before, {span(runs, 'ppo_response_length', '.0f')} after."
        )
    return lines


def reward_part(reward: dict[str, Any]) -> list[str]:
    head = (
        "",
        "seeds",
        "pairs",
        "validation",
        "against the recipe",
        "test",
        "against the recipe",
        "length-balanced",
        "loss",
    )
    head += ("calibration error", "correlation with length", "seconds of training")
    rows = []
    for name, v in reward["variants"].items():
        cells = [str(v["seeds"]), f"{v['pairs']:.0f}"]
        for prefix in ("validation_", ""):
            cells.append(share(v, f"{prefix}accuracy") if f"{prefix}accuracy" in v else "")
            cells.append(
                signed(v, f"{prefix}above_recipe", ".3f") if f"{prefix}above_recipe" in v else ""
            )
        cells += [
            f"{v[key]:.3f}"
            for key in ("length_balanced_accuracy", "eval_loss", "calibration_error")
        ]
        rows.append((name, *cells, f"{v['score_length_correlation']:.2f}", f"{v['seconds']:.0f}"))
    return [
        "## What makes a better reward model",
        f"One change at a time, on pairs of up to {reward['max_length']} tokens. Validation: "
        f"{reward['validation_pairs']} training rows that no model of this table was trained on, "
        f"by which a recipe may be chosen; what follows is of the {reward['test_pairs']} test "
        "pairs. Length-balanced: pairs whose longer response was chosen and those whose shorter "
        "one was weigh alike, so that length alone gets 0.5. A row of one seed has intervals "
        "over pairs alone. `half` are the chains' reward models, of all pairs of the first half; "
        "`averaged` is one model, the mean of `head_zero`'s adapters over the seeds. `stock` is "
        "`trl reward` at its defaults for about as long as the recipe took, `stock_epoch` for "
        "all pairs; both adapt all layers, the recipe the upper half. Seconds are of the CPUs "
        "that a row ran on, named below. What each variant changes stands in "
        "`experiments/reward_ablation.py`.",
        table(head, rows),
        "Apart from the recipe (the interval is without 0): on validation "
        f"{clear(reward, 'validation_above_recipe', '.3f')}; on test "
        f"{clear(reward, 'above_recipe', '.3f')}. `low_lr` is `reward_train.py`'s own rate, meant "
        "for a model twenty times as large and some 70 times as many pairs.",
    ]


def chains_part(records: Records, plots: list[str]) -> list[str]:
    chains = {seed: records[f"ppo_{seed}"]["metrics"] for seed in finished(records, "ppo")}
    judges = (
        "model",
        "accuracy",
        "longer wins",
        "length-balanced",
        "calibration error",
        "correlation with length",
    )
    rows = [
        (
            f"{name} {seed}",
            share(m, "eval_accuracy"),
            *(
                f"{m[key]:.3f}"
                for key in ("longer_wins_accuracy", "length_balanced_accuracy", "calibration_error")
            ),
            f"{m['score_length_correlation']:.2f}",
        )
        for seed in chains
        for name in ("reward", "gold")
        for m in [records[f"{name}_{seed}"]["metrics"]]
    ]
    head = (
        "seed",
        "score gain",
        "in SFT's std",
        "gold gain",
        "gold, at equal length",
        "KL",
        "tokens",
        "EOS",
        "entropy",
    )
    head += ("repeated 3-grams", "distinct-2")
    runs = [
        (
            str(seed),
            signed(m, "score_gain"),
            f"{m['score_gain'] / m['sft_score_std']:.2f}",
            signed(m, "gold_gain"),
            signed(m, "gold_gain_at_equal_length"),
            f"{m['ppo_kl']:.1f}",
            f"{m['sft_response_length']:.1f} -> {m['ppo_response_length']:.1f}",
            f"{m['sft_eos_rate']:.0%} -> {m['ppo_eos_rate']:.0%}",
            *(
                f"{m[f'sft_{key}']:.2f} -> {m[f'ppo_{key}']:.2f}"
                for key in ("entropy", "repeated_3grams", "distinct_2")
            ),
        )
        for seed, m in chains.items()
    ]
    warned = [f"seed {seed}: {text}" for seed, m in chains.items() for text in m["warnings"]]
    unprobed = [str(seed) for seed, m in chains.items() if "refusal_shift" not in m]
    said = f"Warnings of the runs: {'; '.join(warned) or 'none'}."
    if unprobed:
        said += f" Older than the safety probe, so silent on refusals: seed {', '.join(unprobed)}."
    settings = ", ".join(
        f"{name} {value}"
        for name, value in ppo_ablation.PPO.items()
        if name != "num_printed_samples"
    )
    return [
        "## PPO",
        "Reward models of the first half of all pairs, which PPO trains against, and gold ones "
        "of the second half, on the test pairs. The two differ in pairs, head and adapters; what "
        "they share is the SFT model below them.",
        table(judges, rows),
        *image("the evaluation of reward model 0", "reward_evaluation.png", plots),
        "PPO against the first, the demo's preset with more episodes (commands below) and "
        f"{settings}; the gold one only judges. {next(iter(chains.values()))['eval_prompts']} "
        "held-out prompts, the same sampling seeds before and after; intervals over prompts. The "
        "penalty was chosen on these prompts, after a first run with the script's default of 1 "
        "(in the ablation: `missing_eos_penalty_1`).",
        table(head, runs),
        said,
        *(
            line
            for seed in chains
            for line in image(f"score against KL, seed {seed}", f"ppo_frontier_{seed}.png", plots)
        ),
    ]


def image(what: str, name: str, plots: list[str]) -> list[str]:
    return [f"![{what}]({name})"] if name in plots else []


def win_part(records: Records, wins: dict[str, Any]) -> list[str]:
    rows = [
        (
            str(seed),
            f"{p['first']} against {p['second']}",
            percent(p, "win_rate"),
            percent(p, "at_equal_length"),
            p["verdict"],
        )
        for seed in finished(records, "compare")
        for p in records[f"compare_{seed}"]["pairs"]
    ]
    return [
        f"Win rates by the gold model on {wins['prompts']} held-out prompts, at temperature 0.7; "
        "intervals over prompts:",
        table(("seed", "", "win rate", "at equal length", "in words"), rows),
        f"Over {seeds(wins)} PPO wins against SFT on {percent(wins, 'win_rate')}, at equal length "
        f"on {percent(wins, 'at_equal_length')}, and on {wins['win_rate_where_both_ended']:.0%} "
        f"of the {wins['both_ended']} pairs of answers that both came to an end within the limit. "
        "PPO's gain in gold score and its gain in length correlate by "
        f"{wins['length_correlation']:.2f}.",
    ]


def ablation_part(ablation: dict[str, Any]) -> list[str]:
    rows = []
    for variant, v in ablation["variants"].items():
        if v["seeds"]:
            cells = []
            for name in ("score", "gold_score"):
                cells.append(", ".join(f"{gain:.2f}" for gain in v[f"{name}_gains"]))
                above = f"{name}_above_baseline"
                cells.append(signed(v, above) if above in v else "")
            shown = (
                f"{v['ppo_kl']:.1f}",
                f"{v['ppo_response_length']:.1f}",
                f"{v['ppo_eos_rate']:.0%}",
                f"{v['ppo_entropy']:.2f}",
                f"{v['explained_variance_first_third']:.2f}, "
                f"{v['explained_variance_last_third']:.2f}",
            )
            rows.append((variant, *cells, *shown))
    sft = ablation["sft"]
    cells = (
        "0",
        f"{sft['response_length']:.1f}",
        f"{sft['eos_rate']:.0%}",
        f"{sft['entropy']:.2f}",
        "",
    )
    rows.insert(0, ("the SFT model", "", "", "", "", *cells))
    failed = [
        f"{name} ({text})" for name, v in ablation["variants"].items() for text in v["failed"]
    ]
    compared = len(set(ablation["variants"]) - set(ppo_ablation.SAME))
    usual = ppo_train.Config()
    demo = ppo_train.PRESETS["demo"]
    head = (
        "",
        "score gain, by seed",
        "against the baseline",
        "gold gain, by seed",
        "against the baseline",
        "KL",
        "tokens",
        "EOS",
        "entropy",
        "explained variance",
    )
    return [
        "## What each stabiliser is worth",
        f"One change at a time, {ablation['episodes']} episodes, gains on {ablation['prompts']} "
        "held-out prompts; all from the same SFT, reward and gold model, made by chain 0's "
        "commands, though it may be on another CPU and at an earlier commit than the chain's row "
        "names. `baseline` is the setting of the runs above, shorter. What each variant changes "
        "stands in `experiments/ppo_ablation.py`.",
        table(head, rows),
        "Runs that broke off: " + (", ".join(failed) if failed else "none") + ".",
        f"Apart from the baseline in score: {clear(ablation, 'score_above_baseline')}; in gold "
        f"score: {clear(ablation, 'gold_score_above_baseline')}. Intervals are over "
        "prompts and runs, where runs of any setting spread as those of all: a run's gain "
        f"deviates from its setting's mean by a standard deviation of {ablation['score_std']:.2f} "
        f"in score and {ablation['gold_score_std']:.2f} in gold score. Of {compared} comparisons "
        "one may well be off 0 by chance. `scores_not_centred` is the baseline but for rounding, "
        "and its runs count as the baseline's: the mean that is taken off the scores is taken off "
        "the values too and, with gamma 1 and no score at the clip, leaves the advantages as "
        "they are.",
        "Explained variance is the share of the returns' variance that the values explain, in "
        "the first and in the last third of a run; below 0, a constant would do better. The "
        "value model begins as the reward model, which has learned to judge whole responses and "
        "not their beginnings; `value_from_scratch` begins as a constant. Before the policy "
        f"moves, `ppo_train.py` lets it learn alone for {usual.critic_warmup_updates} updates, "
        f"the demo's preset, and with it the baseline, for {demo.critic_warmup_updates}.",
        "Every variant but `kl_horizon_200` and `missing_eos_penalty_1` leaves one of "
        f"`ppo_train.py`'s defaults. Its KL controller has a horizon of {usual.kl_horizon:,} "
        f"episodes in a run of {usual.total_episodes:,} and so acts within the run, as that of "
        f"`kl_horizon_200` does in these {ablation['episodes']}; the demo's preset, and with it "
        f"the baseline, has {demo.kl_horizon:,} and keeps its coefficient.",
    ]


def clear(part: dict[str, Any], key: str, number_format: str = ".2f") -> str:
    """The variants whose difference `key` has an interval without 0."""
    found = [
        (name, v)
        for name, v in part["variants"].items()
        if key in v and v[f"{key}_low"] * v[f"{key}_high"] > 0
    ]
    return ", ".join(f"`{name}` ({v[key]:+{number_format}})" for name, v in found) or "none"


def sample_part(shown: list[dict[str, Any]]) -> list[str]:
    parts = [
        "## Samples",
        "Prompts of the demo's test split (rm-static's rows are not ours to print), sorted by "
        f"the gold score of PPO's answer less that of SFT's, seed {SEEDS[0]}; shown are the ones "
        f"at these percentiles: {', '.join(map(str, PERCENTILES))}.",
    ]
    for sample in shown:
        answers = sample["answers"]
        gain = answers["PPO"]["score"] - answers["SFT"]["score"]
        lines = [f"{SPEAKERS[role]}: {text}" for role, text in sample["turns"]]
        for name in ("base", "SFT", "PPO"):
            lines.append(
                f"[{name}, gold score {answers[name]['score']:.2f}] {answers[name]['text']}"
            )
        parts += [
            f"Percentile {sample['percentile']}, gain {gain:+.2f}:",
            fenced("\n\n".join(lines)),
        ]
    return parts


def how_part(report: dict[str, Any]) -> list[str]:
    records = report["records"]
    rows = [
        (
            name,
            f"{r['minutes']:.0f}",
            str(r["threads"] or ""),
            r["cpu"],
            (r["commit"] or "")[:9],
            f"`python {r['command']}`",
        )
        for name, r in records.items()
    ]
    left = [name for name in report["steps"] if name not in records]
    return [
        "## How it was made",
        "`make results`; minutes with loading, judging and saving, of as many threads, "
        f"{sum(r['minutes'] for r in records.values()) / 60:.0f} hours in all. A step whose "
        "folder was gone when another needed it was run again on that other's CPU, without a new "
        "row. Commands are as at their commit: what was `benchmarks/reward_ablation.py` and "
        "`benchmarks/ppo_ablation.py` is in `experiments/` now, and `path/to/rm-static` stands for "
        "a local copy.",
        table(("step", "minutes", "threads", "CPU", "commit", "command"), rows),
        *([f"Not run yet: {', '.join(left)}."] if left else []),
    ]
