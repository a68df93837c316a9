"""PPO with a critic, RLOO, GRPO and best-of-n, for the same cost: a run of one of them.

    python experiments/rivals.py --phase cost --dataset Dahoas/rm-static
    python experiments/rivals.py --phase search --method rloo --learning-rate 0.001 --dataset ...
    python experiments/rivals.py --method rloo --seed 0 --dataset ...

`make results` runs them all, in this order, and makes the table. All start from a chain's SFT model
and learn by its reward model; its gold model only judges.

- `cost`: seconds of an update of each method by phase, and memory, in processes of their own that
  take turns. From its medians, and from the steps that `kl_stop` left in the searches, follow the
  updates that cost as much as PPO's `EPISODES`.
- `search`: a short run at one of two learning rates, judged on prompts cut from the train split.
- `final`: the run that counts, at the better rate, judged on the test split's prompts. Best-of-n
  learns nothing: here it draws `DRAWS` answers a prompt, from which every smaller n follows.
- `timing`: what `cost` starts. `cost_card` is the same on a card, while the runs are a CPU's.

RLOO and GRPO are ppo_train.py without its critic: several answers a prompt are each other's
baseline. What it has no flag for is put in its place here, around it; the rest, from the rollout to
the clipped loss and the KL penalty in the reward, is PPO's own.
"""

import contextlib
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import rlhf  # noqa: F401  before the libraries that it sets up

import numpy as np
import ppo_ablation
import torch
from torch import Tensor

import ppo_train
import rlhf.ppo.state
from rlhf.data.format import PromptFormat
from rlhf.engine.adapters import read_stacked
from rlhf.engine.base import same_base
from rlhf.engine.generation import Response, Seed, generate
from rlhf.engine.loading import load_base
from rlhf.engine.roles import REFERENCE, SharedBase
from rlhf.engine.speed import Stopwatch
from rlhf.engine.tokenizers import load_format
from rlhf.ppo.batch import Batch, Measured, make_batch, restarts_in_smaller_parts
from rlhf.ppo.evaluation import Evaluation
from rlhf.runs.checkpoints import read_parents
from rlhf.runs.cli import run
from rlhf.runs.device import choose_dtype, cpu_name, device, peak_memory_gib
from rlhf.runs.errors import UserError
from rlhf.runs.folders import partial_of
from rlhf.runs.metrics import JsonLines, read_jsonl
from rlhf.runs.processes import sum_over_processes
from rlhf.runs.resume import MANIFEST, read_facts, states
from rlhf.runs.statistics import preference
from rlhf.runs.terminal import console

TRAINED = ("ppo", "rloo", "grpo")
METHODS = (*TRAINED, "best_of_n")
GROUP = 4  # answers a prompt of RLOO and GRPO
DRAWS = 64  # answers a prompt of best-of-n
SHOWN = (1, 2, 4, 8, 16, 32, 64)  # the n of which a record has numbers of each prompt
RATES = (5e-4, 1e-3)  # of the policy; each method is searched at both
EPISODES = 1536  # PPO's; the others get as many as cost the same
SEARCH_EPISODES = 384
LOOKS = 4  # at the test prompts on the way of a final run, with the last; they choose nothing
ROUNDS = 3  # of the cost's measurement, in which each method has a turn
TIMED = 3  # updates of a turn; the first is not counted
EPS = 1e-4  # of GRPO: what TRL adds to a group's standard deviation


@dataclass(frozen=True)
class Config:
    phase: Literal["cost", "cost_card", "search", "final", "timing"] = "final"
    method: Literal["ppo", "rloo", "grpo", "best_of_n"] = "ppo"
    seed: int = 0
    learning_rate: float = 1e-3  # of a search; a final run takes the better one
    sft_checkpoint: str = "runs/results/sft_0"
    reward_checkpoint: str = "runs/results/reward_0"
    gold_checkpoint: str = "runs/results/gold_0"
    dataset: str = "Dahoas/rm-static"
    max_eval_samples: int = 128  # prompts that judge: held-out ones, or as many of the train split
    # where `make results` keeps the records of the cost and of the searches
    records: str = "runs/results/records"
    work: str = "runs/results/rivals"  # a folder NAME and a file NAME.json of each run


def main(config: Config) -> None:
    folder = Path(config.work) / name_of(config)
    folder.parent.mkdir(parents=True, exist_ok=True)
    phases = {
        "cost": cost,
        "cost_card": cost,
        "timing": timing,
        "search": search,
        "final": final,
    }
    find = functools.partial(phases[config.phase], config, folder)
    with seconds_worked():
        ppo_ablation.write_record(asdict(config), folder, find)


@contextlib.contextmanager
def seconds_worked() -> Iterator[None]:
    """On a CPU, have a stopwatch count the seconds that this process works, not those it waits."""
    if device().type != "cpu":
        yield
        return
    with mock.patch.object(Stopwatch, "now", lambda self: time.process_time()):
        yield


def name_of(config: Config) -> str:
    """Of a run's folder; in `make results` its step is called so, after `rivals_`."""
    return {
        "cost": "cost",
        "cost_card": "cost_card",
        "timing": f"timing_{config.method}",
        "search": f"search_{config.method}_{config.learning_rate:g}",
        "final": f"{config.method}_{config.seed}",
    }[config.phase]


def settings(config: Config) -> ppo_train.Config:
    """What all runs have in common: the settings of `make results`' PPO."""
    parents = {
        name: getattr(config, name)
        for name in ("sft_checkpoint", "reward_checkpoint", "gold_checkpoint", "dataset", "seed")
    }
    return replace(
        ppo_train.PRESETS["demo"],
        **parents,
        **ppo_ablation.PPO,
        max_train_samples=4096,
        max_eval_samples=config.max_eval_samples,
        eval_steps=ppo_ablation.NEVER,  # but before and after
        # The policy learns from the first update on where there is no critic to wait for.
        critic_warmup_updates=(
            ppo_train.PRESETS["demo"].critic_warmup_updates if config.method == "ppo" else 0
        ),
    )


# ---------------------------------------------------------------- PPO without its critic


def rloo(returns: Tensor) -> Tensor:
    """Each answer's return less the mean of the other answers' to its prompt.

    REINFORCE leave-one-out, of Ahmadian et al. (2402.14740), after Kool et al. (2019). Written as
    k / (k - 1) times the distance from the mean of all k, which is the same.

    Args:
        returns: [groups, k].
    """
    k = returns.shape[1]
    return k / (k - 1) * (returns - returns.mean(1, keepdim=True))


def grpo(returns: Tensor) -> Tensor:
    """Each answer's distance from its group's mean, in the group's standard deviations.

    The advantage of DeepSeekMath (2402.03300), section 4.1, with the standard deviation over k - 1
    and `EPS` beside it, as TRL has them. Its KL term in the loss and its mean over each answer's
    tokens are not taken over: what differs from the others is the advantage alone.

    A group of near-ties gets advantages as large as any other's, as `EPS` hardly does more than
    keep 0 / 0 away: returns of 0.5, 0.5, 0.5 and 0.502 give -0.45 three times, and 1.36.

    Args:
        returns: [groups, k].
    """
    centred = returns - returns.mean(1, keepdim=True)
    return centred / (returns.std(1, keepdim=True) + EPS)


ADVANTAGES = {"rloo": rloo, "grpo": grpo}


def group_advantages(
    formula: Callable[[Tensor], Tensor],
    batch: Batch,
    measured: Measured,
    kl_coef: float,
    baseline: float,
    config: ppo_train.Config,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both [n]: each answer's, at every one of its tokens.

    An answer is one action. Its return is the sum of its tokens' rewards, which is the score less
    kl_coef times the summed KL; so the KL penalty stays within the reward, as in Ahmadian et al.
    (2402.14740), and is compared within the group like the score. The advantage is the same at all
    tokens of an answer, and is not whitened.

    A group may lie on several processes: their returns meet before the formula sees them.
    """
    mask = batch.response_mask
    returns = ppo_train.rewards_of(batch, measured, kl_coef, baseline, config).sum(1)  # [b]
    everyone = torch.zeros(config.episodes_per_update)
    everyone[batch.rows] = returns
    groups = sum_over_processes(everyone.to(batch.device)).cpu().view(-1, GROUP)
    advantages = formula(groups).flatten()[batch.rows]  # [b]
    advantages, returns = (
        batch.end_to_end(numbers[:, None].expand_as(mask)) for numbers in (advantages, returns)
    )
    return advantages, returns


def draw_groups(
    draw_prompts: Callable, prompts: list[list[int]], update: int, config: ppo_train.Config
) -> tuple[list[list[int]], list[Seed]]:
    """`GROUP` episodes a prompt, one after the other, each with a sampling seed of its own.

    Prompts come in the order in which PPO draws them, each once in an epoch over all.
    """
    if config.episodes_per_update % GROUP:
        raise UserError(
            f"--episodes-per-update {config.episodes_per_update}: give a multiple of {GROUP}, so "
            "that groups stay whole"
        )
    some = replace(config, episodes_per_update=config.episodes_per_update // GROUP)
    queries, _ = draw_prompts(prompts, update, some)
    last = update * config.episodes_per_update
    episodes = range(last - config.episodes_per_update, last)
    return (
        [query for query in queries for _ in range(GROUP)],
        [(config.seed, 2, episode) for episode in episodes],
    )


def critic_free(formula: Callable[[Tensor], Tensor]) -> dict[str, Callable]:
    """What stands in ppo_train.py's place without a critic: no value model, pass, loss, or state.

    The critic is dropped as soon as it is loaded, so that the policy starts from the weights that
    PPO's starts from.
    """
    load_models = ppo_train.load_models
    backward = ppo_train.backward

    def load_without_critic(*args: Any) -> tuple[SharedBase, dict[str, Any]]:
        shared, base = load_models(*args)
        shared.peft.delete_adapter("value")
        del shared.adapters["value"], shared.heads["value"]
        shared.train("policy")
        shared.stack()
        return shared, base

    return {
        "load_models": load_without_critic,
        "token_values": lambda shared, micro, lower, _: torch.zeros(
            len(micro.actions), device=lower.device
        ),
        "backward": lambda shared, batch, role, *rest: (
            backward(shared, batch, role, *rest) if role == "policy" else {}
        ),
        "draw_prompts": functools.partial(draw_groups, ppo_train.draw_prompts),
        "advantages_and_returns": functools.partial(group_advantages, formula),
    }


@contextlib.contextmanager
def training_by(method: str, in_groups: bool = True) -> Iterator[None]:
    """Have ppo_train.py train by `method`, with its critic or without.

    Args:
        in_groups: whether the critic-free ways draw `GROUP` answers a prompt. If not, they have
            PPO's prompts, so that both can be timed on the same, and their advantages mean nothing.
    """
    if method not in ADVANTAGES:
        yield
        return
    save_stacked = rlhf.ppo.state.save_stacked

    def save_what_is_there(folder: Path, shared: SharedBase, role: str, *rest: Any) -> None:
        if role in shared.adapters:
            save_stacked(folder, shared, role, *rest)

    parts = critic_free(ADVANTAGES[method])
    if not in_groups:
        del parts["draw_prompts"]
    with (
        mock.patch.multiple(ppo_train, **parts),
        mock.patch.object(rlhf.ppo.state, "save_stacked", save_what_is_there),
    ):
        yield


@contextlib.contextmanager
def looking_at(judges: Literal["held-out", "selection"]) -> Iterator[None]:
    """Have ppo_train.py look at these prompts; those of the selection it trains on in no case.

    The selection is cut from the train split, as many as there are held-out prompts.
    """
    load_prompts = ppo_train.load_prompts

    def load_and_cut(config: ppo_train.Config, prompt_format: PromptFormat) -> ppo_train.Prompts:
        cut = load_prompts(replace(config, keep="best"), prompt_format)
        if judges == "selection":
            return replace(cut, held_out=cut.selection, selection=[], chosen_style={})
        return replace(cut, selection=[])

    with mock.patch.object(ppo_train, "load_prompts", load_and_cut):
        yield


def train(
    config: Config,
    folder: Path,
    judges: Literal["held-out", "selection"],
    in_groups: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Train, or go on where a run was cut short; return what its looks found.

    A run that goes on keeps the length that it began with, even if the records on which its length
    rests were made anew since.

    Args:
        judges: the prompts that it looks at.
        in_groups: see `training_by`.
        changes: of `settings`.
    """
    looks: list[Evaluation] = []
    compare = ppo_train.compare

    def watched(sft: Evaluation, policy: Evaluation) -> dict[str, Any]:
        looks[:] = sft, policy
        return compare(sft, policy)

    kept = [state for state in states(partial_of(folder)) if (state / MANIFEST).exists()]
    goes_on = bool(kept)
    if goes_on:
        began_with = read_facts(kept[0])["hyperparameters"]
        changes |= {name: began_with[name] for name in ("total_episodes", "eval_steps")}
    place = {"output_dir": str(folder), "resume": goes_on, "overwrite": not goes_on}
    with (
        training_by(config.method, in_groups),
        looking_at(judges),
        mock.patch.object(ppo_train, "compare", watched),
    ):
        ppo_train.main(replace(settings(config), **place, **changes))
    if not looks:
        raise UserError(
            f"{folder} was finished before, but left no record: start again, and it is made anew"
        )
    run_json = json.loads((folder / "run.json").read_text())
    flags = run_json["hyperparameters"]
    rows = read_jsonl(folder / "metrics.jsonl")
    return {
        "learning_rate": flags["learning_rate"],
        "updates": run_json["updates"],
        # Of each update, and the most that it can make: `kl_stop` ends some early.
        "optimizer_steps": [row["policy/optimizer_steps"] for row in rows if "episode" in row],
        "most_steps": flags["num_ppo_epochs"] * flags["num_mini_batches"],
        "episodes": run_json["episodes"],
        "metrics": run_json["metrics"],
        "seconds": {
            part: spent for part, spent in run_json["speed"].items() if part.startswith("time/")
        },
        "peak_memory_gib": run_json["peak_memory_gib"],
        "looks": [row for row in rows if "eval/kl" in row],
        "answers": dict(zip(("sft", "policy"), map(numbers_of, looks), strict=True)),
    }


def numbers_of(look: Evaluation) -> dict[str, list[float]]:
    """One number a prompt."""
    columns = {
        "score": look.scores,
        "gold_score": look.gold_scores,
        "tokens": look.response_length,
        "kl": look.kl,
    }
    return {name: rounded(values.tolist()) for name, values in columns.items()}


def rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


# ---------------------------------------------------------------- search, and what counts


def search(config: Config, folder: Path) -> dict[str, Any]:
    changes = {"total_episodes": SEARCH_EPISODES, "learning_rate": config.learning_rate}
    return train(config, folder, "selection", **changes)


def final(config: Config, folder: Path) -> dict[str, Any]:
    """A run of the length that costs as much as PPO's, at the rate that the search chose."""
    if config.method == "best_of_n":
        return draw(config, folder) | accuracies(config)
    cost = read_record(config, "cost")
    found = {
        method: {rate: read_record(config, f"search_{method}_{rate:g}") for rate in RATES}
        for method in ("ppo", config.method)
    }
    rates = {method: better_rate(searches) for method, searches in found.items()}
    shares = {method: share_computed(found[method][rate]) for method, rate in rates.items()}
    updates = updates_of(cost, shares)[config.method]
    changes = {
        "total_episodes": updates * settings(config).episodes_per_update,
        "learning_rate": rates[config.method],
        "eval_steps": math.ceil(updates / LOOKS),
    }
    return train(config, folder, "held-out", **changes) | accuracies(config)


def read_record(config: Config, name: str) -> dict[str, Any]:
    path = Path(config.records) / f"rivals_{name}.json"
    try:
        return json.loads(path.read_text())
    except OSError:
        raise UserError(
            f"there is no {path}, which a final run rests on: `make results` makes it, or name the "
            "folder with --records"
        ) from None


def updates_of(cost: dict[str, Any], shares: dict[str, float]) -> dict[str, int]:
    """How many updates of each method cost as much as PPO's of `EPISODES` episodes.

    Evaluation is left out, and so is that PPO's first update has no policy to train: it counts as
    a whole one, and in the search as one that `kl_stop` left whole.

    Args:
        shares: of each method, PPO among them, `share_computed` in the search that it takes.
    """
    seconds = {name: update_seconds(cost, name, share) for name, share in shares.items()}
    whole = EPISODES / ppo_train.PRESETS["demo"].episodes_per_update * seconds["ppo"]
    return {name: max(1, round(whole / spent)) for name, spent in seconds.items()}


def update_seconds(cost: dict[str, Any], method: str, share: float = 1.0) -> float:
    """Of an update, from the record of the cost; of best-of-n, of as many answers.

    Args:
        share: of the minibatches of an update that are computed; the cost is measured with all.
    """
    seconds = cost["methods"][method]["seconds"]
    return sum(spent * (share if part == "optimise" else 1.0) for part, spent in seconds.items())


def share_computed(run: dict[str, Any]) -> float:
    """Of all minibatches that a run's updates could compute, those that they did.

    One more than there were steps where `kl_stop` ended an update: it is found to be too far only
    when its gradient is there.
    """
    most = run["most_steps"]
    return statistics.mean(min(steps + 1, most) for steps in run["optimizer_steps"]) / most


def share_made(run: dict[str, Any]) -> float:
    """Of all steps that a run's updates could make, those that `kl_stop` left."""
    return statistics.mean(run["optimizer_steps"]) / run["most_steps"]


def better_rate(searches: dict[float, dict[str, Any]]) -> float:
    """The learning rate with the highest mean gold gain, by the records of the searches.

    Raises:
        UserError: all of them broke off.
    """
    gains = {rate: gold_gain(run) for rate, run in searches.items() if "answers" in run}
    if not gains:
        raise UserError("every learning rate of the search broke off: there is none to take")
    return max(gains, key=gains.__getitem__)


def gold_gain(run: dict[str, Any]) -> float:
    """Mean gain over SFT of a run's last look."""
    sft, policy = (run["answers"][who]["gold_score"] for who in ("sft", "policy"))
    return float(np.mean(policy) - np.mean(sft))


def accuracies(config: Config) -> dict[str, Any]:
    """Of the reward and the gold model that a run rests on, on the test pairs."""
    folders = {"reward": config.reward_checkpoint, "gold": config.gold_checkpoint}
    runs = {
        name: json.loads((Path(folder) / "run.json").read_text())
        for name, folder in folders.items()
    }
    return {"accuracy": {name: found["metrics"]["eval_accuracy"] for name, found in runs.items()}}


# ---------------------------------------------------------------- best-of-n


@functools.cache
def chances(draws: int) -> np.ndarray:
    """[n, r]: how likely the best of n + 1 is the one with r worse ones below it.

    The n + 1 are drawn without replacement from `draws` answers: C(r, n) of the C(draws, n + 1)
    choices have that one and n of the r below it.
    """
    return np.array(
        [[math.comb(r, n) / math.comb(draws, n + 1) for r in range(draws)] for n in range(draws)]
    )


def best_of(scores: Sequence[float] | np.ndarray, values: Sequence[float]) -> np.ndarray:
    """[n] the value that the best of 1, 2, ... answers by score has, expected over which n it is.

    Exact. Of answers with the same score each is as likely to be taken.

    Args:
        scores, values: of all answers drawn to a prompt.
    """
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean = np.bincount(place, weights=values) / count  # of answers that tie
    return chances(len(scores)) @ mean[np.sort(place)]


def best_of_n_kl(n: int) -> float:
    """Nats between the best of n and one answer, ln n - (n - 1) / n.

    Exact if no answer can be drawn twice, else the most that it can be.
    """
    return math.log(n) - (n - 1) / n


def load_sampler(config: Config, *judges: str) -> tuple[ppo_train.Config, PromptFormat, SharedBase]:
    """The SFT model with reward models beside it, and nothing that learns."""
    ppo = settings(config)
    sft = read_parents(ppo.sft_checkpoint, ppo.reward_checkpoint)["sft"]
    prompt_format = load_format(ppo.sft_checkpoint, sft)
    dtype = choose_dtype(ppo.dtype, device())
    base = same_base(sft, ppo.sft_checkpoint, ppo.base_model)
    model = load_base(base, dtype, prompt_format.pad_token_id)
    shared = SharedBase(model, ppo.sft_checkpoint, dtype)
    for role in judges:
        shared.add_role(role, **read_stacked(getattr(config, f"{role}_checkpoint"), shared))
    return ppo, prompt_format, shared


@torch.no_grad()
@restarts_in_smaller_parts
def judge(shared: SharedBase, batch: Batch, judges: tuple[str, ...]) -> Tensor:
    """What each judge says of each answer [judges, b], on the CPU."""
    found = []
    for micro in chain(*batch.micro_batches(shared.micro_batch.tokens)):
        lower = shared.lower(micro.texts)
        found.append(torch.stack([ppo_train.score(shared, role, micro, lower) for role in judges]))
    return torch.cat(found, 1).cpu()


def answer(
    config: ppo_train.Config,
    shared: SharedBase,
    prompt_format: PromptFormat,
    prompts: list[list[int]],
    seeds: list[Seed],
    rows: int,
) -> list[Response]:
    """The SFT model's answers, `rows` at a time, drawn as ppo_train.py draws them."""
    how = config.response_length, config.temperature, seeds, rows
    return generate(shared, REFERENCE, prompt_format, prompts, *how)


def judged(
    shared: SharedBase,
    prompt_format: PromptFormat,
    prompts: list[list[int]],
    responses: list[Response],
) -> dict[str, list[float]]:
    """Score, gold score and tokens of each answer, and whether EOS ended it, by prompt."""
    everyone = [list(range(len(prompts)))]
    batch = make_batch(prompts, responses, everyone, prompt_format, shared.device)
    scores = torch.empty(2, len(prompts))
    scores[:, batch.rows] = judge(shared, batch, ("reward", "gold"))
    score, gold_score = (rounded(row.tolist()) for row in scores)
    tokens = [len(response.ids) for response in responses]
    ended = [response.ended_by == "eos" for response in responses]
    return {"score": score, "gold_score": gold_score, "tokens": tokens, "ended": ended}


def draw(config: Config, folder: Path) -> dict[str, Any]:
    """`DRAWS` answers to each held-out prompt, and what the best of n of them are.

    A prompt that has its answers is not asked again, so a run that was cut short goes on.
    """
    ppo, prompt_format, shared = load_sampler(config, "reward", "gold")
    prompts = ppo_train.load_prompts(ppo, prompt_format).held_out
    # Those of a look, whatever the run's seed: all methods' gains are over the same answers.
    seeds = [(0, 4, i) for i in range(len(prompts))]
    responses = answer(ppo, shared, prompt_format, prompts, seeds, ppo.rollout_batch_size)
    sft = judged(shared, prompt_format, prompts, responses)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "pool.jsonl"
    known = read_jsonl(path) if path.exists() else []
    if known[:1] != [sft]:  # of another chain, or of other prompts
        path.unlink(missing_ok=True)
        known = []
    file = JsonLines(path)
    if not known:
        file.write(sft)
    pool = known[1:]
    for i in range(len(pool), len(prompts)):
        again = [prompts[i]] * DRAWS
        seeds = [(config.seed, 5, i, number) for number in range(DRAWS)]
        responses = answer(ppo, shared, prompt_format, again, seeds, DRAWS)
        pool.append(judged(shared, prompt_format, again, responses))
        file.write(pool[-1])
        if i % 10 == 9:
            console.print(f"{i + 1} of {len(prompts)} prompts")
    found = curves_of(pool, sft["gold_score"], ppo.missing_eos_penalty)
    return {"draws": DRAWS, "answers": {"sft": sft}, **found}


def curves_of(
    pool: list[dict[str, list[float]]], sft_gold: list[float], missing_eos_penalty: float
) -> dict[str, dict[str, Any]]:
    """For every n the means over all prompts, and for those of `SHOWN` the numbers of each prompt.

    The best is the one with the highest score less the penalty, which is what training maximises.

    Args:
        pool: of each prompt what `judged` says of its answers.
        sft_gold: of each prompt the gold score of the answer that the best of n has to beat.
        missing_eos_penalty: taken off the score of an answer that EOS did not end.
    """
    columns: dict[str, list[np.ndarray]] = {}
    for drawn, gold in zip(pool, sft_gold, strict=True):
        wins = preference(drawn["gold_score"], [gold] * len(drawn["gold_score"]))
        cut = ~np.array(drawn["ended"])
        rewards = np.array(drawn["score"]) - missing_eos_penalty * cut
        for name, values in (drawn | {"win": wins}).items():
            columns.setdefault(name, []).append(best_of(rewards, values))
    whole = {name: np.array(rows) for name, rows in columns.items()}  # [prompts, n]
    shown = [n for n in SHOWN if n <= len(pool[0]["score"])]
    return {
        "means": {name: rounded(values.mean(0).tolist()) for name, values in whole.items()},
        "best_of": {
            str(n): {name: rounded(values[:, n - 1].tolist()) for name, values in whole.items()}
            for n in shown
        },
    }


# ---------------------------------------------------------------- cost


def cost(config: Config, folder: Path) -> dict[str, Any]:
    """Medians of an update's seconds by phase, of each method, in processes that take turns."""
    if config.phase == "cost_card" and device().type != "cuda":
        raise UserError("--phase cost_card: there is no CUDA card here")
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for number in range(ROUNDS):
        # Each round has other prompts, which are the same for all methods.
        own = replace(config, seed=number)
        for method in METHODS:
            console.print(f"round {number + 1} of {ROUNDS}: {method}")
            turns[method].append(in_a_process_of_its_own(own, folder, method))
    first = turns["ppo"][0]
    looks = [spent for found in turns.values() for turn in found for spent in turn["look"]]
    return {
        "device": first["device"],
        "threads": first["threads"],
        "methods": {name: medians_of(found) for name, found in turns.items()},
        "look_seconds_a_prompt": statistics.median(looks),
    }


def medians_of(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a method's turns: the median of each phase over all updates that count."""
    updates = [update for turn in turns for update in turn["updates"]]
    return {
        "seconds": {
            part: statistics.median(update[part] for update in updates) for part in updates[0]
        },
        "counted": len(updates),
        "peak_memory_gib": max(turn["peak_memory_gib"] for turn in turns),
    }


def in_a_process_of_its_own(config: Config, folder: Path, method: str) -> dict[str, Any]:
    """What `timing` finds of a method. The memory is the most that the process ever took."""
    own = replace(config, phase="timing", method=method, work=str(folder))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(own).items()]
    done = subprocess.run([sys.executable, str(Path(__file__).resolve()), *flags])
    if done.returncode:
        raise UserError(f"the timing of {method} failed: see above")
    return json.loads((folder / f"{name_of(own)}.json").read_text())


def timing(config: Config, folder: Path) -> dict[str, Any]:
    """Seconds of the phases of a few updates; on a CPU those that it worked, not those it waited.

    kl_stop is off, so that each update makes all its steps. All methods have PPO's prompts, one
    answer to each: of prompts of its own, a method of groups would see too few, long or short.
    """
    looks: list[float] = []
    evaluate = ppo_train.evaluate

    def timed(
        config: ppo_train.Config, shared: SharedBase, prompt_format: PromptFormat, *args: Any
    ) -> Evaluation:
        total, prompts, *_ = args  # without the safety probe
        clock = Stopwatch(shared.device)
        found = evaluate(config, shared, prompt_format, total, prompts)
        clock.lap("look")
        looks.append(clock.seconds["look"] / len(found.scores))
        return found

    with contextlib.ExitStack() as stack:
        # Some looks, so that they are timed, but short ones.
        few = replace(config, max_eval_samples=min(16, config.max_eval_samples))
        if config.method == "best_of_n":
            stack.enter_context(looking_at("held-out"))
            updates = time_best_of_n(few)
        else:
            stack.enter_context(mock.patch.object(ppo_train, "evaluate", timed))
            per_update = settings(config).episodes_per_update
            changes = {"total_episodes": TIMED * per_update, "kl_stop": ppo_ablation.NEVER}
            train(few, folder, "held-out", in_groups=False, **changes)
            rows = [row for row in read_jsonl(folder / "metrics.jsonl") if "episode" in row]
            updates = [
                {part: row[f"time/{part}"] for part in ("rollout", "measure", "optimise")}
                for row in rows
            ]
    on_card = device().type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_card else cpu_name(),
        "threads": torch.get_num_threads(),
        "updates": updates[1:],
        "look": looks,
        "peak_memory_gib": peak_memory_gib(),
    }


def time_best_of_n(config: Config) -> list[dict[str, float]]:
    """Seconds to sample as many answers as an update has, and to score them."""
    ppo, prompt_format, shared = load_sampler(config, "reward")
    prompts = ppo_train.load_prompts(ppo, prompt_format).train
    updates = []
    for update in range(1, TIMED + 1):
        queries, seeds = ppo_train.draw_prompts(prompts, update, ppo)
        clock = Stopwatch(shared.device)
        responses = answer(ppo, shared, prompt_format, queries, seeds, ppo.rollout_batch_size)
        clock.lap("rollout")
        everyone = [list(range(len(queries)))]
        batch = make_batch(queries, responses, everyone, prompt_format, shared.device)
        judge(shared, batch, ("reward",))
        clock.lap("measure")
        updates.append(clock.seconds)
    return updates


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
