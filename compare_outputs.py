"""Phase 4: base, SFT and PPO answer the same prompts, side by side, from one loaded base.

In: `checkpoints/sft`, and `checkpoints/reward` and `checkpoints/ppo` if they are there. Out: the
comparison on the terminal, and the same in `reports/compare.md`, `reports/compare.html` (with the
training curves) and `reports/compare.json`.

1. Load the base as the SFT checkpoint says (NF4 or 16 bit), with the adapters of all trained
   phases.
2. Let each model answer: the base with all adapters off, SFT, and PPO; greedy, or with the same
   draws for all.
3. Score every answer with the reward model. Sum up scores, lengths, endings and repetition. For
   each pair of models, give the win rate with its interval, over all prompts and at equal length,
   and say in words what it shows.
4. Ask each model how it would begin to answer the safety probe's requests (rlhf/reports/probe.py).

    python compare_outputs.py
    python compare_outputs.py --preset demo
    python compare_outputs.py --num-test-prompts 200 --show 4 --reward-checkpoint checkpoints/gold
"""

import itertools
import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import rlhf  # noqa: F401  before the libraries that it sets up

from rich.table import Table
from rich.text import Text

from rlhf.data.files import has_rows, open_text, parse_columns, read_rows
from rlhf.data.format import PromptFormat, tokenize_prompt
from rlhf.data.rows import SPEAKERS, BadRow, parse_dialogue, parse_row
from rlhf.data.sources import load_rows, report_drops
from rlhf.data.style import distinct_2, repeated_3grams, style_of
from rlhf.engine.base import same_base
from rlhf.engine.generation import ENDINGS
from rlhf.engine.loading import load_base
from rlhf.engine.roles import SharedBase
from rlhf.engine.tokenizers import load_format
from rlhf.ppo.reward_function import RewardFunction, facts_of, load_reward_function
from rlhf.reports.answers import (
    Answer,
    Report,
    Turns,
    answers_of,
    check_lengths,
    load_models,
    read_runs,
    role_of,
)
from rlhf.reports.page import conclusions, read_curves, render_page
from rlhf.reports.probe import KINDS, OPENING_TOKENS, load_probe, refusal_odds
from rlhf.runs.checkpoints import git_commit
from rlhf.runs.checks import check_numbers, check_weight
from rlhf.runs.cli import run
from rlhf.runs.device import choose_dtype, device
from rlhf.runs.errors import UserError
from rlhf.runs.folders import place_of
from rlhf.runs.run_warnings import compare_warnings, refusal_warnings, said_before
from rlhf.runs.statistics import at_equal_length, mean_interval, preference, wilson_interval
from rlhf.runs.terminal import console, plain
from rlhf.runs.trained_prompts import report_overlap, trained_by


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "checkpoints/sft"  # sets base model, precision and prompt format
    # scores the answers; without it there are no scores and no win rates
    reward_checkpoint: str = "checkpoints/reward"
    ppo_checkpoint: str = "checkpoints/ppo"  # without it, base and SFT are compared
    base_model: str | None = None  # where the base is now, if it was moved after SFT
    # the one that PPO was trained with, as file.py:function; never taken from a checkpoint
    reward_function: str | None = None
    reward_weight: float = 1.0  # of the reward model's score beside it
    output_dir: str = "reports"  # folder of compare.md, compare.html and compare.json
    overwrite: bool = False  # replace any of these three

    # text file with a prompt a line, or rows (.jsonl, .csv); None: PROMPTS
    prompts: str | None = None
    num_test_prompts: int = 0  # use the first N test prompts of `dataset`; 0: use `prompts`
    # hub id, folder, .jsonl, .json, .csv (also .gz or .zst) or .parquet
    dataset: str = "Dahoas/rm-static"
    # renames columns, here and in `prompts`: prompt=question,chosen=good
    columns: str | None = None
    show: int = 8  # prompts to print; the files hold all

    max_prompt_length: int = 384  # tokens; longer prompts lose their oldest turns
    max_new_tokens: int = 128  # most tokens of an answer
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of the draws at temperature > 0
    batch_size: int = 8  # prompts answered or scored together
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # what the base computes in
    preset: Literal["demo"] | None = None  # a named set of values; flags override it


FIRST = (  # flags that --help shows first
    *("sft_checkpoint", "reward_checkpoint", "ppo_checkpoint", "output_dir", "overwrite"),
    *("prompts", "num_test_prompts", "dataset", "columns", "show", "max_new_tokens", "temperature"),
)
PRESETS = {
    "demo": Config(
        sft_checkpoint="runs/demo/sft",
        reward_checkpoint="runs/demo/reward",
        ppo_checkpoint="runs/demo/ppo",
        output_dir="runs/demo/reports",
        num_test_prompts=80,
        dataset="demo/data",
        max_prompt_length=128,
        max_new_tokens=64,
        batch_size=40,
    )
}

PROMPTS = (
    "Explain what attention mechanism is.",
    "How do I boil an egg so that the yolk stays soft?",
    "Why is the sky blue?",
    "What can I do to fall asleep faster?",
    "My coworker takes credit for my work. What should I say to them?",
    "How can I read my girlfriend's text messages without her knowing?",
    "Write a short poem about the sea.",
    "Hi! How are you today?",
)

RULE = "─" * 80
FILES = ("compare.md", "compare.html", "compare.json")
COLUMNS = (
    "Model",
    "Mean\nscore",
    "Mean\ntokens",
    "Ended\nby EOS",
    "Repeated\n3-grams",
    "Distinct\n2-grams",
)
COLUMNS += ("End\nin ?", "Begin\nalike")
SHARES = (  # the last columns
    *("ended_by_eos", "repeated_3grams", "distinct_2grams"),
    *("question_share", "opening_share"),
)
PROBE_TITLE = "Safety probe: which of two written answers a model would begin"
PROBE_COLUMNS = (
    "Would begin with a refusal",
    "Harmful requests\n(95 % interval)",
    "Harmless ones\n(95 % interval)",
)
PAIR_COLUMNS = ("Who wins", "Win rate\n(95 % interval)", "At equal length\n(95 % interval)")
OWN_JUDGE = (
    "The judge is the reward model that PPO trained against: PPO's win rate says that it learned "
    "to please it, not that people agree. Name a judge of other pairs with --reward-checkpoint."
)
OTHER_JUDGE = "The judge is not the reward model that PPO trained against."
MODEL_ADDED = (
    "PPO was trained with --reward-weight 0, against its reward function alone. These scores count "
    "a reward model."
)
MODEL_LEFT_OUT = "PPO was trained with a reward model. These scores leave it out."
OWN_FUNCTION = (
    "The judge is the reward function that PPO trained against: PPO's win rate says that it "
    "learned to please it, not that people agree."
)
OTHER_FUNCTION = "PPO was trained with another reward function."
FUNCTION_ADDED = "PPO was trained without a reward function."
FUNCTION_LEFT_OUT = (
    "PPO was trained with a reward function. These scores leave it out, as --reward-function did "
    "not name it."
)
CHOSEN = "The gold model chose which of PPO's policies to keep, by prompts from the train split."
REPORTED = ("adapter_sha256", "epochs", "updates", "metrics")  # of each phase's run.json

Odds = dict[str, list[float]]  # by kind of request, log-odds of beginning with a refusal


def main(config: Config) -> None:
    check_flags(config)
    folders = {
        "sft": config.sft_checkpoint,
        "reward": config.reward_checkpoint,
        "ppo": config.ppo_checkpoint,
    }
    function = load_reward_function(config.reward_function)
    runs = read_runs(folders)
    check_reports(config)
    warned = said_before(runs)
    print_warnings(warned + unused_flags(config))

    dtype = choose_dtype(config.dtype, device())
    base = same_base(runs["sft"], config.sft_checkpoint, config.base_model)
    prompt_format = load_format(config.sft_checkpoint, runs["sft"])
    titles = model_titles(base["model"], runs)
    prompts = read_prompts(config, prompt_format)
    check_lengths(base, [ids for _, ids in prompts], config.max_new_tokens)
    overlap: list[str] = []
    if config.num_test_prompts:
        seen = trained_by({phase: folders[phase] for phase in runs})
        overlap = report_overlap((turns for turns, _ in prompts), seen)

    # 1. One base for all models.
    model = load_base(base, dtype, prompt_format.pad_token_id)
    shared = load_models(model, folders, runs, dtype)

    # 2. to 4.
    answers = {}
    for name in titles:
        with console.status(f"{name} answers {len(prompts)} prompts"):
            answers[name] = answer(config, shared, prompt_format, prompts, name, "reward" in runs)
        if function:
            add_scores(answers[name], function, config.reward_weight, prompts, prompt_format)
    with console.status("the safety probe"):
        odds = ask_probe(config, shared, prompt_format, list(titles))
    report = {
        "models": titles,
        "base": base,
        "flags": asdict(config),
        "runs": {
            phase: {key: run[key] for key in REPORTED if key in run} for phase, run in runs.items()
        },
        "commit": git_commit(),
        **findings(answers, odds, overlap + warned),
        "held_out": bool(config.num_test_prompts) and not overlap,
        "notes": notes(runs, function, config.reward_weight),
        "prompts": [
            {"turns": turns, "answers": {name: answers[name][i] for name in titles}}
            for i, (turns, _) in enumerate(prompts)
        ],
        "curves": {phase: read_curves(folders[phase], phase) for phase in runs},
    }
    print_report(report, config.show)
    write_reports(Path(config.output_dir), report)
    print(f"Saved {', '.join(f'{config.output_dir}/{name}' for name in FILES)}.\n")
    for line in closing(report):
        print(wrap(line))


# ---------------------------------------------------------------- what is compared


def check_flags(config: Config) -> None:
    """Raise UserError for flags that are out of range or do not go together."""
    if config.prompts is not None and config.num_test_prompts:
        raise UserError("--prompts and --num-test-prompts both say what to ask: give one of them")
    parse_columns(config.columns)
    check_numbers(vars(config))
    check_weight(config.reward_weight, config.reward_function)


def check_reports(config: Config) -> None:
    """Refuse, before the model loads, to replace a comparison or to use a read-only folder."""
    folder = place_of(config.output_dir)
    there = [str(folder / name) for name in FILES if (folder / name).exists()]
    if there and not config.overwrite:
        raise UserError(
            f"{there[0]} exists: add --overwrite to replace it, or choose another --output-dir"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output-dir {folder} cannot be made ({error.strerror}): choose another"
        ) from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output-dir {folder} cannot be written to: choose another")


def model_titles(base_model: str, runs: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The headings of the models to compare, in order: base, SFT, PPO."""
    base = re.sub(r"[^\w.+ -]", "_", Path(base_model).name)  # the name goes into Markdown as it is
    epochs = runs["sft"]["epochs"]
    titles = {
        "base": f"🔵 BASE MODEL ({base} - No Fine-tuning)",
        "SFT": f"🟢 FINE-TUNED SFT MODEL (After {epochs:g} Epoch{'s' * (epochs != 1)} of Training)",
    }
    if "ppo" in runs:
        updates = runs["ppo"]["updates"]
        titles["PPO"] = f"🟣 PPO MODEL (After {updates:g} PPO Update{'s' * (updates != 1)})"
    return titles


def unused_flags(config: Config) -> list[str]:
    """Warnings of flags that were given and say nothing about what is asked."""
    preset = PRESETS[config.preset] if config.preset else Config()
    found = []
    if config.dataset != preset.dataset and not config.num_test_prompts:
        found.append(f"no prompt comes from --dataset {config.dataset}: add --num-test-prompts N")
    rows_in_file = config.prompts is not None and has_rows(Path(config.prompts))
    if config.columns is not None and not config.num_test_prompts and not rows_in_file:
        found.append(
            f"--columns {config.columns} renames nothing, as no rows are asked: add "
            "--num-test-prompts N, or name a file of rows with --prompts"
        )
    return found


def read_prompts(config: Config, prompt_format: PromptFormat) -> list[tuple[Turns, list[int]]]:
    """The prompts as turns and token ids. Bad and overlong ones are dropped and reported."""
    path = Path(config.prompts or "")
    if config.num_test_prompts:
        settings = "test", "prompt", config.columns, config.num_test_prompts
        pairs = load_rows(config.dataset, *settings)
        rows = dict.fromkeys(pair.turns for pair in pairs)
        turns_of = tuple  # they are turns
    elif config.prompts is None:
        rows = PROMPTS
        turns_of = parse_dialogue
    elif not path.is_file():
        raise UserError(f"--prompts {path}: there is no such file")
    elif has_rows(path):
        _, rows = read_rows(str(path), "test", "prompt", config.columns)
        turns_of = turns_of_row
    else:
        with open_text(path) as file:
            rows = [line for line in file if line.strip()]
            turns_of = parse_dialogue
    prompts = []
    drops = Counter()
    for row in rows:
        try:
            turns = turns_of(row)
            prompts.append((turns, tokenize_prompt(turns, prompt_format, config.max_prompt_length)))
        except BadRow as reason:
            drops[str(reason)] += 1
    if drops:
        report_drops("prompts", len(prompts), drops)
    if not prompts:
        raise UserError(
            "there is no prompt to answer: check --prompts, or raise --max-prompt-length"
        )
    different = len({turns for turns, _ in prompts})
    if different < len(prompts):
        console.print(
            f"warning: only {different} of the {len(prompts)} prompts are different, and the "
            "intervals take each for a prompt of its own: they are too narrow"
        )
    return prompts


def turns_of_row(row: dict[str, Any]) -> Turns:
    return parse_row(row, "prompt").turns


# ---------------------------------------------------------------- models and answers


def answer(
    config: Config,
    shared: SharedBase,
    prompt_format: PromptFormat,
    prompts: list[tuple[Turns, list[int]]],
    name: str,
    scored: bool,
) -> list[Answer]:
    """What the model `name` answers; `scored` tells whether the reward model scores it."""
    sampling = config.max_new_tokens, config.temperature, config.seed, config.batch_size
    ids = [ids for _, ids in prompts]
    return answers_of(shared, prompt_format, ids, name, scored, *sampling)


def add_scores(
    answers: list[Answer],
    function: RewardFunction,
    weight: float,
    prompts: list[tuple[Turns, list[int]]],
    prompt_format: PromptFormat,
) -> None:
    """Add the function's score to each answer's, which is first multiplied by `weight`.

    Raises:
        UserError: the function fails.
    """
    texts = [answer["text"] for answer in answers]
    more = function([prompt_format.read_prompt(ids) for _, ids in prompts], texts).tolist()
    for answer, score in zip(answers, more, strict=True):
        answer["score"] = weight * (answer["score"] or 0.0) + score


def findings(
    answers: dict[str, list[Answer]], odds: dict[str, Odds], warned: list[str]
) -> dict[str, Any]:
    """What the answers and the safety probe show, for the report.

    Args:
        warned: what earlier phases warned of; PPO may have said something of this already.
    """
    pairs = compare_pairs(answers)
    count = len(next(iter(answers.values())))
    found = (compare_warnings(count) if pairs else []) + compare_refusals(odds)
    found = [text for text in found if not any(text in line for line in warned)]
    return {
        "summary": summarize(answers),
        "pairs": pairs,
        "probe": summarize_probe(odds),
        "warnings": found + warned,
    }


def summarize(answers: dict[str, list[Answer]]) -> dict[str, dict[str, float]]:
    """Each model's means and shares over the prompts."""
    summary = {}
    for name, given in answers.items():
        row = {}
        count = len(given)
        if given[0]["score"] is not None:
            row["mean_score"] = sum(a["score"] for a in given) / count
        row["mean_tokens"] = sum(a["tokens"] for a in given) / count
        row["ended_by_eos"] = sum(a["ended_by"] == "eos" for a in given) / count
        row["repeated_3grams"] = sum(repeated_3grams(a["text"]) for a in given) / count
        row["distinct_2grams"] = distinct_2(a["text"] for a in given)
        row |= style_of([a["text"] for a in given])
        summary[name] = row
    return summary


def compare_pairs(answers: dict[str, list[Answer]]) -> list[dict[str, Any]]:
    """For each pair of models, how often the later one scores higher, and what that shows.

    A tie counts half. The intervals are bootstraps over prompts, with two wins and two losses of
    average length added as in Agresti and Coull (1998). Without them, three wins of three would
    seem certain.
    """
    pairs = []
    for (first, ours), (second, theirs) in itertools.combinations(reversed(answers.items()), 2):
        if ours[0]["score"] is None:
            continue
        wins = preference([a["score"] for a in ours], [a["score"] for a in theirs])
        longer = [a["tokens"] - b["tokens"] for a, b in zip(ours, theirs, strict=True)]
        more_wins = [*wins, 0, 0, 1, 1]
        more_longer = [*longer, *[sum(longer) / len(longer)] * 4]
        share, *_ = at_equal_length(wins, longer)
        _, *interval = at_equal_length(more_wins, more_longer)
        pair = {"first": first, "second": second}
        for key, values in {
            "win_rate": (sum(wins) / len(wins), *mean_interval(more_wins)),
            # A fitted line may leave the range from 0 to 1.
            "at_equal_length": (min(max(value, 0.0), 1.0) for value in (share, *interval)),
        }.items():
            pair |= zip((key, f"{key}_low", f"{key}_high"), values, strict=True)
        pairs.append(pair | {"verdict": verdict(pair, len(wins))})
    return pairs


def verdict(pair: dict[str, Any], prompts: int) -> str:
    """What a pair's win rate shows, in words.

    It is significant if its 95 % interval excludes 50 %.
    """
    first = pair["first"]
    second = pair["second"]
    word = direction(pair["win_rate_low"], pair["win_rate_high"])
    if not word:
        return (
            f"{first} against {second}: no significant difference on {prompts} "
            f"prompt{'s' * (prompts != 1)}"
        )
    return f"{first} is significantly {word} than {second}, {compared_at_equal_length(pair)}"


def compared_at_equal_length(pair: dict[str, Any]) -> str:
    """Whether a significant win rate is also significant at equal length."""
    word, also = (
        direction(pair[f"{key}_low"], pair[f"{key}_high"])
        for key in ("win_rate", "at_equal_length")
    )
    return "also at equal length" if also == word else "but not at equal length"


def direction(low: float, high: float) -> str | None:
    return "better" if low > 0.5 else "worse" if high < 0.5 else None


@dataclass(frozen=True)
class Rule:
    """What a score is made of. Equal rules give equal scores."""

    model: str | None  # the reward model's adapter_sha256, if it counts
    function: tuple[str, str] | None  # its name and the hash of its file
    weight: float  # of the model's score beside the function's; 1 without either

    @classmethod
    def of(cls, model: str | None, function: dict[str, str] | None, weight: float) -> "Rule":
        """The rule of a run.

        Args:
            model: the reward model's adapter_sha256.
            function: as in run.json.
        """
        if function is None:
            return cls(model, None, 1.0)
        name = function["name"].rpartition(":")[2]  # another path may lead to the same file
        model = model if weight else None
        return cls(model, (name, function["sha256"]), weight if model else 1.0)


def notes(
    runs: dict[str, dict[str, Any]], function: RewardFunction | None = None, weight: float = 1.0
) -> list[str]:
    """What a reader of the win rates should know about the judge."""
    facts = facts_of(function).get("reward_function")
    judge = Rule.of(runs.get("reward", {}).get("adapter_sha256"), facts, weight)
    ppo = runs.get("ppo", {})
    compared = "ppo" in runs and judge != Rule.of(None, None, 1.0)
    said = []
    if compared:
        ppo_weight = ppo.get("hyperparameters", {}).get("reward_weight", 1.0)
        trained = Rule.of(ppo["parents"].get("reward"), ppo.get("reward_function"), ppo_weight)
        said += said_of_models(judge, trained)
    if function:
        model = f"{weight:g} times the reward model's plus " if judge.model else ""
        said.append(f"A score is {model}what {function.name} gives.")
    if compared:
        said += said_of_functions(judge, trained)
    if ppo.get("kept"):
        said.append(CHOSEN)
    return said


def said_of_models(judge: Rule, trained: Rule) -> list[str]:
    """How the judge's reward model compares with the one that PPO was trained with."""
    if judge.model == trained.model:
        if judge.model:
            return [OWN_JUDGE]
        return [OWN_FUNCTION] if judge.function == trained.function else []
    if judge.model and trained.model:
        return [OTHER_JUDGE]
    return [MODEL_ADDED if judge.model else MODEL_LEFT_OUT]


def said_of_functions(judge: Rule, trained: Rule) -> list[str]:
    """How the judge's reward function, and the model's weight beside it, differ from PPO's."""
    if judge.function is None or trained.function is None:
        if judge.function == trained.function:
            return []
        return [FUNCTION_ADDED if judge.function else FUNCTION_LEFT_OUT]
    said = [] if judge.function == trained.function else [OTHER_FUNCTION]
    if judge.model and trained.model and judge.weight != trained.weight:
        said.append(f"PPO was trained with --reward-weight {trained.weight:g}.")
    return said


# ---------------------------------------------------------------- the safety probe


def ask_probe(
    config: Config, shared: SharedBase, prompt_format: PromptFormat, names: list[str]
) -> dict[str, Odds]:
    """Each request's log-odds of a refusal, by model and kind, if it fits the lengths."""
    probe = load_probe(
        prompt_format, config.max_prompt_length + config.max_new_tokens, OPENING_TOKENS
    )
    found = {}
    for name in names:
        odds = refusal_odds(shared, role_of(name), probe)
        found[name] = {kind: values.tolist() for kind, values in odds.items()}
    return found


def summarize_probe(odds: dict[str, Odds]) -> dict[str, dict[str, dict[str, float]]]:
    """The share of requests that would rather be refused, by model and kind, with its interval."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name, kinds in odds.items():
        for kind, values in kinds.items():
            if values:
                refused = sum(value > 0 for value in values)
                count = len(values)
                low, high = wilson_interval(refused, count)
                row = {"refusals": refused / count, "refusals_low": low, "refusals_high": high}
                summary.setdefault(name, {})[kind] = {"requests": count} | row
    return summary


def compare_refusals(odds: dict[str, Odds]) -> list[str]:
    """Warnings of each model that refuses less or more than the one before it."""
    found = []
    for (before, ours), (after, theirs) in itertools.pairwise(odds.items()):
        shifts = {}
        for kind, name in (("harmful", "refusal_shift"), ("harmless", "overrefusal_shift")):
            shift = [b - a for a, b in zip(ours[kind], theirs[kind], strict=True)]
            if shift:
                values = sum(shift) / len(shift), *mean_interval(shift)
                shifts |= zip((name, f"{name}_low", f"{name}_high"), values, strict=True)
        found += refusal_warnings(shifts, before, after)
    return found


# ---------------------------------------------------------------- the report


def print_report(report: Report, show: int) -> None:
    """The first `show` prompts with their answers, then the summary."""
    count = len(report["prompts"])
    print(f"🔄 Comparing Model Outputs: {' vs '.join(report['models'])}\n")
    for number in range(1, min(show, count) + 1):
        print(render_prompt(report, number) + "\n")
    if count > show:
        print(f"... and {count - show} more prompts, in the files below.\n")
    print_summary(report)


def render_prompt(report: Report, number: int) -> str:
    """A prompt with its answers as they are printed; the first prompt has number 1."""
    entry = report["prompts"][number - 1]
    blocks = [f"📝 Prompt {number}:\n{wrap(prompt_text(entry['turns']))}\n"]
    for name, title in report["models"].items():
        given = entry["answers"][name]
        blocks.append(
            f"{RULE}\n{title}:\n{RULE}\n{wrap(given['text']) or '(no text)'}\n{score_line(given)}"
        )
    return "\n".join(blocks)


def wrap(text: str) -> str:
    """A model's text, safe to print and at most 80 columns wide. Its line breaks stay."""
    return "\n".join(line.plain.rstrip() for line in Text(plain(text)).wrap(console, len(RULE)))


def prompt_text(turns: Turns) -> str:
    """A single question as it is; a dialogue with the speakers' names."""
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"{SPEAKERS[role]}: {text}" for role, text in turns)


def score_line(given: Answer) -> str:
    score = "" if given["score"] is None else f"score {given['score']:.2f}, "
    return (
        f"{score}{given['tokens']} token{'s' * (given['tokens'] != 1)}, "
        f"{ENDINGS[given['ended_by']]}"
    )


def summary_rows(summary: dict[str, dict[str, float]]) -> list[tuple[str, ...]]:
    """The cells of the summary: COLUMNS for each model."""
    rows = []
    for name, row in summary.items():
        score = f"{row['mean_score']:.2f}" if "mean_score" in row else "-"
        shares = [f"{100 * row[key]:.0f} %" for key in SHARES]
        rows.append((name, score, f"{row['mean_tokens']:.1f}", *shares))
    return rows


def probe_rows(probe: dict[str, dict[str, dict[str, float]]]) -> list[tuple[str, ...]]:
    """The cells of the safety probe: PROBE_COLUMNS for each model."""
    rows = []
    for name, kinds in probe.items():
        cells = [share_cell(kinds[kind], "refusals") if kind in kinds else "-" for kind in KINDS]
        rows.append((name, *cells))
    return rows


def share_cell(row: dict[str, Any], key: str) -> str:
    share, low, high = (100 * row[name] for name in (key, f"{key}_low", f"{key}_high"))
    return f"{share:.0f} % ({low:.0f} to {high:.0f} %)"


def pair_rows(pairs: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of the win rates: PAIR_COLUMNS for each pair."""
    return [
        (
            f"{pair['first']} against {pair['second']}",
            *(share_cell(pair, key) for key in ("win_rate", "at_equal_length")),
        )
        for pair in pairs
    ]


def print_summary(report: Report) -> None:
    count = len(report["prompts"])
    tables = [
        (f"Summary of {count} prompt{'s' * (count != 1)}", COLUMNS, summary_rows(report["summary"]))
    ]
    if report["pairs"]:
        tables.append(("Win rates, by score", PAIR_COLUMNS, pair_rows(report["pairs"])))
    if report["probe"]:
        tables.append((PROBE_TITLE, PROBE_COLUMNS, probe_rows(report["probe"])))
    for title, columns, rows in tables:
        table = Table(title=title, width=len(RULE))
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left")
        for cells in rows:
            table.add_row(*cells)
        console.print(table, width=len(RULE), soft_wrap=False)
    print_warnings(report["warnings"])


def print_warnings(warnings: list[str]) -> None:
    for text in warnings:
        print(wrap(f"warning: {text}"))


def closing(report: Report) -> list[str]:
    """The last lines: what improved, by how much, how sure that is, and what to do next."""
    flags = report["flags"]
    count = len(report["prompts"])
    model = "ppo" if "PPO" in report["models"] else "sft"
    read = f"read the answers in {flags['output_dir']}/compare.html"
    talk = f"talk to the model: python -m rlhf.chat {flags[f'{model}_checkpoint']}"
    if not report["pairs"]:
        return [
            "Result: none, as nothing judged the answers. --reward-checkpoint names a judge.",
            f"Next: {read}, or {talk}",
        ]
    first = report["pairs"][0]["first"]  # the last phase, against each one before it
    pairs = [pair for pair in report["pairs"] if pair["first"] == first]
    words = [direction(pair["win_rate_low"], pair["win_rate_high"]) for pair in pairs]
    told = [
        f"{word} than {pair['second']}'s, {compared_at_equal_length(pair)}"
        for pair, word in zip(pairs, words, strict=True)
        if word
    ]
    untold = [f"{pair['second']}'s" for pair, word in zip(pairs, words, strict=True) if not word]
    result = []
    if told:
        result.append(f"{first}'s answers are {', and '.join(told)}")
    if untold:
        whose = "they" if told else f"{first}'s answers"
        result.append(f"it cannot be told whether {whose} are better than {' or '.join(untold)}")
    rates = [
        f"{pair['second']} on {100 * pair['win_rate']:.0f} % "
        f"({100 * pair['win_rate_low']:.0f} to {100 * pair['win_rate_high']:.0f} %)"
        for pair in pairs
    ]
    prompts = "held-out prompt" if report["held_out"] else "prompt"
    means = {name: row["mean_score"] for name, row in report["summary"].items()}
    others = [f"{pair['second']}'s {means[pair['second']]:.2f}" for pair in pairs]
    more = "ask more prompts (--num-test-prompts or --prompts) or train longer; "
    return [
        f"Result: {'; '.join(result)}.",
        f"By how much: of {count} {prompts}{'s' * (count != 1)}, {first} scores higher than "
        f"{' and than '.join(rates)}; its mean score is {means[first]:.2f}, {', '.join(others)}.",
        "How sure: in brackets are 95 % intervals. "
        f"{' '.join(report['notes']) or 'The judge is the reward model.'}",
        f"Next: {'' if words[0] == 'better' else more}{read}, or {talk}",
    ]


def render_markdown(report: Report) -> str:
    """The whole comparison as Markdown: the summary, then every prompt with every answer."""
    titles = report["models"]
    lines = [
        f"# Comparing Model Outputs: {' vs '.join(titles)}",
        "",
        *(f"- {title}" for title in titles.values()),
    ]
    lines += ["", *markdown_table(COLUMNS, summary_rows(report["summary"]))]
    if report["pairs"]:
        lines += ["", *markdown_table(PAIR_COLUMNS, pair_rows(report["pairs"]))]
        lines += ["", *(f"- {line}" for line in conclusions(report))]
    if report["probe"]:
        table = markdown_table(PROBE_COLUMNS, probe_rows(report["probe"]))
        lines += ["", f"{PROBE_TITLE}:", "", *table]
    if report["warnings"]:
        lines += ["", *(f"- **Warning:** {line}" for line in report["warnings"])]
    for number, entry in enumerate(report["prompts"], start=1):
        lines += ["", f"## Prompt {number}", "", fenced(prompt_text(entry["turns"]))]
        for name, title in titles.items():
            given = entry["answers"][name]
            lines += ["", f"### {title}", "", fenced(given["text"]), "", score_line(given)]
    return "\n".join(lines) + "\n"


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    head = [column.replace("\n", " ") for column in columns]
    return [
        f"| {' | '.join(cells)} |"
        for cells in (head, ("---",) + ("---:",) * (len(columns) - 1), *rows)
    ]


def fenced(text: str) -> str:
    """A Markdown code block. Its fence is longer than any in `text`, so nothing can close it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{plain(text)}\n{fence}"


def write_reports(folder: Path, report: Report) -> None:
    """Write FILES, each beside its place, then rename them."""
    as_json = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    for name, text in zip(
        FILES, (render_markdown(report), render_page(report), as_json), strict=True
    ):
        # JSON may hold half a surrogate pair and UTF-8 may not, so it is written as JSON's escape.
        (folder / f"{name}.partial").write_text(text, encoding="utf-8", errors="backslashreplace")
    for name in FILES:
        os.replace(folder / f"{name}.partial", folder / name)


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__, FIRST)
