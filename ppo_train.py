"""Phase 3: PPO of the SFT model against the reward model.

In: `checkpoints/sft`, `checkpoints/reward` and prompts. Out: `checkpoints/ppo`, a LoRA adapter in PEFT's format.

One frozen base carries everything. The SFT adapter on it is the reference; `policy`, `reward` and `value` are small
adapters on its upper layers. Each update, as in "The N+ implementation details of RLHF with PPO" (2403.17031):

1. Rollout: sample a response to each prompt; it ends at EOS or where it runs on into the next "\\n\\nHuman:".
2. Measure: score each response, and compute each token's log-probability under policy and reference, and its value.
3. Reward: per token -kl_coef * (logprob - ref_logprob); at the last token also the score. Advantages by GAE, whitened.
4. Optimise: several epochs of clipped policy and value losses over exact minibatches, stopped early by KL.
5. Adapt the KL coefficient; every few updates, look at held-out prompts, where a gold reward model may judge, too.

    python ppo_train.py
    python ppo_train.py --preset demo

Next: python compare_outputs.py

Shapes: b rows of a micro-batch, N tokens of their texts, R tokens of the longest response.
"""

import time
from dataclasses import dataclass
from typing import Any, Literal

from rlhf.checkpoints import check_output, is_finished, output_folder, read_parents
from rlhf.cli import next_command, run
from rlhf.data import PromptFormat, load_pairs, tokenize_prompts
from rlhf.generation import Response, Seed, generate
from rlhf.logprobs import chosen_logprobs
from rlhf.modeling import SharedBase, choose_dtype, load_base, load_format, read_stacked, same_base
from rlhf.plan import dry_run_ppo
from rlhf.ppo_batch import MicroBatch, NotFinite, check_finite, fit, make_micro_batches, mean_kl, num_tokens, pick
from rlhf.ppo_eval import Evaluation, compare, describe, warnings
from rlhf.ppo_log import Log, add_means, batch_metrics, mean_stats
from rlhf.ppo_state import State, save
from rlhf.processes import gather, moments, num_processes, share, sum_gradients, total, totals
from rlhf.reporting import console
from rlhf.resume import check_stop
from rlhf.training import check_ppo_numbers, device

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed


@dataclass(frozen=True)
class Config:
    sft_checkpoint: str = "checkpoints/sft"  # its base model, precision and prompt format are taken over
    reward_checkpoint: str = "checkpoints/reward"  # trained from that SFT checkpoint
    gold_checkpoint: str | None = None  # a judge of held-out responses: a reward model of the pairs' other --half
    base_model: str | None = None  # where the base is now, if not where the SFT checkpoint says
    dataset: str = "Dahoas/rm-static"  # only its prompts are used
    output_dir: str = "checkpoints/ppo"  # a folder that is empty or not there yet
    overwrite: bool = False  # replace what output_dir holds
    resume: bool = False  # go on with a run that was stopped or cut short
    dry_run: bool = False  # check data, checkpoints and flags, print the plan for a card, and stop
    card_gb: float = 12.0  # the card that --dry-run plans for

    max_prompt_length: int = 384  # tokens; longer prompts are cut from the left at a turn boundary
    response_length: int = 128  # tokens sampled at most
    temperature: float = 1.0  # of sampling, and of every log-probability
    max_train_samples: int | None = None  # the first so many prompts; None: all
    max_eval_samples: int | None = 64  # held-out prompts
    max_steps: int | None = None  # stop after so many updates

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # what the base computes in; adapters and heads are fp32
    gradient_checkpointing: bool = False  # slower, with several times less activation memory
    lora_rank: int = 16  # of the policy; the value adapter has the reward model's
    lora_alpha: int = 32  # LoRA is scaled by alpha / rank
    role_layers: int = 14  # upper layers that the policy adapts; 0: all

    total_episodes: int = 6400  # responses sampled in the whole run
    per_device_train_batch_size: int = 4  # rows of a micro-batch
    gradient_accumulation_steps: int = 4  # micro-batches of a minibatch
    num_mini_batches: int = 4  # minibatches, each one optimizer step, of an epoch; an update has 4 x 4 x 4 episodes
    num_ppo_epochs: int = 2  # passes over an update's episodes
    rollout_batch_size: int = 32  # rows sampled at a time
    learning_rate: float = 5e-5  # of the policy; linear to 0
    value_learning_rate: float = 5e-5  # of the value adapter and head; linear to 0
    warmup_updates: int = 5  # updates until the rates are at their peak
    critic_warmup_updates: int = 5  # at the start only the value model learns
    max_grad_norm: float = 1.0  # of each of the two adapters

    kl_coef: float = 0.05  # per token
    kl_controller: Literal["adaptive", "fixed"] = "adaptive"  # adaptive: Ziegler et al. (1909.08593), section 2.2
    kl_target: float = 6.0  # nats a response
    kl_horizon: int = 1_000  # episodes; if far more than the run has, the coefficient hardly moves
    kl_stop: float = 0.05  # end an update's epochs when a minibatch's approxkl, nats a token, passes this
    gamma: float = 1.0  # discount a token; 1: the whole response counts alike
    lam: float = 0.95  # of GAE: 0 trusts the value model, 1 the sampled score
    cliprange: float = 0.2  # of the policy's ratio around 1
    cliprange_value: float = 0.2  # of the value around the rollout's
    whiten_rewards: bool = False  # scales them to variance 1, keeping the mean
    score_clip: float = 5.0  # scores are centred on the SFT policy's mean, then clipped to +- this
    missing_eos_penalty: float = 1.0  # taken from the score of a response that did not end by EOS

    eval_steps: int = 10  # updates between looks at the held-out prompts
    save_steps: int = 1  # updates between states to resume from; a crash costs at most so many
    save_total_limit: int = 2  # states kept
    num_printed_samples: int = 2  # held-out responses shown at each look
    log_with: Literal["tensorboard", "trackio", "wandb"] | None = None  # a tracker beside metrics.jsonl
    seed: int = 0  # of initialisation, shuffling and sampling

    @property
    def batch_size(self) -> int:
        """Episodes of an update, of all processes."""
        micro = self.per_device_train_batch_size * num_processes()
        return micro * self.gradient_accumulation_steps * self.num_mini_batches

    @property
    def num_updates(self) -> int:
        return min(self.total_episodes // self.batch_size, self.max_steps or self.total_episodes)


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
        total_episodes=768,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        num_mini_batches=4,
        rollout_batch_size=40,
        learning_rate=1e-3,
        value_learning_rate=2e-3,
        warmup_updates=3,
        critic_warmup_updates=1,
        kl_horizon=10_000,
        eval_steps=8,
    ),
}


# ---------------------------------------------------------------- the algorithm


def main(config: Config) -> None:
    started = time.monotonic()
    check_ppo_numbers(config)
    runs = read_parents(config)
    inputs = config.sft_checkpoint, config.reward_checkpoint, config.gold_checkpoint, runs["sft"]["base"]["model"]
    inputs += config.base_model, config.dataset
    check_output(config.output_dir, config.overwrite, *inputs, resume=config.resume)
    if is_finished(config):
        return
    if config.dry_run:
        dry_run_ppo(config, runs)
        return
    form = load_format(config.sft_checkpoint, runs["sft"])
    prompts, eval_prompts = load_prompts(config, form)
    shared, base = load_models(config, runs["sft"], form)
    groups = [
        {"name": "policy", "params": shared.parameters("policy"), "peak_lr": config.learning_rate},
        {"name": "value", "params": shared.parameters("value"), "peak_lr": config.value_learning_rate},
    ]
    optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(shared.device.type, enabled=shared.dtype == torch.float16)

    with (
        output_folder(config.output_dir, config.resume) as folder,
        Log(config, folder, config.num_updates) as log,
        State(config, folder, runs, (prompts, eval_prompts), shared, optimizer, scaler, log) as state,
    ):
        if not state.sft:
            state.sft = evaluate(config, shared, form, eval_prompts)  # as the new policy equals SFT's
            log.evaluation(0, state.sft, eval_prompts, form)
        first = last = state.sft
        baseline, kl_coef = first.scores.mean().item(), state.kl_coef

        for update in range(state.update + 1, config.num_updates + 1):
            # 1. Rollout
            clock = [time.monotonic()]
            queries, seeds = draw_prompts(prompts, update, config)
            responses = rollout(config, shared, form, queries, seeds)
            clock.append(time.monotonic())
            # 2. Measure
            batch = make_micro_batches(queries, responses, form, config.per_device_train_batch_size, shared.device)
            fit(measure, shared, batch, config.temperature, baseline)  # measure(), in micro-batches that memory holds
            clock.append(time.monotonic())
            # 3. Reward
            set_advantages(batch, kl_coef, baseline, config)
            # 4. Optimise
            set_learning_rates(optimizer, update, config)
            stats = optimise(config, shared, batch, baseline, optimizer, scaler, update)
            clock.append(time.monotonic())
            # 5. Adapt and report
            log.update(batch_metrics(batch, update, kl_coef, clock, config) | stats)
            if config.kl_controller == "adaptive" and update > config.critic_warmup_updates + 1:  # before it KL is 0
                kl_coef = adapt_kl_coef(kl_coef, mean_kl(batch), config)
            if update % config.eval_steps == 0 or update == config.num_updates:
                last = evaluate(config, shared, form, eval_prompts)
                log.evaluation(update, last, eval_prompts, form)
            state.done(update, kl_coef)

        metrics = compare(first, last) | {"warnings": warnings(first, last)}
        console.print(describe(metrics))
        save(config, folder, shared, form, base, runs, metrics, started)
    console.print(f"Saved {config.output_dir} after {time.monotonic() - started:.0f} s.")
    phases = {"sft": config.sft_checkpoint, "reward": config.reward_checkpoint, "ppo": config.output_dir}
    console.print(f"Next: {next_command('compare_outputs.py', config.dataset, **phases)}")


def draw_prompts(prompts: list[list[int]], update: int, config: Config) -> tuple[list[list[int]], list[Seed]]:
    """The prompts of an update, each once in an epoch over all, and one sampling seed an episode.

    Both follow from the seed and the episode's number alone.
    """
    queries, seeds = [], []
    for episode in range((update - 1) * config.batch_size, update * config.batch_size):
        epoch, place = divmod(episode, len(prompts))
        queries.append(prompts[np.random.default_rng((config.seed, 1, epoch)).permutation(len(prompts))[place]])
        seeds.append((config.seed, 2, episode))
    return queries, seeds


def rollout(
    config: Config, shared: SharedBase, form: PromptFormat, prompts: list[list[int]], seeds: list[Seed]
) -> list[Response]:
    """Sample one response to each prompt from the policy."""
    shared.activate("policy")
    settings = config.response_length, config.temperature, share(seeds), config.rollout_batch_size
    return gather(generate(shared, form, share(prompts), *settings))


@torch.no_grad()
def measure(shared: SharedBase, batch: list[MicroBatch], temperature: float, baseline: float) -> None:
    """Fill in what each role says of the micro-batches; the lower layers run once for all of them, and for all epochs."""
    for micro in batch:
        check_stop()
        micro.lower = shared.lower(micro.texts)
        micro.logprobs, micro.entropy = token_logprobs(shared, "policy", micro, temperature)
        micro.ref_logprobs, _ = token_logprobs(shared, None, micro, temperature)
        micro.values = token_values(shared, micro, baseline)
        micro.scores = score(shared, "reward", micro)
        check_finite(micro)


@torch.no_grad()
def score(shared: SharedBase, role: str, micro: MicroBatch) -> Tensor:
    """[b] what a reward model says at the EOS of each text."""
    shared.activate(role)
    return shared.heads[role](shared.upper(micro.lower, micro.texts)[micro.texts.last]).squeeze(-1)


def token_logprobs(
    shared: SharedBase, role: str | None, micro: MicroBatch, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy [b, R] of each sampled token under `role` (None: the reference); 0 at padding.

    The role gets gradients if they are being recorded. Measuring and optimising both come through here, with the same
    micro-batches: in bf16 another padding or batch size alone would move the ratio away from 1.
    """
    shared.activate(role, train=torch.is_grad_enabled())
    mask = micro.response_mask
    hidden = shared.upper(micro.lower, micro.texts)[micro.positions[mask]]  # [response tokens, H]
    flat = chosen_logprobs(hidden, shared.lm_head_weight(), micro.actions[mask], temperature)
    zeros = torch.zeros(mask.shape, device=mask.device)
    return zeros.masked_scatter(mask, flat.logprobs), zeros.masked_scatter(mask, flat.entropy)


def token_values(shared: SharedBase, micro: MicroBatch, baseline: float) -> Tensor:
    """[b, R] value before each sampled token. The head, copied from the reward model, speaks in raw scores: centre it."""
    shared.activate("value", train=torch.is_grad_enabled())
    values = shared.heads["value"](shared.upper(micro.lower, micro.texts)).squeeze(-1)  # [N]
    return (values[micro.positions] - baseline) * micro.response_mask


def set_advantages(batch: list[MicroBatch], kl_coef: float, baseline: float, config: Config) -> None:
    """Rewards from scores and KL, advantages and returns from rewards; advantages whitened over the batch's tokens."""
    masks = [micro.response_mask for micro in batch]
    rewards = []
    for micro in batch:
        score = (micro.scores - baseline).clamp(-config.score_clip, config.score_clip)
        score = score - config.missing_eos_penalty * (~micro.ended).float()
        rewards.append(token_rewards(score, micro.logprobs - micro.ref_logprobs, micro.response_mask, kl_coef))
    if config.whiten_rewards:
        rewards = whiten(rewards, masks, shift_mean=False)
    for micro, reward in zip(batch, rewards, strict=True):
        micro.advantages, micro.returns = gae(reward, micro.values, micro.response_mask, config.gamma, config.lam)
    for micro, advantages in zip(batch, whiten([m.advantages for m in batch], masks), strict=True):
        micro.advantages = advantages


def optimise(
    config: Config, shared: SharedBase, batch: list[MicroBatch], baseline: float, optimizer, scaler, update: int
) -> dict[str, float]:
    """Epochs over the batch; each minibatch, a random set of micro-batches, is one step. Returns mean statistics."""
    random = np.random.default_rng((config.seed, 3, update))
    history: list[dict[str, float]] = []
    for _ in range(config.num_ppo_epochs):
        order = random.permutation(config.gradient_accumulation_steps * config.num_mini_batches)
        for start in range(0, len(order), config.gradient_accumulation_steps):
            check_stop(together=True)
            chosen = order[start : start + config.gradient_accumulation_steps]
            train_policy, check = update > config.critic_warmup_updates, not history
            stats = fit(backward, shared, batch, chosen, config, baseline, scaler, train_policy, check)
            if stats.get("policy/approxkl_avg", 0.0) > config.kl_stop:
                optimizer.zero_grad()
                return mean_stats(history)
            history.append(stats | step(optimizer, scaler, config.max_grad_norm))
    return mean_stats(history)


def backward(
    shared: SharedBase, batch: list[MicroBatch], chosen, config: Config, baseline: float, scaler, train_policy, check
) -> dict[str, float]:
    """Add the gradients of policy and value over the `chosen` micro-batches, and return statistics.

    Losses are sums over real tokens, divided by their number. Above `kl_stop` the value's are not computed any more.
    With `check` the policy still is the one that sampled, and that is seen to.
    """
    minibatch = pick(batch, chosen)
    tokens = num_tokens(minibatch)
    stats: dict[str, float] = {}
    for micro in minibatch if train_policy else []:
        logprobs, _ = token_logprobs(shared, "policy", micro, config.temperature)
        # In smaller micro-batches than it was measured in, rounding alone moves the ratio.
        if check and "micro-batch" not in shared.rows_that_fit:
            check_ratio(logprobs, micro.logprobs)
        losses, parts = policy_loss(logprobs, micro.logprobs, micro.advantages, micro.response_mask, config.cliprange)
        scaler.scale(losses.sum() / tokens).backward()
        add_means(stats, parts, micro.response_mask, tokens)
    stats, critic = totals(stats), {}
    if stats.get("policy/approxkl_avg", 0.0) > config.kl_stop:
        return stats
    for micro in minibatch:
        values = token_values(shared, micro, baseline)
        losses, parts = value_loss(values, micro.values, micro.returns, micro.response_mask, config.cliprange_value)
        scaler.scale(losses.sum() / tokens).backward()
        add_means(critic, parts, micro.response_mask, tokens)
    return stats | totals(critic)


def step(optimizer, scaler, max_grad_norm: float) -> dict[str, float]:
    """Clip the gradients of policy and value, each to `max_grad_norm`, and step. Raises NotFinite if they are not."""
    for group in optimizer.param_groups:
        sum_gradients(group["params"])
    scaler.unscale_(optimizer)
    norms = {}
    for group in optimizer.param_groups:
        norm = torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
        if norm.isfinite():
            norms[f"{group['name']}/grad_norm"] = norm.item()
        # With fp16 the scaler skips such a step and halves its scale; a scale below 1 has no room left.
        elif not (scaler.is_enabled() and scaler.get_scale() >= 1):
            raise NotFinite(f"the {group['name']} gradient is not finite; lower its learning rate")
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norms


def evaluate(config: Config, shared: SharedBase, form: PromptFormat, prompts: list[list[int]]) -> Evaluation:
    """Sample from the policy on held-out prompts, always with the same seeds."""
    responses = rollout(config, shared, form, prompts, [(0, 4, i) for i in range(len(prompts))])
    numbers = torch.zeros(4, len(prompts), device=shared.device)
    scores, kl, entropy, gold_scores = numbers
    batch = make_micro_batches(prompts, responses, form, config.per_device_train_batch_size, shared.device)
    while batch:
        parts = [batch.pop()]  # not all at once: each holds its lower states
        fit(measure, shared, parts, config.temperature, 0.0)
        for micro in parts:
            scores[micro.rows] = micro.scores
            kl[micro.rows] = (micro.logprobs - micro.ref_logprobs).sum(1)
            entropy[micro.rows] = micro.entropy.sum(1) / micro.response_mask.sum(1)
            if config.gold_checkpoint:
                gold_scores[micro.rows] = score(shared, "gold", micro)
    scores, kl, entropy, gold_scores = total(numbers).cpu()
    texts = [form.decode(response.text_ids) for response in responses]
    return Evaluation(responses, texts, scores, kl, entropy, gold_scores if config.gold_checkpoint else None)


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


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (1506.02438), from the last token back; after it the value is 0.

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


def whiten(tensors: list[Tensor], masks: list[Tensor], shift_mean: bool = True) -> list[Tensor]:
    """Scale to variance 1 over all real tokens of the batch, and to mean 0 unless `shift_mean` is False."""
    flat = torch.cat([tensor[mask] for tensor, mask in zip(tensors, masks, strict=True)])
    mean, variance = moments(flat)
    shift, scale = 0.0 if shift_mean else mean, (variance + 1e-8).rsqrt()
    return [((tensor - mean) * scale + shift) * mask for tensor, mask in zip(tensors, masks, strict=True)]


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate (1707.06347, eq. 7) of each token [b, R], 0 at padding, and each token's statistics."""
    log_ratio = (logprobs - old_logprobs) * response_mask
    ratio = log_ratio.exp()
    loss, clipped_loss = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    losses = torch.maximum(loss, clipped_loss) * response_mask
    return losses, {
        "loss/policy_avg": losses,
        "policy/approxkl_avg": ratio - 1 - log_ratio,  # "k3": unbiased and never negative
        "policy/clipfrac_avg": (clipped_loss > loss).float(),
        "val/ratio": ratio,
    }


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, cliprange_value: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half the squared error, clipped around the rollout's values, of each token [b, R], 0 at padding; statistics."""
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    losses = 0.5 * torch.maximum(error, clipped_error) * response_mask
    return losses, {"loss/value_avg": losses, "val/clipfrac_avg": (clipped_error > error).float()}


def check_ratio(logprobs: Tensor, old_logprobs: Tensor) -> None:
    """Before the first step policy and sampling policy are the same weights on the same micro-batch: the ratio is 1."""
    off = ((logprobs - old_logprobs).exp() - 1).abs().max().item()
    if not off <= 1e-4:
        raise RuntimeError(f"the ratio is off 1 by {off:.1e} before the first step: measuring and optimising disagree")


def adapt_kl_coef(kl_coef: float, kl: float, config: Config) -> float:
    """Move the coefficient towards a KL of `kl_target` nats a response (1909.08593, section 2.2)."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.batch_size / config.kl_horizon)


def set_learning_rates(optimizer, update: int, config: Config) -> None:
    """Linear warm-up over `warmup_updates`, the policy's after the critic's own updates; linear to 0 at the end."""
    for group in optimizer.param_groups:
        trained = update - (config.critic_warmup_updates if group["name"] == "policy" else 0)
        warmup = min(1.0, max(0, trained) / max(1, config.warmup_updates))
        group["lr"] = group["peak_lr"] * warmup * (1 - (update - 1) / config.num_updates)


# ---------------------------------------------------------------- models and prompts


def load_models(config: Config, sft: dict[str, Any], form: PromptFormat) -> tuple[SharedBase, dict[str, Any]]:
    """The shared base with its four roles, and what identifies the base."""
    dtype = choose_dtype(config.dtype, device())
    base = same_base(sft, config.sft_checkpoint, config.base_model)
    set_seed(config.seed)
    model = load_base(base, dtype, form.pad_token_id)
    shared = SharedBase(model, config.sft_checkpoint, dtype)
    shared.decoder.gradient_checkpointing = config.gradient_checkpointing
    scorer = read_stacked(config.reward_checkpoint, shared)
    shared.add_role("reward", **scorer)
    shared.add_role("value", **scorer)
    shared.add_role("policy", config.lora_rank, config.lora_alpha, config.role_layers)
    if config.gold_checkpoint:
        shared.add_role("gold", **read_stacked(config.gold_checkpoint, shared))
    return shared, base


def load_prompts(config: Config, form: PromptFormat) -> list[list[list[int]]]:
    """Token ids of the training and of the held-out prompts."""
    pairs = load_pairs(config.dataset, "train", config.max_train_samples)
    held_out = load_pairs(config.dataset, "test", config.max_eval_samples)
    return [tokenize_prompts(rows, form, config.max_prompt_length) for rows in (pairs, held_out)]


if __name__ == "__main__":
    run(main, Config, PRESETS, __doc__)
