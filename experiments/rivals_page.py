"""What docs/results.md says of PPO beside RLOO, GRPO and best-of-n, for someone who must choose.

`top` is two screens: what came out, what such runs can show, a table and a plot. `details` are what
it rests on. Both are made of any part of the records, and name a winner only of all of them.
"""

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import rlhf  # noqa: F401  before the libraries that it sets up

import numpy as np
import ppo_ablation
import rivals
from tables import (
    deviations,
    interval,
    paired_interval,
    percent,
    pooled_interval,
    signed,
    table,
)

import ppo_train
from rlhf.runs.statistics import at_equal_length, preference

Records = dict[str, Any]
PLOT = "rivals.png"
NAMES = {"ppo": "PPO", "rloo": "RLOO", "grpo": "GRPO"}
SHIFT = "refusal_shift"  # of the log-odds of refusing the safety probe's harmful requests
LEAST = 0.1  # of gold gain: less is no reason to change a default
# Standard deviations of gold gain by PPO's ablation: of a run's mean, and of a prompt within a run,
# less what all runs have in common.
RUN_STD = 0.05
PROMPT_STD = 0.31
# By `winners_named`: how often a winner is named, by its true lead over both others.
NAMED = {0.0: 0.01, 0.1: 0.31, 0.2: 0.94}
ROWS = (4, 16, 64)  # the n of best-of-n that have a row in the table


# ---------------------------------------------------------------- what came out


def summary(records: Records, all_seeds: tuple[int, ...]) -> dict[str, Any]:
    """Of whatever records there are; {} if none has anything to show."""
    runs = {
        name: {
            seed: records[key]
            for seed in all_seeds
            if "answers" in records.get(key := f"rivals_{name}_{seed}", {})
        }
        for name in rivals.METHODS
    }
    runs = {name: found for name, found in runs.items() if found}
    costs = {
        name: records[key] for name in ("cost", "cost_card") if (key := f"rivals_{name}") in records
    }
    searched = searches(records)
    failed = [
        f"{NAMES[name]}, seed {seed} ({text})"
        for name in rivals.TRAINED
        for seed in all_seeds
        if (text := records.get(f"rivals_{name}_{seed}", {}).get("failed"))
    ]
    if not (runs or failed or costs or searched):
        return {}
    cost = costs.get("cost")
    shares = {name: row["share"] for name, row in searched.items() if "share" in row}
    found: dict[str, Any] = {"seeds": len(all_seeds), "search": searched, "failed": failed}
    found["costs"] = {name: cost_rows(record, shares) for name, record in costs.items()}
    trained = {name: by_seed for name, by_seed in runs.items() if name in rivals.TRAINED}
    found["methods"] = {
        name: row_of(list(by_seed.values())) | price_of_training(name, by_seed, cost, shares)
        for name, by_seed in trained.items()
    }
    in_all = sum(map(len, trained.values())) + len(failed)
    found["complete"] = in_all == len(all_seeds) * len(NAMES)
    # A run that broke off is a result: what is left of its method is too good to be compared.
    whole = {name: by_seed for name, by_seed in trained.items() if len(by_seed) == len(all_seeds)}
    found["whole"] = list(whole)
    if found["complete"] and len(whole) > 1:
        found |= differences(whole)
    if "best_of_n" in runs:
        found["best_of_n"] = best_of_n(runs["best_of_n"], trained, cost)
    return found


def row_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A method's line in the table, from its runs."""
    sft, policy = (
        {name: np.array([run["answers"][who][name] for run in runs]) for name in COLUMNS}
        for who in ("sft", "policy")
    )
    gains = policy["gold_score"] - sft["gold_score"]
    golds = zip(policy["gold_score"], sft["gold_score"], strict=True)
    wins = np.array([preference(ours, theirs) for ours, theirs in golds])
    return {
        **outcome(gains, wins, policy["tokens"] - sft["tokens"]),
        "kl": float(policy["kl"].mean()),
        "tokens": float(policy["tokens"].mean()),
        "sft_tokens": float(sft["tokens"].mean()),
        "path": path_of(runs),
        "ends": [
            {"kl": float(kl.mean()), "gold_gain": float(gain.mean())}
            for kl, gain in zip(policy["kl"], gains, strict=True)
        ],
        SHIFT: [run["metrics"][SHIFT] for run in runs],
    }


COLUMNS = ("gold_score", "tokens", "kl")


def outcome(gains: np.ndarray, wins: np.ndarray, longer: np.ndarray) -> dict[str, Any]:
    """Gold gain and win rate, with intervals, of [seeds, prompts]."""
    equal = at_equal_length(wins, longer)
    names = ("at_equal_length", "at_equal_length_low", "at_equal_length_high")
    return {
        "seeds": len(gains),
        "prompts": gains.shape[1],
        **interval("gold_gain", gains),
        **interval("win_rate", wins),
        **dict(zip(names, equal, strict=True)),
    }


def path_of(runs: list[dict[str, Any]]) -> list[dict[str, float]]:
    """KL and gold gain at each look, as means over the runs."""
    looks = zip(*(run["looks"] for run in runs), strict=False)
    return [
        {
            "kl": float(np.mean([row["eval/kl"] for row in rows])),
            "gold_gain": float(
                np.mean(
                    [
                        row["eval/gold_scores"] - run["looks"][0]["eval/gold_scores"]
                        for row, run in zip(rows, runs, strict=True)
                    ]
                )
            ),
        }
        for rows in looks
    ]


def price_of_training(
    name: str,
    by_seed: dict[int, dict[str, Any]],
    cost: dict[str, Any] | None,
    shares: dict[str, float],
) -> dict[str, Any]:
    """What its updates took, what they were to take, and what an answer costs afterwards.

    Args:
        shares: of each method that was searched, `rivals.share_computed`.
    """
    runs = list(by_seed.values())
    found: dict[str, Any] = {
        "episodes": max(run["episodes"] for run in runs),
        "training_seconds": float(np.mean([spent(run) for run in runs])),
    }
    if cost:
        found["answer_seconds"] = answer_seconds(cost, name)
        found["peak_memory_gib"] = cost["methods"][name]["peak_memory_gib"]
    if cost and name in shares:
        each = rivals.update_seconds(cost, name, shares[name])
        found["nominal_update_seconds"] = each
        found["nominal_seconds"] = max(run["updates"] for run in runs) * each
    return found


def spent(run: dict[str, Any]) -> float:
    """Seconds of all parts of a run's updates; on a CPU, those that it worked."""
    return sum(run["seconds"].values())


def answer_seconds(cost: dict[str, Any], method: str) -> float:
    """To give one answer: sampled, and with best-of-n scored, too."""
    seconds = cost["methods"][method]["seconds"]
    whole = sum(seconds.values()) if method == "best_of_n" else seconds["rollout"]
    return whole / ppo_train.PRESETS["demo"].episodes_per_update


def differences(trained: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """Gold gain of each trained method less that of each other, and the winner, if there is one.

    The runs of a seed share SFT, reward and gold model, so what a seed has in common is taken off;
    what is left of a run says how far runs lie apart. Too few to say so of one method, they are
    pooled over all (`tables.deviations`).
    """
    gains = {
        name: np.array([gains_of(run) for _, run in sorted(by_seed.items())])
        for name, by_seed in trained.items()
    }  # [seeds, prompts]
    of_seed = np.mean(list(gains.values()), axis=0)
    spread = deviations([own - of_seed for own in gains.values()])
    spread = spread * (len(gains) / (len(gains) - 1)) ** 0.5
    found = {}
    for one, other in combinations(sorted(gains, key=lambda name: -gains[name].mean()), 2):
        above = pooled_interval("above", gains[one], gains[other], spread)
        found[f"{one} {other}"] = above
    best = max(gains, key=lambda name: gains[name].mean())
    wins = [above for pair, above in found.items() if pair.split()[0] == best]
    return {
        "differences": found,
        "run_std": float(np.sqrt((spread.mean(1) ** 2).mean())),
        "winner": best if all(above["above_low"] > 0 for above in wins) else None,
    }


def gains_of(run: dict[str, Any]) -> np.ndarray:
    """Gold gain over SFT of each prompt."""
    sft, policy = (np.array(run["answers"][who]["gold_score"]) for who in ("sft", "policy"))
    return policy - sft


def best_of_n(
    pools: dict[int, dict[str, Any]],
    trained: dict[str, dict[int, dict[str, Any]]],
    cost: dict[str, Any] | None,
) -> dict[str, Any]:
    """The curve over every n, rows of some, and which n it takes to match each trained method."""
    found: dict[str, Any] = {
        "curve": [
            {"n": n, "kl": rivals.best_of_n_kl(n), "gold_gain": float(gain)}
            for n, gain in enumerate(curve_of(list(pools.values())), 1)
        ],
        "rows": {},
        "matches": {},
        "above": {},
    }
    known = [
        n for n in map(str, rivals.SHOWN) if all(n in pool["best_of"] for pool in pools.values())
    ]
    for n in known:
        if int(n) in ROWS:
            found["rows"][n] = row_of_best(list(pools.values()), n, cost)
    apart: dict[str, dict[str, np.ndarray]] = {}  # by method and n
    for name, runs in trained.items():
        shared = sorted(pools.keys() & runs.keys())
        if not shared:
            continue
        some = [pools[seed] for seed in shared]
        reached = np.array([gains_of(runs[seed]) for seed in shared])  # [seeds, prompts]
        enough = np.flatnonzero(curve_of(some) >= reached.mean())
        found["matches"][name] = int(enough[0]) + 1 if len(enough) else None
        apart[name] = {n: gains_of_best(some, n) - reached for n in known}
    for n in known if apart else ():
        spread = deviations([of_method[n] for of_method in apart.values()])
        for name, of_method in apart.items():
            above = paired_interval("above", of_method[n], spread)
            found["above"].setdefault(name, {})[n] = above
    return found


def curve_of(pools: list[dict[str, Any]]) -> np.ndarray:
    """[n] gold gain of the best of n, a mean over runs and prompts."""
    gains = [
        np.array(pool["means"]["gold_score"]) - np.mean(pool["answers"]["sft"]["gold_score"])
        for pool in pools
    ]
    return np.mean(gains, axis=0)


def gains_of_best(pools: list[dict[str, Any]], n: str) -> np.ndarray:
    """[seeds, prompts] gold gain of the best of n."""
    return np.array(
        [
            np.subtract(pool["best_of"][n]["gold_score"], pool["answers"]["sft"]["gold_score"])
            for pool in pools
        ]
    )


def row_of_best(pools: list[dict[str, Any]], n: str, cost: dict[str, Any] | None) -> dict[str, Any]:
    """The line of best of n in the table."""
    tokens = np.array([pool["best_of"][n]["tokens"] for pool in pools])
    sft_tokens = np.array([pool["answers"]["sft"]["tokens"] for pool in pools])
    wins = np.array([pool["best_of"][n]["win"] for pool in pools])
    row = outcome(gains_of_best(pools, n), wins, tokens - sft_tokens)
    row |= {"kl": rivals.best_of_n_kl(int(n)), "tokens": float(tokens.mean())}
    if cost:
        row["answer_seconds"] = int(n) * answer_seconds(cost, "best_of_n")
        row["peak_memory_gib"] = cost["methods"]["best_of_n"]["peak_memory_gib"]
    return row


def searches(records: Records) -> dict[str, dict[str, Any]]:
    """What each rate of each method gained on the selection prompts, and which is taken."""
    found: dict[str, dict[str, Any]] = {}
    for name in rivals.TRAINED:
        runs = {
            rate: records[key]
            for rate in rivals.RATES
            if (key := f"rivals_search_{name}_{rate:g}") in records
        }
        if not runs:
            continue
        rows = {
            f"{rate:g}": {
                "gold_gain": rivals.gold_gain(run),
                "kl": run["metrics"]["ppo_kl"],
                "steps_made": rivals.share_made(run),
                "seconds": spent(run),
            }
            if "answers" in run
            else {"failed": run["failed"]}
            for rate, run in runs.items()
        }
        found[name] = {"rates": rows}
        if len(runs) == len(rivals.RATES) and any("answers" in run for run in runs.values()):
            rate = rivals.better_rate(runs)
            found[name] |= {"taken": f"{rate:g}", "share": rivals.share_computed(runs[rate])}
    return found


def cost_rows(cost: dict[str, Any], shares: dict[str, float]) -> dict[str, Any]:
    """Of a device: seconds of an update by phase, beside PPO's, and the updates for its cost."""
    updates = rivals.updates_of(cost, shares) if "ppo" in shares else {}
    ppo = rivals.update_seconds(cost, "ppo")
    rows = {
        name: {
            "seconds": found["seconds"],
            "update_seconds": rivals.update_seconds(cost, name),
            "of_ppo": rivals.update_seconds(cost, name) / ppo,
            "share": shares.get(name),
            "updates": updates.get(name),
            "peak_memory_gib": found["peak_memory_gib"],
            "counted": found["counted"],
        }
        for name, found in cost["methods"].items()
    }
    return {
        "device": cost["device"],
        "threads": cost["threads"],
        "look_seconds_a_prompt": cost["look_seconds_a_prompt"],
        "methods": rows,
    }


# ---------------------------------------------------------------- two screens


def top(found: dict[str, Any], plots: list[str]) -> list[str]:
    """What someone reads who must choose; nothing without a run that counts."""
    heading = "## PPO, RLOO, GRPO or best-of-n?"
    if not (found.get("methods") or found.get("best_of_n")):
        return [heading, verdict(found)] if found.get("failed") else []
    return [
        heading,
        verdict(found),
        power(found),
        main_table(found),
        *([f"![gold score against KL, all methods]({PLOT})"] if PLOT in plots else []),
        *bullets(found),
    ]


def verdict(found: dict[str, Any]) -> str:
    """The winner at equal cost, or that there is none, and what sampling alone would give."""
    failed = found["failed"]
    if not found["complete"]:
        done = sum(row["seeds"] for row in found["methods"].values()) + len(failed)
        broken = f" Broken off: {'; '.join(failed)}." if failed else ""
        return (
            f"**Not decided:** {done} of {found['seeds'] * len(NAMES)} training runs are in, and "
            f"no winner is named before the last.{broken}"
        )
    whole = found["whole"]
    broken = (
        f" Broken off: {'; '.join(failed)}. A method with such a run cannot win." if failed else ""
    )
    if not whole:
        return f"**No winner:** no method has finished all its runs.{broken}"
    best = max(whole, key=lambda name: found["methods"][name]["gold_gain"])
    rest = broken + beside_sampling(found, best)
    if len(whole) == 1:
        return f"**No winner:** only {NAMES[best]} has finished all its runs.{rest}"
    pairs = {
        pair.split()[1]: found["differences"][pair]
        for pair in found["differences"]
        if pair.split()[0] == best
    }
    apart = ", ".join(
        f"{signed(above, 'above')} above {NAMES[other]}" for other, above in pairs.items()
    )
    if not found["winner"]:
        alike = [best, *(name for name in pairs if pairs[name]["above_low"] <= 0)]
        names = [NAMES[name] for name in whole if name in alike]
        behind = [NAMES[name] for name in pairs if name not in alike]
        told = f"; {behind[0]} is behind {NAMES[best]}" if behind else ""  # two of three are alike
        return (
            f"**At equal cost the table cannot tell {', '.join(names[:-1])} and {names[-1]} "
            f"apart{told}.** The highest gold gain is {NAMES[best]}'s, {apart}; an interval with 0 "
            f"in it is no difference.{rest}"
        )
    short = min(above["above"] for above in pairs.values()) < LEAST
    little = f" That is less than the {LEAST} on which a default would move." if short else ""
    return f"**At equal cost {NAMES[best]} wins:** its gold gain is {apart}.{little}{rest}"


def beside_sampling(found: dict[str, Any], name: str) -> str:
    """A sentence: whether the best of the most answers gains more than a trained method."""
    above = found.get("best_of_n", {}).get("above", {}).get(name)
    if not above:
        return ""
    n = max(above, key=int)
    row = above[n]
    gains = "cannot be told apart from it"
    if row["above_low"] > 0:
        gains = "gains more"
    if row["above_high"] < 0:
        gains = "gains less"
    return (
        f" Best of {n}, which trains nothing but samples {n} answers at every use, {gains}: "
        f"{signed(row, 'above')} above {NAMES[name]}."
    )


def power(found: dict[str, Any]) -> str:
    """What so few runs can show, before anyone reads the table."""
    runs = found["seeds"]
    least = 1.96 * RUN_STD * (2 / runs) ** 0.5
    here = f", in these runs {found['run_std']:.2f}" if "run_std" in found else ""
    return (
        f"What {runs} seeds can show: a run's gold gain has a standard deviation of {RUN_STD} (by "
        f"the ablation below{here}), so two means of {runs} runs differ by up to {least:.2f} by "
        "chance. Of simulated methods that lead both others by 0.1, "
        f"{NAMED[0.1]:.0%} are named the winner, of those that lead by 0.2, {NAMED[0.2]:.0%}; if "
        f"none leads, one is named in {NAMED[0.0]:.0%}. No default moves on less than {LEAST}."
    )


def winners_named(lead: float, trials: int) -> float:
    """The share of simulated comparisons, of three seeds and 128 prompts, that name a winner.

    Args:
        lead: of one method over both others, in gold gain; the rest is `RUN_STD` and `PROMPT_STD`.
    """
    random = np.random.default_rng(0)
    named = 0
    for _ in range(trials):
        gains = random.normal(0, RUN_STD, (3, 3, 1)) + random.normal(0, PROMPT_STD, (3, 3, 128))
        gains[0] += lead  # [methods, seeds, prompts]
        runs = {
            name: {
                seed: {
                    "answers": {
                        "sft": {"gold_score": np.zeros(128)},
                        "policy": {"gold_score": gain},
                    }
                }
                for seed, gain in enumerate(of_seeds)
            }
            for name, of_seeds in zip(NAMES, gains, strict=True)
        }
        named += differences(runs)["winner"] is not None
    return named / trials


def main_table(found: dict[str, Any]) -> str:
    head = (
        *("method", "seeds", "gold gain", "win rate over SFT", "at equal length", "KL"),
        *("tokens", "training", "an answer", "peak memory"),
    )
    rows = [
        (NAMES[name], *cells_of(row), *price_cells(row)) for name, row in found["methods"].items()
    ]
    for n, row in found.get("best_of_n", {}).get("rows", {}).items():
        rows.append((f"best of {n}", *cells_of(row), *price_cells(row)))
    return table(head, rows)


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["seeds"]),
        signed(row, "gold_gain"),
        percent(row, "win_rate"),
        percent(row, "at_equal_length"),
        f"{row['kl']:.1f}",
        f"{row['tokens']:.0f}",
    )


def price_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Minutes to train, seconds an answer, GiB at the peak; blank if not measured."""
    training = "none"
    if "training_seconds" in row:
        nominal = f" of {row['nominal_seconds'] / 60:.0f}" if "nominal_seconds" in row else ""
        training = f"{row['training_seconds'] / 60:.0f}{nominal} min"
    if "answer_seconds" not in row:
        return training, "", ""
    return (
        training,
        f"{row['answer_seconds']:.2f} s",
        f"{row['peak_memory_gib']:.1f} GiB",
    )


def bullets(found: dict[str, Any]) -> list[str]:
    """How to read the table, and what training gives that sampling does not."""
    lines = [
        "Gold gain and win rate are against SFT's answers to "
        f"{prompts_of(found)} test prompts, by a gold model that learned from other "
        "pairs than the reward model. At equal length: the win rate if both answers were equally "
        "long. KL: nats an answer away from SFT. In the plot a line is the mean over the "
        "seeds at each look, a diamond a run's end."
    ]
    if found["costs"].get("cost"):
        cost = found["costs"]["cost"]
        lines.append(
            f"Training: minutes of CPU ({cost['device']}) that a run's updates took, of those "
            f"planned, which are what PPO's {rivals.EPISODES:,} episodes cost "
            f"({episodes_of(found)} episodes{spent_of_ppo(found)}). The search of the learning "
            "rate is not counted, here or where training has paid. An answer: seconds of CPU to "
            "sample it, and with best-of-n to score it."
        )
        lines += ratio_lines(found["costs"])
    if "best_of_n" in found:
        lines += sampling_lines(found)
    if found["methods"]:
        lines.append(refusal_line(found["methods"]))
    return ["\n".join(f"- {line}" for line in lines)]


def prompts_of(found: dict[str, Any]) -> int:
    rows = [*found["methods"].values(), *found.get("best_of_n", {}).get("rows", {}).values()]
    return rows[0]["prompts"]


def episodes_of(found: dict[str, Any]) -> str:
    return ", ".join(f"{NAMES[name]} {row['episodes']:,}" for name, row in found["methods"].items())


def spent_of_ppo(found: dict[str, Any]) -> str:
    """What the updates of each method took beside PPO's: equal cost is planned, not enforced."""
    rows = found["methods"]
    others = [name for name in rows if name != "ppo"]
    if "ppo" not in rows or not others:
        return ""
    ppo = rows["ppo"]["training_seconds"]
    ratios = (f"{NAMES[name]} {rows[name]['training_seconds'] / ppo:.2f}" for name in others)
    return f"; times PPO's minutes: {', '.join(ratios)}"


def ratio_lines(costs: dict[str, Any]) -> list[str]:
    """What an update without a critic costs, beside PPO's, on each device that was measured."""
    parts = []
    for cost in costs.values():
        rows = cost["methods"]
        ratios = " and ".join(
            f"{NAMES[name]}'s {rows[name]['of_ppo']:.2f}" for name in ("rloo", "grpo")
        )
        memory = rows["rloo"]["peak_memory_gib"] / rows["ppo"]["peak_memory_gib"]
        parts.append(
            f"{ratios} of PPO's on {cost['device']}, with {memory:.2f} of its memory at the peak"
        )
    lines = [f"Without a critic an update of as many episodes costs {'; '.join(parts)}."]
    if "cost_card" not in costs:
        lines[0] += " On a card it was not measured."
    return lines


def sampling_lines(found: dict[str, Any]) -> list[str]:
    """Training against sampling: what n matches each method, and when training has paid."""
    best = found["best_of_n"]
    lines = []
    for name, row in found["methods"].items():
        if name not in best["matches"]:
            continue
        n = best["matches"][name]
        above = best["above"][name]
        if n is None:
            most = max(above, key=int)
            less = f"which gains {signed(above[most], 'above')} above it"
            lines.append(
                f"{NAMES[name]}'s gold gain is out of reach for best of {most}, {less}: training "
                "gives what sampling does not."
                if above[most]["above_high"] < 0
                else f"{NAMES[name]}'s gold gain is not reached by best of {most}, {less}: within "
                "the interval, it may be."
            )
            continue
        line = (
            f"{NAMES[name]}'s gold gain is that of about best of {n}{bounds(above)}, at a KL of "
            f"{rivals.best_of_n_kl(n):.1f} in place of {row['kl']:.1f}."
        )
        per_answer = found["costs"].get("cost", {}).get("methods", {}).get("best_of_n")
        if per_answer and "training_seconds" in row:
            single = per_answer["update_seconds"] / ppo_train.PRESETS["demo"].episodes_per_update
            saved = n * single - row["answer_seconds"]
            if saved > 0:
                line += (
                    f" Its training has paid after about {row['training_seconds'] / saved:,.0f} "
                    "answers."
                )
        lines.append(line)
    return lines


def refusal_line(methods: dict[str, Any]) -> str:
    """What training on helpfulness alone does to refusals."""
    times = ", ".join(f"{NAMES[name]} {span_of_odds(row[SHIFT])}" for name, row in methods.items())
    return (
        "Trained on helpfulness alone, the models refuse the harmful requests of the "
        "[safety probe](data.md#the-safety-probe) at so many times SFT's odds, lowest to "
        f"highest run: {times}."
    )


def span_of_odds(shifts: list[float]) -> str:
    """The range over the runs of a change of log-odds, as a factor on the odds."""
    return " to ".join(dict.fromkeys(f"{math.exp(s):.2f}" for s in (min(shifts), max(shifts))))


def bounds(above: dict[str, dict[str, float]]) -> str:
    """Between which n the one lies that matches a method, by the intervals of those shown."""
    fewer = [int(n) for n, row in above.items() if row["above_high"] < 0]
    more = [int(n) for n, row in above.items() if row["above_low"] > 0]
    if fewer and more:
        return f" (between {max(fewer)} and {min(more)})"
    if fewer:
        return f" (more than {max(fewer)})"
    return f" (fewer than {min(more)})" if more else ""


# ---------------------------------------------------------------- details


def details(found: dict[str, Any], records: Records) -> list[str]:
    """What the two screens rest on: cost by phase, the search, and every run."""
    if not found:
        return []
    settings = ", ".join(
        f"{name} {value}"
        for name, value in ppo_ablation.PPO.items()
        if name != "num_printed_samples"
    )
    blocks = [
        "## PPO and its rivals, in detail",
        "All start from the chains below: SFT, reward and gold model of the same seed. All train "
        f"with the demo's preset and {settings}, on the same prompts, with the same loss, and with "
        "the KL penalty in the reward; what differs is where the advantage comes from. PPO has a "
        "critic, which learns alone in the first update. RLOO and GRPO draw "
        f"{rivals.GROUP} answers a prompt, so they see one prompt for {rivals.GROUP} of PPO's: "
        "RLOO takes the mean of the others off an answer's return, GRPO the group's, and divides "
        "by its standard deviation, so that near-ties weigh as much as clear differences. An "
        "answer's return is its score less the KL penalty of all its "
        "tokens, and its advantage is the same at each; neither is whitened, so RLOO's gradients "
        "are the smallest, and the `eps` of AdamW, 1e-5, takes the most off its steps. Everything "
        "but the rate was set for PPO, and the penalty for an answer without EOS was chosen on the "
        "test prompts, before RLOO and GRPO were tried: if that favours one, it is PPO. Best-of-n "
        "draws "
        f"{rivals.DRAWS} answers a prompt from the SFT model, once; the reward model chooses, with "
        "the penalty for an answer without EOS taken off its score as in training, the gold model "
        "judges, and every n up to that follows by exact order statistics. Its KL is "
        "ln n - (n - 1) / n, the most that it can be. What each run does stands in "
        "`experiments/rivals.py`.",
    ]
    blocks += cost_part(found["costs"])
    blocks += search_part(found["search"])
    blocks += run_part(found, records)
    return blocks


def cost_part(costs: dict[str, Any]) -> list[str]:
    blocks = []
    for cost in costs.values():
        rows = [
            (
                NAMES.get(name, "best-of-n"),
                *(
                    f"{row['seconds'][part]:.1f}" if part in row["seconds"] else ""
                    for part in ("rollout", "measure", "optimise")
                ),
                f"{row['update_seconds']:.1f}",
                f"{row['of_ppo']:.2f}",
                "" if row["share"] is None else f"{row['share']:.0%}",
                str(row["updates"] or ""),
                f"{row['peak_memory_gib']:.2f}",
            )
            for name, row in cost["methods"].items()
        ]
        head = (
            *("", "rollout", "measure", "optimise", "all", "of PPO's"),
            *("minibatches in the search", "updates for PPO's cost", "peak memory, GiB"),
        )
        counted = next(iter(cost["methods"].values()))["counted"]
        threads = f"{cost['threads']} thread{'s' * (cost['threads'] != 1)}"
        size = ppo_train.PRESETS["demo"].episodes_per_update
        blocks += [
            f"Cost on {cost['device']}, {threads}: seconds of an update of {size} "
            f"episodes, of best-of-n of {size} answers sampled and scored. Medians of {counted} "
            "updates from the start of training, in processes that took turns; on a CPU, seconds "
            "of processor time. All are timed on the same prompts, PPO's, with one answer to each, "
            "and no update ends early. Where the search took a rate at which `kl_stop` ends "
            "updates early, `optimise` counts by the share of minibatches that were computed "
            "there. A look at held-out prompts is no part of it, and costs "
            f"{cost['look_seconds_a_prompt']:.2f} s a prompt. PPO's first update trains the critic "
            "alone, but counts as a whole one. Each answer reads its prompt anew: "
            "read once for all answers to it, RLOO, GRPO and best-of-n would be cheaper.",
            table(head, rows),
        ]
    return blocks


def search_part(searched: dict[str, dict[str, Any]]) -> list[str]:
    rows = []
    for name, found in searched.items():
        for rate, row in found["rates"].items():
            cells = (
                (f"broke off: {row['failed']}", "", "", "")
                if "failed" in row
                else (
                    f"{row['gold_gain']:+.2f}",
                    f"{row['kl']:.1f}",
                    f"{row['steps_made']:.0%}",
                    f"{row['seconds'] / 60:.0f}",
                )
            )
            rows.append((NAMES[name], rate, *cells, "yes" if found.get("taken") == rate else ""))
    if not rows:
        return []
    text = (
        f"The learning rate: {rivals.SEARCH_EPISODES} episodes at seed 0, judged by the gold model "
        "on prompts cut from the train split, which no PPO, RLOO or GRPO run trains on. The test "
        "prompts had no part in it. One run a rate, so what is less than the deviation of a run "
        "apart is chance."
    )
    highest = f"{max(rivals.RATES):g}"
    if all(searched.get(name, {}).get("taken") == highest for name in NAMES):
        text += (
            f" All take {highest}, the highest that was tried and the demo's own: it is the "
            "grid's edge, and a still higher rate may be better for any of them."
        )
    head = ("method", "learning rate", "gold gain", "KL", "steps made", "minutes", "taken")
    return [text, table(head, rows)]


def run_part(found: dict[str, Any], records: Records) -> list[str]:
    rows = []
    for name in found["methods"]:
        for seed in range(found["seeds"]):
            run = records.get(f"rivals_{name}_{seed}", {})
            if "answers" not in run:
                continue
            m = run["metrics"]
            nominal = found["methods"][name].get("nominal_update_seconds")
            rows.append(
                (
                    *(NAMES[name], str(seed), f"{run['episodes']:,}", f"{run['learning_rate']:g}"),
                    signed(m, "score_gain"),
                    signed(m, "gold_gain"),
                    f"{m['ppo_kl']:.1f}",
                    f"{m['sft_response_length']:.1f} -> {m['ppo_response_length']:.1f}",
                    f"{m['sft_eos_rate']:.0%} -> {m['ppo_eos_rate']:.0%}",
                    odds(m),
                    f"{rivals.share_made(run):.0%}",
                    f"{spent(run) / 60:.0f}",
                    f"{run['updates'] * nominal / 60:.0f}" if nominal else "",
                    f"{run['peak_memory_gib']:.1f}",
                    f"{run['accuracy']['reward']:.3f}, {run['accuracy']['gold']:.3f}",
                )
            )
    broken = [f"Broken off: {'; '.join(found['failed'])}."] if found["failed"] else []
    if not rows:
        return broken
    head = (
        *("method", "seed", "episodes", "learning rate", "score gain", "gold gain", "KL", "tokens"),
        *("EOS", "odds of refusing", "steps made", "minutes", "nominal", "memory, GiB"),
        "accuracy of reward and gold model",
    )
    warned = [
        f"{NAMES[name]}, seed {seed}: {text}"
        for name in found["methods"]
        for seed in range(found["seeds"])
        for text in records.get(f"rivals_{name}_{seed}", {}).get("metrics", {}).get("warnings", [])
    ]
    blocks = [
        "Every run; intervals over prompts. The odds of refusing harmful requests are times "
        "SFT's, with an interval over the requests. Steps made are those that `kl_stop` left. "
        "Minutes are those that the updates took, on a CPU those that it worked; nominal ones "
        "follow from the measured cost, by which the runs are equally long.",
        table(head, rows),
        f"Warnings of the runs: {'; '.join(warned) or 'none'}.",
    ]
    if found.get("differences"):
        apart = [
            (NAMES[one], NAMES[other], signed(above, "above"))
            for pair, above in found["differences"].items()
            for one, other in [pair.split()]
        ]
        blocks += [
            "Gold gain of one less that of another, with intervals over prompts and runs. What the "
            "runs of a seed have in common is taken off, and runs of any method spread as those of "
            f"all, by a standard deviation of {found['run_std']:.2f}.",
            table(("", "less", "difference"), apart),
        ]
    above = found.get("best_of_n", {}).get("above", {})
    if above:
        blocks.append(
            "Best of n less each method, in gold gain, intervals over prompts and runs; by such "
            "ones it is said above between which n a method lies: "
            + "; ".join(
                f"best of {n} less {NAMES[name]} {signed(row, 'above')}"
                for name in NAMES
                if name in above
                for n, row in above[name].items()
                if int(n) in ROWS
            )
            + "."
        )
    return blocks + broken


def odds(m: dict[str, float]) -> str:
    """A run's odds of refusing harmful requests, in SFT's."""
    middle, low, high = (math.exp(m[f"{SHIFT}{end}"]) for end in ("", "_low", "_high"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


# ---------------------------------------------------------------- the plot


def can_plot(summary: dict[str, Any]) -> bool:
    found = summary.get("rivals", {})
    return bool(found.get("methods") or found.get("best_of_n"))


def plot(found: dict[str, Any], picture: Path) -> None:
    """Gold gain against KL: best-of-n's curve, each method's way, and where each run ended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    curve = found.get("best_of_n", {}).get("curve", [])
    if curve:
        kl, gain = ([point[name] for point in curve] for name in ("kl", "gold_gain"))
        axis.plot(kl, gain, color="0.35", label="best of n")
        for point in curve:
            if point["n"] in rivals.SHOWN:
                axis.plot(point["kl"], point["gold_gain"], "o", color="0.35", markersize=3)
                axis.annotate(
                    str(point["n"]),
                    (point["kl"], point["gold_gain"]),
                    xytext=(0, 5),
                    textcoords="offset points",
                    ha="center",
                    fontsize=7,
                    color="0.35",
                )
    for number, (name, row) in enumerate(found.get("methods", {}).items()):
        kl, gain = ([point[key] for point in row["path"]] for key in ("kl", "gold_gain"))
        axis.plot(kl, gain, ".-", color=f"C{number}", linewidth=1, alpha=0.7)
        ends = [[point[key] for point in row["ends"]] for key in ("kl", "gold_gain")]
        axis.plot(*ends, "D", color=f"C{number}", markersize=5, label=f"{NAMES[name]}, each seed")
    axis.axhline(0, color="k", linewidth=0.8)
    axis.set(
        xlabel="KL to SFT, nats a response",
        ylabel="gold gain over SFT",
        title="Held-out gold score against KL",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(picture, dpi=130, format="png")
