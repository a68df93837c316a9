"""Phase 3: PPO of the SFT model against the reward model.

In: `checkpoints/sft`, `checkpoints/reward` and prompts. Out: `checkpoints/ppo`, a LoRA adapter in
PEFT's format.

One frozen base carries everything. The SFT adapter on it is the reference; `policy`, `reward` and
`value` are small adapters on its upper layers. Each update, as in "The N+ implementation details of
RLHF with PPO" (2403.17031):

1. Rollout: sample a response to each prompt. It ends at EOS, or where it runs on into the next
   "\\n\\nHuman:".
2. Measure: score each response, and compute each token's log-probability under policy and
   reference, and its value.
3. Reward: per token -kl_coef * (logprob - ref_logprob); at the last token also the score.
   Advantages by GAE, whitened.
4. Optimise: several epochs of clipped policy and value losses over a random partition into
   minibatches, stopped by KL.
5. Adapt the KL coefficient. Every few updates, evaluate on held-out prompts, where a gold reward
   model may judge too. At the start and the end, ask the safety probe whether harmful requests are
   refused (rlhf/reports/probe.py).

    python ppo_train.py
    python ppo_train.py --preset demo

Next: python compare_outputs.py

Shapes: b episodes of this process, N tokens of their texts, n sampled tokens in all of them, R in
the longest response.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import rlhf  # noqa: F401  before the libraries that it sets up

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.optim import Optimizer
from transformers import set_seed

from rlhf.data.format import PromptFormat, tokenize_prompts
from rlhf.data.rows import Pair
from rlhf.data.sources import load_splits
from rlhf.data.splits import cut_selection
from rlhf.data.style import style_of
from rlhf.engine.adapters import read_stacked
from rlhf.engine.base import check_context, same_base
from rlhf.engine.card import (
    Asked,
    Plans,
    Rollouts,
    choose_rollouts,
    choose_tokens,
    deal,
    describe_start,
)
from rlhf.engine.generation import Response, Seed, generate, prepare, step_seconds
from rlhf.engine.loading import load_base
from rlhf.engine.logprobs import TokenLogprobs, logprobs_of
from rlhf.engine.micro_batches import free_memory
from rlhf.engine.plan import Lora, UpdateSizes, plan_ppo, read_shape
from rlhf.engine.roles import REFERENCE, SharedBase
from rlhf.engine.speed import Stopwatch
from rlhf.engine.tokenizers import load_format
from rlhf.ppo import checks
from rlhf.ppo.batch import (
    Batch,
    Measured,
    MicroBatch,
    NotFinite,
    Old,
    count_tokens,
    make_batch,
    restarts_in_smaller_parts,
)
from rlhf.ppo.evaluation import Evaluation, compare, describe
from rlhf.ppo.log import Log, batch_metrics, mean_stats, open_tracker, speed_metrics
from rlhf.ppo.reward_function import RewardFunction, facts_of, load_reward_function
from rlhf.ppo.state import State, inputs_of, save
from rlhf.reports.dry_run import earlier_runs, format_of, room_of, show_data, show_end, show_plan
from rlhf.reports.probe import OPENING_TOKENS, Probe, load_probe, refusal_odds
from rlhf.runs.advice import less_memory, next_command
from rlhf.runs.checkpoints import is_finished, read_parents, sizes_before, start_run
from rlhf.runs.checks import (
    check_above_zero,
    check_between,
    check_numbers,
    check_training,
    check_weight,
)
from rlhf.runs.cli import run
from rlhf.runs.device import choose_dtype, device
from rlhf.runs.folders import check_output, output_folder
from rlhf.runs.processes import (
    agree,
    gather,
    moments,
    num_processes,
    share,
    sum_gradients,
    sum_over_processes,
)
from rlhf.runs.resume import States
from rlhf.runs.run_warnings import clip_warnings, ppo_warnings, said_before, show
from rlhf.runs.stop import until_stopped
from rlhf.runs.terminal import console
from rlhf.runs.trained_prompts import prompt_hashes, report_overlap, trained_by
from rlhf.runs.trial import time_steps


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "checkpoints/sft"  # sets base model, precision and prompt format
    reward_checkpoint: str = "checkpoints/reward"  # trained from that SFT checkpoint
    # a judge of held-out responses: a reward model of the pairs' other --half
    gold_checkpoint: str | None = None
    # a score of your own, as file.py:function with TRL's signature, added to the reward model's
    reward_function: str | None = None
    reward_weight: float = 1.0  # of the reward model's score beside it; 0: the function alone
    # which policy to save: the last, or the one that the gold model scored highest
    keep: Literal["last", "best"] = "last"
    base_model: str | None = None  # where the base is now, if it was moved after SFT
    dataset: str = "Dahoas/rm-static"  # only its prompts are used
    columns: str | None = None  # renames its columns: prompt=question,chosen=good
    output_dir: str = "checkpoints/ppo"  # must be empty or not exist yet
    overwrite: bool = False  # replace what output_dir holds
    resume: bool = False  # continue a run that was stopped or cut short
    dry_run: bool = False  # check data, checkpoints and flags, print a memory plan, and stop
    card_gb: float = 12.0  # size of the card that --dry-run plans for
    measure: bool = False  # with --dry-run: time a few real steps, and estimate the whole run

    max_prompt_length: int = 384  # tokens; longer prompts lose their oldest turns
    response_length: int = 128  # most tokens sampled
    temperature: float = 1.0  # of sampling, and of every log-probability
    max_train_samples: int | None = None  # use only the first N prompts; None: all
    max_eval_samples: int | None = 64  # held-out prompts
    max_steps: int | None = None  # stop after N updates

    # what the base computes in; adapters and heads are fp32
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    gradient_checkpointing: bool = False  # slower, with several times less activation memory
    lora_rank: int = 16  # of the policy; the value adapter has the reward model's
    lora_alpha: int = 32  # LoRA is scaled by alpha / rank
    role_layers: int = 14  # upper layers that the policy adapts; 0: all

    total_episodes: int = 6400  # responses sampled in the whole run
    episodes_per_update: int = 64  # responses per update, over all processes
    num_mini_batches: int = 4  # optimizer steps per epoch over an update's episodes
    num_ppo_epochs: int = 2  # passes over an update's episodes
    # tokens in the model at once; auto: what fits the card
    micro_batch_tokens: int | Literal["auto"] = "auto"
    # responses sampled at once; auto: what fits the card
    rollout_batch_size: int | Literal["auto"] = "auto"
    # sample from a merged 16-bit copy, or from base and adapters
    rollout_weights: Literal["auto", "merged", "base"] = "auto"
    cuda_graphs: bool = True  # decode with CUDA graphs, on a card
    learning_rate: float = 5e-5  # of the policy; decays linearly to 0
    value_learning_rate: float = 5e-5  # of the value model; decays linearly to 0
    warmup_updates: int = 5  # updates until the learning rates peak
    critic_warmup_updates: int = 5  # first updates, in which only the value model learns
    max_grad_norm: float = 1.0  # of each of the two adapters

    kl_coef: float = 0.05  # per token
    # adaptive: Ziegler et al. (1909.08593), section 2.2
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"
    kl_target: float = 6.0  # nats a response
    kl_horizon: int = 1_000  # episodes; the longer, the slower kl_coef adapts
    # end an update's epochs once a minibatch's approxkl (nats a token) passes this
    kl_stop: float = 0.05
    gamma: float = 1.0  # discount per token; 1: none
    lam: float = 0.95  # of GAE: 0 trusts the value model, 1 the sampled score
    cliprange: float = 0.2  # of the policy's ratio around 1
    cliprange_value: float = 0.2  # of the value around the rollout's
    whiten_rewards: bool = False  # scale rewards to variance 1, keeping their mean
    score_clip: float = 5.0  # scores are centred on the SFT policy's mean, then clipped to +- this
    missing_eos_penalty: float = 1.0  # subtracted from the score of a response without EOS

    eval_steps: int = 10  # updates between evaluations on the held-out prompts
    save_minutes: float = 10.0  # minutes between states to resume from: the most a crash can cost
    save_steps: int | None = None  # save every N updates instead
    save_total_limit: int = 2  # how many states to keep
    num_printed_samples: int = 2  # held-out responses printed at each evaluation
    # a tracker to log to, beside metrics.jsonl
    log_with: Literal["tensorboard", "trackio", "wandb"] | None = None
    seed: int = 0  # of initialisation, shuffling and sampling
    preset: Literal["demo"] | None = None  # a named set of values; flags override it

    @property
    def num_updates(self) -> int:
        return min(
            self.total_episodes // self.episodes_per_update, self.max_steps or self.total_episodes
        )


FIRST = (  # flags that --help shows first
    *("sft_checkpoint", "reward_checkpoint", "dataset", "columns", "output_dir"),
    *("overwrite", "resume", "dry_run"),
    *("response_length", "total_episodes", "episodes_per_update", "learning_rate"),
    *("kl_coef", "kl_target", "missing_eos_penalty", "eval_steps"),
)
PRESETS = {
    "demo": Config(
        sft_checkpoint="runs/demo/sft",
        reward_checkpoint="runs/demo/reward",
        dataset="demo/data",
        output_dir="runs/demo/ppo",
        max_prompt_length=128,
        response_length=48,
        max_eval_samples=80,
        role_layers=15,
        temperature=0.7,
        total_episodes=384,
        episodes_per_update=32,
        rollout_batch_size=40,
        learning_rate=1e-3,
        value_learning_rate=2e-3,
        warmup_updates=3,
        critic_warmup_updates=1,
        kl_coef=0.02,
        kl_horizon=10_000,
        eval_steps=6,
    )
}


Sums = dict[str, Tensor]  # of statistics over tokens, each a scalar on the device


@dataclass(frozen=True)
class Prompts:
    """A run's prompts, each as token ids."""

    train: list[list[int]]
    held_out: list[list[int]]
    selection: list[list[int]]  # those that `--keep best` chooses the policy by; else none
    chosen_style: dict[str, float]  # of the answers that people chose for the held-out ones
    hashes: np.ndarray  # `prompt_hashes` of those to train on

    @property
    def looked_at(self) -> list[list[int]]:
        """Those that the looks on the way answer."""
        return self.selection or self.held_out


# ---------------------------------------------------------------- the algorithm


def main(config: Config) -> None:
    started = time.monotonic()
    flags = asdict(config)
    check_flags(config)
    function = load_reward_function(config.reward_function)
    folders = config.sft_checkpoint, config.reward_checkpoint, config.gold_checkpoint
    runs = foresee(config) if config.dry_run else read_parents(*folders)
    inputs = *folders, runs["sft"]["base"]["model"], config.base_model, config.dataset
    inputs += (function and function.path,)
    check_output(config.output_dir, config.overwrite, *inputs, resume=config.resume)
    if config.resume and is_finished(config.output_dir, flags):
        return
    show(said_before(runs))
    if config.dry_run:
        dry_run(config, runs)
        return
    prompt_format = load_format(config.sft_checkpoint, runs["sft"])
    prompts = load_prompts(config, prompt_format)
    room = config.max_prompt_length + config.response_length
    probe = load_probe(prompt_format, room, OPENING_TOKENS)
    shared, base, sizes = prepare_base(config, runs, prompt_format, prompts)
    optimizer = make_optimizer(shared, config.learning_rate, config.value_learning_rate)
    scaler = GradScaler(shared.device.type, enabled=shared.dtype == torch.float16)
    sets = prompts.train, prompts.held_out, *([prompts.selection] if prompts.selection else [])
    given = inputs_of(runs, function, sets, shared.dtype)
    total = partial(total_scores, config, function, prompt_format)

    with (
        output_folder(config.output_dir, config.resume) as folder,
        open_log(config, folder, prompts.chosen_style) as log,
        State(
            States(folder, flags, given), config.kl_coef, shared, optimizer, scaler, log
        ) as state,
    ):
        facts = facts_of(function)
        start_run(folder, "ppo", flags, shared.dtype, **sizes, **facts)
        look = partial(evaluate, config, shared, prompt_format, total)
        if not state.sft:
            state.held_out = look(prompts.held_out, probe)  # the new policy equals SFT's
            state.sft = look(prompts.selection) if prompts.selection else state.held_out
            log.evaluation(0, state.sft, prompts.looked_at, prompt_format)
        baseline = state.sft.scores.mean().item()
        show(clip_warnings((state.sft.scores - baseline).tolist(), config.score_clip))
        kl_coef = state.kl_coef
        episodes = config.episodes_per_update

        for update in range(state.update + 1, config.num_updates + 1):
            # 1. Rollout
            clock = Stopwatch(shared.device)
            queries, seeds = draw_prompts(prompts.train, update, config)
            responses = rollout(config, shared, prompt_format, queries, seeds)
            clock.lap("rollout")
            # 2. Measure
            shared.micro_batch.agree()
            minibatches = draw_minibatches(update, config)
            batch = make_batch(queries, responses, minibatches, prompt_format, shared.device)
            measured = measure(shared, batch, config.temperature, baseline)
            measured = replace(measured, scores=total(measured.scores, batch))
            clock.lap("measure")
            # 3. Reward
            advantages, returns = advantages_and_returns(batch, measured, kl_coef, baseline, config)
            # 4. Optimise
            set_learning_rates(optimizer, update, config)
            old = Old.of(measured, advantages, returns, shared.device)
            stats = optimise(config, shared, batch, old, baseline, optimizer, scaler, update)
            clock.lap("optimise")
            # 5. Adapt and report
            penalty = config.missing_eos_penalty
            row = batch_metrics(batch, measured, returns, update, kl_coef, episodes, penalty)
            speed = speed_metrics(shared, batch, stats, clock.seconds, config.num_mini_batches)
            log.update(row | stats | speed)
            # Before the policy's first update KL is 0.
            if config.kl_controller == "adaptive" and update > config.critic_warmup_updates + 1:
                kl = measured.mean_kl(batch)
                kl_coef = adapt_kl_coef(kl_coef, kl, config.kl_target, episodes, config.kl_horizon)
            del measured, old  # their lower states make room for what is sampled next
            is_last = update == config.num_updates
            if is_last or update % config.eval_steps == 0:
                asked = probe if is_last and not prompts.selection else None
                last = look(prompts.looked_at, asked)
                log.evaluation(update, last, prompts.looked_at, prompt_format)
                if prompts.selection:
                    state.keep_if_best(update, last)
            state.done(update, kl_coef)

        if prompts.selection:
            console.print(state.restore_best())
            last = look(prompts.held_out, probe)
        metrics = compare(state.held_out, last) | prompts.chosen_style
        metrics["warnings"] = ppo_warnings(metrics)
        console.print(describe(metrics))
        facts |= {"metrics": metrics, "trained_prompts": prompts.hashes, **state.facts_of_best()}
        save(folder, flags, shared, prompt_format, base, runs, started, log, **facts)
    console.print(f"Saved {config.output_dir} after {time.monotonic() - started:.0f} s.")
    show(metrics["warnings"])
    console.print(f"Next: {next_command('compare_outputs.py', flags, 'ppo')}")


def draw_prompts(
    prompts: list[list[int]], update: int, config: Config
) -> tuple[list[list[int]], list[Seed]]:
    """An update's prompts, and one sampling seed for each episode.

    An epoch over all prompts has each of them once. Both depend only on the seed and the episode's
    number.
    """
    queries = []
    seeds = []
    count = config.episodes_per_update
    for episode in range((update - 1) * count, update * count):
        epoch, place = divmod(episode, len(prompts))
        order = np.random.default_rng((config.seed, 1, epoch)).permutation(len(prompts))
        queries.append(prompts[order[place]])
        seeds.append((config.seed, 2, episode))
    return queries, seeds


def draw_minibatches(update: int, config: Config) -> list[list[int]]:
    """A random partition of an update's episodes, the same for all its epochs."""
    order = np.random.default_rng((config.seed, 3, update)).permutation(config.episodes_per_update)
    return [part.tolist() for part in np.split(order, config.num_mini_batches)]


def rollout(
    config: Config,
    shared: SharedBase,
    prompt_format: PromptFormat,
    prompts: list[list[int]],
    seeds: list[Seed],
) -> list[Response]:
    """Sample one response to each prompt from the policy as it is now."""
    if shared.merged:
        shared.merge("policy")
    rows = shared.rollout_rows or len(prompts)
    settings = config.response_length, config.temperature, share(seeds), rows
    return gather(generate(shared, "policy", prompt_format, share(prompts), *settings))


@torch.no_grad()
@restarts_in_smaller_parts
def measure(shared: SharedBase, batch: Batch, temperature: float, baseline: float) -> Measured:
    """What each role says of the batch. The lower layers run once, for all roles and epochs.

    Raises:
        NotFinite: some of the numbers are not finite.
    """
    shape = sum(map(len, batch.texts)), shared.lm_head_weight().shape[1]
    lower = torch.empty(shape, dtype=shared.dtype, device=shared.device)
    columns: dict[str, list[Tensor]] = {}
    micro_batches = chain(*batch.micro_batches(shared.micro_batch.tokens))
    for micro in until_stopped(micro_batches):
        below = shared.lower(micro.texts)
        lower[micro.text_tokens] = below
        policy = token_logprobs(shared, "policy", micro, below, temperature, statistics=True)
        reference = token_logprobs(shared, REFERENCE, micro, below, temperature)
        said = {
            "logprobs": policy.logprobs,
            "ref_logprobs": reference.logprobs,
            "entropy": policy.entropy,
            "values": token_values(shared, micro, below, baseline),
            "scores": score(shared, "reward", micro, below),
        }
        for name, numbers in said.items():
            columns.setdefault(name, []).append(numbers)
    # One transfer for all numbers that the formulas take on the CPU.
    flat = [torch.cat(column) for column in columns.values()]
    on_cpu = torch.cat(flat).cpu().split([len(column) for column in flat])
    measured = Measured(lower, **dict(zip(columns, on_cpu, strict=True)))
    measured.check_finite(batch)
    return measured


def total_scores(
    config: Config,
    function: RewardFunction | None,
    prompt_format: PromptFormat,
    scores: Tensor,
    batch: Batch,
) -> Tensor:
    """The scores [b] that PPO trains for: the reward model's, plus the reward function's if any."""
    if function is None:
        return scores
    prompts = [prompt_format.read_prompt(prompt) for prompt in batch.prompts]
    completions = [prompt_format.decode(response.text_ids) for response in batch.responses]
    return config.reward_weight * scores + function(prompts, completions)


def score(shared: SharedBase, role: str, micro: MicroBatch, lower: Tensor) -> Tensor:
    """The scores [texts] of reward model `role`, read at each text's EOS, float32."""
    return shared.heads[role](shared.upper(lower, micro.texts, role)[micro.texts.last]).squeeze(-1)


def token_logprobs(
    shared: SharedBase,
    role: str,
    micro: MicroBatch,
    lower: Tensor,
    temperature: float,
    statistics: bool = False,
) -> TokenLogprobs:
    """Log-probability [n] of each sampled token under `role`; with `statistics` also the entropy.

    Measuring and optimising both go through here with the same micro-batches. In bf16, another
    padding or batch size alone would move the ratio away from 1.
    """
    hidden = shared.upper(lower, micro.texts, role)[micro.positions]
    return logprobs_of(hidden, shared.lm_head_weight(), micro.actions, temperature, statistics)


def token_values(shared: SharedBase, micro: MicroBatch, lower: Tensor, baseline: float) -> Tensor:
    """The value [n] before each sampled token.

    The head is copied from the reward model and predicts raw scores, so they are centred here.
    """
    hidden = shared.upper(lower, micro.texts, "value")[micro.positions]
    return shared.heads["value"](hidden).squeeze(-1) - baseline


def advantages_and_returns(
    batch: Batch, measured: Measured, kl_coef: float, baseline: float, config: Config
) -> tuple[Tensor, Tensor]:
    """Advantages, whitened over the update's tokens, and returns, both [n], from scores and KL."""
    advantages, returns = gae(
        rewards_of(batch, measured, kl_coef, baseline, config),
        batch.by_response(measured.values),
        batch.response_mask,
        config.gamma,
        config.lam,
    )
    return whiten(batch.end_to_end(advantages)), batch.end_to_end(returns)


def rewards_of(
    batch: Batch, measured: Measured, kl_coef: float, baseline: float, config: Config
) -> Tensor:
    """Each token's reward [b, R]: what its KL costs, and at the last the centred score."""
    mask = batch.response_mask
    scores = (measured.scores - baseline).clamp(-config.score_clip, config.score_clip)
    scores = scores - config.missing_eos_penalty * (~batch.ended).float()
    kl = batch.by_response(measured.logprobs - measured.ref_logprobs)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    if config.whiten_rewards:
        rewards = batch.by_response(whiten(batch.end_to_end(rewards), shift_mean=False))
    return rewards


def optimise(
    config: Config,
    shared: SharedBase,
    batch: Batch,
    old: Old,
    baseline: float,
    optimizer: Optimizer,
    scaler: GradScaler,
    update: int,
) -> dict[str, float]:
    """Epochs over the batch; each minibatch is one step. Returns mean statistics.

    In the first updates, only the value model learns.
    """
    policy = partial(policy_losses, shared, old, config.temperature, config.cliprange)
    value = partial(value_losses, shared, old, baseline, config.cliprange_value)
    history: list[dict[str, float]] = []
    minibatches = list(enumerate(count_tokens(batch))) * config.num_ppo_epochs
    for minibatch, tokens in until_stopped(minibatches, together=True):
        sums: Sums = {}
        if update > config.critic_warmup_updates:
            sums |= backward(shared, batch, "policy", policy, minibatch, tokens, scaler)
            # In smaller micro-batches, rounding alone moves the ratio.
            if history or shared.micro_batch.halved:
                sums["ratio_off"].zero_()
        sums |= backward(shared, batch, "value", value, minibatch, tokens, scaler)
        norms = clip(optimizer, scaler, config.max_grad_norm)
        stats = read(sums, tokens, norms)
        if stats.pop("ratio_off", 0.0):
            raise RuntimeError(
                "the ratio is off 1 before the first step: measuring and optimising disagree"
            )
        if stats.get("policy/approxkl_avg", 0.0) > config.kl_stop:
            optimizer.zero_grad()
            scaler.update()
            break
        step(optimizer, scaler, stats)
        history.append({name: value for name, value in stats.items() if math.isfinite(value)})
    return mean_stats(history)


@restarts_in_smaller_parts
def backward(
    shared: SharedBase,
    batch: Batch,
    role: str,
    losses: Callable[[MicroBatch], tuple[Tensor, dict[str, Tensor]]],
    minibatch: int,
    tokens: float,
    scaler: GradScaler,
) -> Sums:
    """Compute `role`'s gradients over a minibatch; return sums of statistics over its tokens.

    The sums are over this process's tokens.

    Args:
        losses: from a micro-batch, the loss [n] of each token, and statistics of each.
        tokens: of the minibatch, over all processes; the loss is the mean over them.
    """
    shared.drop_gradients(role)  # of an attempt that ran out of memory
    sums: Sums = {}
    for micro in batch.micro_batches(shared.micro_batch.tokens)[minibatch]:
        loss, statistics = losses(micro)
        scaler.scale(loss.sum() / tokens).backward()
        for name, numbers in statistics.items():
            sums[name] = sums.get(name, 0.0) + numbers.detach().sum()
    return sums


def policy_losses(
    shared: SharedBase, old: Old, temperature: float, cliprange: float, micro: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of a micro-batch, under the policy as it is now."""
    lower = old.lower[micro.text_tokens]
    logprobs = token_logprobs(shared, "policy", micro, lower, temperature).logprobs
    return policy_loss(
        logprobs, old.logprobs[micro.tokens], old.advantages[micro.tokens], cliprange
    )


def value_losses(
    shared: SharedBase, old: Old, baseline: float, cliprange_value: float, micro: MicroBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """`value_loss` of a micro-batch, under the value model as it is now."""
    values = token_values(shared, micro, old.lower[micro.text_tokens], baseline)
    return value_loss(values, old.values[micro.tokens], old.returns[micro.tokens], cliprange_value)


def clip(optimizer: Optimizer, scaler: GradScaler, max_grad_norm: float) -> dict[str, Tensor]:
    """Sum gradients over all processes, and clip policy's and value's, each to `max_grad_norm`.

    Returns their norms.
    """
    for group in optimizer.param_groups:
        sum_gradients(group["params"])
    scaler.unscale_(optimizer)
    return {
        f"{group['name']}/grad_norm": torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
        for group in optimizer.param_groups
    }


def read(sums: Sums, tokens: float, norms: dict[str, Tensor]) -> dict[str, float]:
    """Means over all processes' tokens, and the norms: a minibatch's only wait for the device."""
    means = sum_over_processes(torch.stack(list(sums.values()))) / tokens
    # A norm without gradients is 0, on the CPU.
    numbers = torch.cat([means, torch.stack([norm.to(means) for norm in norms.values()])])
    return dict(zip([*sums, *norms], numbers.tolist(), strict=True))


def step(optimizer: Optimizer, scaler: GradScaler, stats: dict[str, float]) -> None:
    """Make the clipped step. Raises NotFinite if the gradient norms in `stats` are not finite.

    With fp16, the scaler skips such a step and halves its scale, as long as that is at least 1.
    """
    for group in optimizer.param_groups:
        finite = math.isfinite(stats[f"{group['name']}/grad_norm"])
        if not finite and not (scaler.is_enabled() and scaler.get_scale() >= 1):
            raise NotFinite(f"the {group['name']} gradient is not finite; lower its learning rate")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


@torch.no_grad()
def evaluate(
    config: Config,
    shared: SharedBase,
    prompt_format: PromptFormat,
    total: Callable[[Tensor, Batch], Tensor],
    prompts: list[list[int]],
    probe: Probe | None = None,
) -> Evaluation:
    """Sample from the policy on held-out prompts, always with the same seeds.

    Args:
        total: turns the reward model's scores into those that PPO trains for.
        probe: the safety probe, with the openings of its answers, if it is to be asked.
    """
    responses = rollout(
        config, shared, prompt_format, prompts, [(0, 4, i) for i in range(len(prompts))]
    )
    batch = make_batch(
        prompts, responses, [list(range(len(prompts)))], prompt_format, shared.device
    )
    judges = ["reward", "gold"] if config.gold_checkpoint else ["reward"]

    kl, entropy, *scores = measure_held_out(shared, batch, judges, config.temperature)
    scores[0] = total(scores[0], batch)
    numbers = torch.zeros(2 + len(judges), len(prompts))
    numbers[0, batch.rows] = batch.by_response(kl).sum(1)
    numbers[1, batch.rows] = batch.by_response(entropy).sum(1) / torch.tensor(
        batch.response_lengths
    )
    numbers[2:, batch.rows] = torch.stack(scores)
    kl, entropy, scores, *gold_scores = sum_over_processes(numbers.to(shared.device)).cpu()
    texts = [prompt_format.decode(response.text_ids) for response in responses]
    odds = refusal_odds(shared, "policy", probe) if probe else {}
    refusals = {"refusal_odds": odds.get("harmful"), "overrefusal_odds": odds.get("harmless")}
    return Evaluation(responses, texts, scores, kl, entropy, *gold_scores, **refusals)


@torch.no_grad()
@restarts_in_smaller_parts
def measure_held_out(
    shared: SharedBase, batch: Batch, judges: list[str], temperature: float
) -> list[Tensor]:
    """KL and entropy of the policy [n], and each judge's scores [b], on the CPU."""
    columns: list[list[Tensor]] = [[] for _ in range(2 + len(judges))]
    micro_batches = chain(*batch.micro_batches(shared.micro_batch.tokens))
    for micro in until_stopped(micro_batches):
        lower = shared.lower(micro.texts)
        policy = token_logprobs(shared, "policy", micro, lower, temperature, statistics=True)
        reference = token_logprobs(shared, REFERENCE, micro, lower, temperature)
        said = [policy.logprobs - reference.logprobs, policy.entropy]
        said += [score(shared, judge, micro, lower) for judge in judges]
        for column, numbers in zip(columns, said, strict=True):
            column.append(numbers)
    return [torch.cat(column or [torch.empty(0)]).cpu() for column in columns]


# ---------------------------------------------------------------- the formulas


def token_rewards(score: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef * kl at each token, and the score [b] at the last one.

    Args:
        kl: [b, R] logprob - ref_logprob, in nats (the k1 estimate).
    Returns:
        [b, R], 0 at padding.
    """
    rewards = -kl_coef * kl * response_mask
    last = response_mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, score[:, None])


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438), backwards from a value of 0 after the end.

    Returns:
        advantages and returns (advantages + values), both [b, R], 0 at padding.
    """
    advantages = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(after)
    for t in reversed(range(rewards.shape[1])):
        real = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        after = torch.where(real, delta + gamma * lam * after, 0.0)
        next_value = torch.where(real, values[:, t], 0.0)
        advantages[:, t] = after
    return advantages, (advantages + values) * response_mask


def whiten(values: Tensor, shift_mean: bool = True) -> Tensor:
    """Scale [n] to variance 1 over all processes, and shift to mean 0 unless told otherwise."""
    mean, variance = moments(values)
    return (values - mean) * (variance + 1e-8).rsqrt() + (0.0 if shift_mean else mean)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (1707.06347, eq. 7) of each token [n], and each token's statistics."""
    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(loss, clipped_loss)
    return losses, {
        "loss/policy_avg": losses,
        "policy/approxkl_avg": ratio - 1 - log_ratio,  # "k3": unbiased and never negative
        "policy/clipfrac_avg": (clipped_loss > loss).float(),
        "val/ratio": ratio,
        "ratio_off": ((ratio - 1).abs() > 1e-4).float(),  # must be 0 before the first step
    }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error of each token [n], clipped around the old values, and statistics."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error = (values - returns).square()
    clipped_error = (clipped - returns).square()
    losses = 0.5 * torch.maximum(error, clipped_error)
    return losses, {"loss/value_avg": losses, "val/clipfrac_avg": (clipped_error > error).float()}


def adapt_kl_coef(
    kl_coef: float, kl: float, kl_target: float, episodes: int, kl_horizon: int
) -> float:
    """Move the coefficient so that KL approaches `kl_target` nats a response (1909.08593, 2.2).

    Args:
        episodes: of an update; `kl_horizon` is counted in them.
    """
    # `check_kl_horizon` rests on this 0.2: the factor below stays positive.
    error = min(max(kl / kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / kl_horizon)


def set_learning_rates(optimizer: Optimizer, update: int, config: Config) -> None:
    """Linear warm-up over `warmup_updates`, then linear decay to 0.

    The policy's warm-up begins after the updates in which the critic learns alone.
    """
    for group in optimizer.param_groups:
        trained = update - (config.critic_warmup_updates if group["name"] == "policy" else 0)
        warmup = min(1.0, max(0, trained) / max(1, config.warmup_updates))
        group["lr"] = group["peak_lr"] * warmup * (1 - (update - 1) / config.num_updates)


# ---------------------------------------------------------------- before the first update


def check_flags(config: Config) -> None:
    """Raise UserError for flags that are out of range or do not go together."""
    checks.check_not_sharded()
    check_training(config.log_with, config.dry_run, config.measure)
    check_above_zero(temperature=config.temperature)
    check_numbers(vars(config))
    check_weight(config.reward_weight, config.reward_function)
    checks.check_judge(config.keep, config.gold_checkpoint)
    checks.check_kl_horizon(config.kl_controller, config.kl_horizon, config.episodes_per_update)
    checks.check_minibatches(config.episodes_per_update, config.num_mini_batches)
    checks.check_episodes(config.total_episodes, config.episodes_per_update)
    checks.check_critic_warmup(config.critic_warmup_updates, config.num_updates, config.max_steps)


def foresee(config: Config) -> dict[str, dict[str, Any]]:
    """Each checkpoint's run.json by role, or what a plan needs of one that is not there yet."""
    import reward_train
    import sft_train

    folders = {
        "sft": config.sft_checkpoint,
        "reward": config.reward_checkpoint,
        "gold": config.gold_checkpoint,
    }
    scripts = {"sft": sft_train, "reward": reward_train}
    return earlier_runs(folders, scripts, config.base_model, config.measure)


def dry_run(config: Config, runs: dict[str, dict[str, Any]]) -> None:
    """Print prompts, updates and the memory plan."""
    base = same_base(runs["sft"], config.sft_checkpoint, config.base_model)
    prompt_format = format_of(config.sft_checkpoint, runs["sft"])
    prompts = load_prompts(config, prompt_format)
    if prompts.selection:
        apart = len(prompts.selection)
        console.print(f"prompts set apart from these to choose a policy by: {apart}")
    show_data("prompts", [len(prompt) for prompt in prompts.train])
    console.print(f"held-out prompts: {len(prompts.held_out)}")
    console.print(
        f"updates: {config.num_updates} of {config.episodes_per_update} responses of up to "
        f"{config.response_length} tokens, {config.num_ppo_epochs * config.num_mini_batches} "
        "optimizer steps each"
    )
    check_between(0, read_shape(base, config.dtype).layers, role_layers=config.role_layers)
    longest = max(map(len, prompts.train))
    length = longest + config.response_length + 1
    check_context(base, length, "--max-prompt-length", "--response-length")
    plans = make_plans(config, base, runs, longest)
    episodes = config.episodes_per_update // num_processes()
    rollouts = deal(plans, asked_of(config), episodes, length, room_of(config.card_gb))
    weights = "a merged 16-bit copy" if rollouts.merged else "the base with its adapters"
    kept = ", their keys and values kept for the next" if rollouts.kept else ""
    console.print(f"rollouts: {rollouts.rows} responses at a time, from {weights}{kept}")
    advice = less_memory(vars(config))
    show_plan(plans(rollouts), config.micro_batch_tokens, length, config.card_gb, advice)
    if config.reward_function:
        console.print("The plan does not include what --reward-function needs.")
    if config.measure:
        time_steps(main, config, config.num_updates)
    show_end(config.measure)


def make_plans(
    config: Config, base: dict[str, Any], runs: dict[str, dict[str, Any]], longest: int
) -> Plans:
    """The memory plan by rollouts and tokens of a micro-batch.

    Args:
        longest: tokens of the longest prompt.
    """
    adapters = {role: Lora.of(run) for role, run in runs.items()}
    adapters["policy"] = Lora(config.lora_rank, config.role_layers)
    episodes = config.episodes_per_update // num_processes()
    update = UpdateSizes(episodes, config.num_mini_batches, longest, config.response_length)
    shape = read_shape(base, config.dtype)
    return lambda rollouts: partial(
        plan_ppo, shape, adapters, update, config.gradient_checkpointing, rollouts
    )


def asked_of(config: Config) -> Asked:
    return Asked(config.rollout_batch_size, config.rollout_weights, config.micro_batch_tokens)


def prepare_base(
    config: Config,
    runs: dict[str, dict[str, Any]],
    prompt_format: PromptFormat,
    prompts: Prompts,
) -> tuple[SharedBase, dict[str, Any], dict[str, Any]]:
    """The shared base, ready to sample; its identity; and the sizes that it runs with, by name.

    Sizes are chosen before anything is loaded, as they depend on what is free then.
    """
    before = sizes_before(config.output_dir, config.resume)
    tokens, why, rollouts = choose_sizes(config, runs, prompts, before)
    shared, base = load_models(config, runs["sft"], prompt_format)
    shared.micro_batch.tokens = tokens
    shared.rollout_rows = rollouts.rows
    longest = max(map(len, prompts.train + prompts.held_out + prompts.selection))
    if rollouts.merged:
        choose_weights(config, shared, longest, resumed=before is not None)
    if rollouts.kept:
        sampling = longest, config.response_length, config.temperature
        shared.decoding = prepare(shared, "policy", rollouts.rows, *sampling)
    rows = config.episodes_per_update // config.num_mini_batches
    console.print(describe_start(shared.device, tokens, rows, shared.dtype, why))
    kept = ", keys and values kept between them" if shared.decoding else ""
    console.print(
        f"rollouts of {rollouts.rows} responses at a time, from {shared.rollout_weights} "
        f"weights{kept}"
    )
    sizes = {"micro_batch_tokens": tokens, "rollout_rows": rollouts.rows}
    sizes |= {"rollouts_kept": rollouts.kept, "rollout_weights": shared.rollout_weights}
    return shared, base, sizes


def choose_sizes(
    config: Config,
    runs: dict[str, dict[str, Any]],
    prompts: Prompts,
    before: dict[str, Any] | None,
) -> tuple[int, str, Rollouts]:
    """Tokens of a micro-batch and why so many, and how responses are sampled.

    Args:
        before: the sizes that the run began with, if it is resumed.
    """
    base = same_base(runs["sft"], config.sft_checkpoint, config.base_model)
    longest = max(map(len, prompts.train))
    length = longest + config.response_length + 1
    judged = prompts.held_out + prompts.selection
    most = max(longest, *map(len, judged)) + config.response_length + 1
    check_context(base, most, "--max-prompt-length", "--response-length")
    plans = make_plans(config, base, runs, longest)
    episodes = config.episodes_per_update // num_processes()
    rollouts = choose_rollouts(plans, asked_of(config), episodes, length, device(), before)
    advice = less_memory(vars(config))
    asked = config.micro_batch_tokens
    tokens, why = choose_tokens(plans(rollouts), asked, length, device(), before, advice)
    return tokens, why, rollouts


def choose_weights(config: Config, shared: SharedBase, longest: int, resumed: bool) -> None:
    """Merge a copy of the base to sample from, if that is faster here.

    Args:
        longest: tokens of the longest prompt.
        resumed: whether the run has chosen already.
    """
    shared.merge("policy")
    if config.rollout_weights == "merged" or resumed or shared.device.type != "cuda":
        return
    shape = shared.rollout_rows, longest
    ours, theirs = (
        step_seconds(shared, "policy", layers, *shape)
        for layers in (shared.merged.layers, shared.decoder.layers)
    )
    if agree(ours >= theirs):
        shared.merged = None
    free_memory()


def load_models(
    config: Config, sft: dict[str, Any], prompt_format: PromptFormat
) -> tuple[SharedBase, dict[str, Any]]:
    """The shared base with its roles, of which policy and value learn, and the base's identity."""
    dtype = choose_dtype(config.dtype, device())
    base = same_base(sft, config.sft_checkpoint, config.base_model)
    set_seed(config.seed)
    model = load_base(base, dtype, prompt_format.pad_token_id)
    shared = SharedBase(model, config.sft_checkpoint, dtype)
    shared.decoder.gradient_checkpointing = config.gradient_checkpointing
    shared.graphs.enabled = shared.graphs.enabled and config.cuda_graphs
    scorer = read_stacked(config.reward_checkpoint, shared)
    shared.add_role("reward", **scorer)
    shared.add_role("value", **scorer)
    shared.add_role("policy", config.lora_rank, config.lora_alpha, config.role_layers)
    if config.gold_checkpoint:
        shared.add_role("gold", **read_stacked(config.gold_checkpoint, shared))
    shared.train("policy", "value")
    return shared, base


def load_prompts(config: Config, prompt_format: PromptFormat) -> Prompts:
    """Read and tokenize the prompts; say which held-out ones were trained on."""
    pairs, held_out = load_splits(
        config.dataset, "prompt", config.columns, config.max_train_samples, config.max_eval_samples
    )
    selection: list[Pair] = []
    if config.keep == "best":
        pairs, selection = cut_selection(pairs, len(held_out))
    hashes = prompt_hashes(pair.turns for pair in pairs)
    folders = {
        "sft": config.sft_checkpoint,
        "reward": config.reward_checkpoint,
        "gold": config.gold_checkpoint,
    }
    report_overlap((pair.turns for pair in held_out), trained_by(folders) | {"ppo": hashes})
    train, judged, selected = (
        tokenize_prompts(rows, prompt_format, config.max_prompt_length) if rows else []
        for rows in (pairs, held_out, selection)
    )
    answers = [pair.chosen for pair in held_out if pair.chosen]
    style = style_of(answers) if answers else {}
    style = {f"chosen_{name}": share for name, share in style.items()}
    return Prompts(train, judged, selected, style, hashes)


def make_optimizer(
    shared: SharedBase, learning_rate: float, value_learning_rate: float
) -> Optimizer:
    """AdamW with a group for each of policy and value; `set_learning_rates` scales their peaks."""
    peaks = {"policy": learning_rate, "value": value_learning_rate}
    groups = [
        {"name": role, "params": shared.parameters(role), "peak_lr": peak}
        for role, peak in peaks.items()
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
    shared.decoder.follow(optimizer)
    return optimizer


def open_log(config: Config, folder: Path, chosen_style: dict[str, float]) -> Log:
    return Log(
        folder,
        config.num_updates,
        config.num_printed_samples,
        config.missing_eos_penalty,
        chosen_style,
        open_tracker(config.log_with, folder, asdict(config)),
    )


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__, FIRST)
