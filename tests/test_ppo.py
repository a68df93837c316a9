"""PPO's formulas against numbers worked by hand, and properties of the passes through the model."""

import dataclasses
from types import SimpleNamespace

import ppo_train
from ppo_train import adapt_kl_coef, gae, policy_loss, token_rewards, value_loss, whiten
from rlhf.generation import Response
from rlhf.logprobs import chosen_logprobs
from rlhf.ppo_batch import NotFinite, make_micro_batches
from rlhf.ppo_log import Log, mean_stats

import pytest
import torch
from accelerate import Accelerator
from torch import tensor

TRUE, FALSE = True, False


def close(actual, expected):
    torch.testing.assert_close(actual, tensor(expected), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- formulas


def test_reward_is_kl_at_each_token_and_score_at_the_last_real_one():
    mask = tensor([[TRUE, TRUE, TRUE], [TRUE, TRUE, FALSE]])
    kl = tensor([[0.5, -1.0, 2.0], [1.0, 3.0, 9.0]])
    rewards = token_rewards(tensor([10.0, -4.0]), kl, mask, kl_coef=0.1)
    close(rewards, [[-0.05, 0.1, 9.8], [-0.1, -4.3, 0.0]])


def test_gae_by_hand():
    # delta = r + gamma V' - V: [1 + .9*2 - 1, 2 + 0 - 2] = [1.8, 0]; A1 = 0, A0 = 1.8 + .9*.5*0
    rewards, values = tensor([[1.0, 2.0, 7.0]]), tensor([[1.0, 2.0, 5.0]])
    advantages, returns = gae(rewards, values, tensor([[TRUE, TRUE, FALSE]]), gamma=0.9, lam=0.5)
    close(advantages, [[1.8, 0.0, 0.0]])
    close(returns, [[2.8, 2.0, 0.0]])
    # three tokens, gamma 1, lambda .95: deltas [0+1-0.5, 0+2-1, 3-2] = [.5, 1, 1]
    advantages, _ = gae(tensor([[0.0, 0.0, 3.0]]), tensor([[0.5, 1.0, 2.0]]), torch.ones(1, 3) > 0, 1.0, 0.95)
    close(advantages, [[0.5 + 0.95 * (1 + 0.95), 1 + 0.95, 1.0]])


def test_gae_is_the_discounted_sum_of_deltas_and_ignores_padding():
    torch.manual_seed(0)
    lengths = [7, 3, 1, 5]
    mask = torch.arange(7) < tensor(lengths)[:, None]
    rewards, values = torch.randn(4, 7), torch.randn(4, 7)
    advantages, returns = gae(rewards, values, mask, gamma=0.97, lam=0.9)
    for i, n in enumerate(lengths):
        v = [*values[i, :n].tolist(), 0.0]
        deltas = [rewards[i, t].item() + 0.97 * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((0.97 * 0.9) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        close(advantages[i, :n], expected)
        close(returns[i, :n], [a + b for a, b in zip(expected, v, strict=False)])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_whitening_is_over_real_tokens_of_all_micro_batches():
    masks = [tensor([[TRUE, FALSE]]), tensor([[TRUE, TRUE]])]
    white = whiten([tensor([[1.0, 99.0]]), tensor([[2.0, 3.0]])], masks)
    close(white[0], [[-1.2247449, 0.0]])  # (1 - 2) / sqrt(2/3)
    close(white[1], [[0.0, 1.2247449]])
    kept = whiten([tensor([[1.0, 99.0]]), tensor([[2.0, 3.0]])], masks, shift_mean=False)
    close(torch.cat([kept[0][masks[0]], kept[1][masks[1]]]).mean(), 2.0)


def test_advantages_of_an_update_by_hand():
    """Scores are centred, clipped and fined; KL is charged to the policy; with lambda 1 and values 0 returns are sums of rewards."""
    config = dataclasses.replace(ppo_train.Config(), score_clip=1.5, missing_eos_penalty=1.0, gamma=1.0, lam=1.0)
    ended = SimpleNamespace(
        scores=tensor([3.0]),  # 2 above the baseline, clipped to 1.5
        ended=tensor([TRUE]),
        response_mask=tensor([[TRUE, TRUE]]),
        logprobs=tensor([[-1.0, -2.0]]),
        ref_logprobs=tensor([[-1.5, -1.0]]),  # KL 0.5 and -1
        values=torch.zeros(1, 2),
    )
    cut = SimpleNamespace(
        scores=tensor([0.0]),  # 1 below the baseline, and 1 for the missing EOS
        ended=tensor([FALSE]),
        response_mask=tensor([[TRUE, FALSE]]),
        logprobs=tensor([[-1.0, 0.0]]),
        ref_logprobs=tensor([[-1.0, 0.0]]),
        values=torch.zeros(1, 2),
    )
    ppo_train.set_advantages([ended, cut], kl_coef=0.1, baseline=1.0, config=config)
    close(ended.returns, [[-0.05 + 1.6, 1.6]])  # the last token gets 0.1 + 1.5
    close(cut.returns, [[-2.0, 0.0]])
    # 1.55, 1.6 and -2 have mean 0.383333 and variance 2.840556
    close(ended.advantages, [[0.692222, 0.721888]])
    close(cut.advantages, [[-1.414110, 0.0]])


def test_a_mean_taken_off_scores_and_values_leaves_the_advantages():
    """By which the results page counts runs without it as runs of the baseline."""
    mask = tensor([[TRUE, TRUE, TRUE], [TRUE, TRUE, FALSE]])

    def advantages_less(mean):
        micro = SimpleNamespace(
            scores=tensor([1.0, -0.5]),
            ended=tensor([TRUE, FALSE]),
            response_mask=mask,
            logprobs=tensor([[-1.0, -2.0, -0.5], [-0.2, -3.0, 0.0]]),
            ref_logprobs=tensor([[-1.5, -1.0, -0.4], [-0.2, -2.0, 0.0]]),
            values=(tensor([[0.3, -0.2, 0.9], [-1.0, 0.4, 0.0]]) - mean) * mask,
        )
        ppo_train.set_advantages([micro], kl_coef=0.1, baseline=mean, config=ppo_train.PRESETS["demo"])
        return micro.advantages, micro.returns

    raw, centred = advantages_less(0.0), advantages_less(0.7)
    close(centred[0], raw[0])
    close(centred[1], raw[1] - 0.7 * mask)


def test_policy_loss_clips_on_both_sides():
    # ratios 2, 0.5, 1.1 and padding; with A > 0 only a rise is clipped, with A < 0 only a fall
    old, mask = torch.zeros(2, 4), tensor([[TRUE, TRUE, TRUE, FALSE]] * 2)
    new = tensor([[2.0, 0.5, 1.1, 5.0]] * 2).log()
    advantages = tensor([[1.0] * 4, [-1.0] * 4])
    losses, stats = policy_loss(new, old, advantages, mask, cliprange=0.2)
    close(losses, [[-1.2, -0.5, -1.1, 0.0], [2.0, 0.8, 1.1, 0.0]])
    close(stats["policy/clipfrac_avg"][:, :3], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    close(stats["policy/approxkl_avg"][0, :3], [2 - 1 - 0.6931472, 0.5 - 1 + 0.6931472, 1.1 - 1 - 0.0953102])


def test_clipped_tokens_give_no_gradient():
    new = tensor([[2.0, 0.5, 1.1]]).log().requires_grad_()
    losses, _ = policy_loss(new, torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1, 3) > 0, 0.2)
    losses.sum().backward()
    close(new.grad, [[0.0, -0.5, -1.1]])


def test_value_loss_clips_around_the_old_values():
    values, old, returns = tensor([[1.0, 0.1, -1.0, 9.0]]), torch.zeros(1, 4), tensor([[2.0, 2.0, 1.0, 0.0]])
    mask = tensor([[TRUE, TRUE, TRUE, FALSE]])
    losses, stats = value_loss(values, old, returns, mask, cliprange_value=0.2)
    # clipped values .2, .1, -.2: errors max(1, 3.24), 3.61, max(4, 1.44)
    close(losses, [[1.62, 1.805, 2.0, 0.0]])
    close(stats["val/clipfrac_avg"][:, :3], [[1.0, 0.0, 0.0]])


def test_kl_coefficient_moves_towards_the_target_by_at_most_a_fifth():
    config = dataclasses.replace(ppo_train.Config(), kl_target=6.0, kl_horizon=640)  # a batch is 64: one tenth
    assert adapt_kl_coef(0.1, 6.0, config) == pytest.approx(0.1)
    assert adapt_kl_coef(0.1, 6.6, config) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, 60.0, config) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, 0.0, config) == pytest.approx(0.1 * 0.98)


def test_learning_rates_warm_up_and_fall_to_zero():
    config = dataclasses.replace(ppo_train.Config(), total_episodes=640, warmup_updates=2, critic_warmup_updates=3)
    groups = [{"name": name, "params": [torch.zeros(1)], "peak_lr": 1.0} for name in ("policy", "value")]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    rates = []
    for update in (1, 2, 3, 4, 5, 10):  # of 10
        ppo_train.set_learning_rates(optimizer, update, config)
        rates.append([group["lr"] for group in optimizer.param_groups])
    expected = [[0.0, 0.5], [0.0, 0.9], [0.0, 0.8], [0.35, 0.7], [0.6, 0.6], [0.1, 0.1]]
    assert [rate for pair in rates for rate in pair] == pytest.approx([rate for pair in expected for rate in pair])


def test_every_prompt_comes_once_an_epoch_and_every_episode_has_its_own_seed():
    config = dataclasses.replace(
        ppo_train.Config(), per_device_train_batch_size=2, gradient_accumulation_steps=1, num_mini_batches=2, seed=3
    )
    drawn = [ppo_train.draw_prompts(list(range(6)), update, config) for update in (1, 2, 3)]
    order = [prompt for prompts, _ in drawn for prompt in prompts]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]
    assert len({seed for _, seeds in drawn for seed in seeds}) == 12
    assert drawn[1] == ppo_train.draw_prompts(list(range(6)), 2, config)


def test_micro_batches_by_hand():
    form = SimpleNamespace(eos_token_id=2, pad_token_id=0)
    prompts = [[5, 6, 7], [5], [5, 6]]
    responses = [
        Response([11, 12, 2], [11, 12], "eos"),  # text 11 12, then EOS was sampled
        Response([13, 14], [13, 14], "length"),  # cut: it is scored with an EOS that nobody sampled
        Response([15, 9], [15], "stop_text"),  # text 15; then token 9 began the next turn
    ]
    short, long = make_micro_batches(prompts, responses, form, 2, torch.device("cpu"))
    assert short.rows == [1, 2] and long.rows == [0]
    assert short.texts.ids.tolist() == [5, 13, 14, 2, 5, 6, 15, 2] and short.texts.last.tolist() == [3, 7]
    assert long.texts.ids.tolist() == [5, 6, 7, 11, 12, 2] and long.texts.last.tolist() == [5]
    assert short.actions.tolist() == [[13, 14], [15, 9]] and long.actions.tolist() == [[11, 12, 2]]
    assert short.positions.tolist() == [[0, 1], [5, 6]] and long.positions.tolist() == [[2, 3, 4]]
    assert short.ended.tolist() == [False, False] and long.ended.tolist() == [True]

    (ragged,) = make_micro_batches(prompts, responses, form, 3, torch.device("cpu"))
    assert ragged.rows == [1, 2, 0]
    assert ragged.response_mask.tolist() == [[TRUE, TRUE, FALSE], [TRUE, TRUE, FALSE], [TRUE, TRUE, TRUE]]
    assert ragged.texts.ids.tolist() == [5, 13, 14, 2, 5, 6, 15, 2, 5, 6, 7, 11, 12, 2]
    assert ragged.texts.last.tolist() == [3, 7, 13]
    assert ragged.positions.tolist() == [[0, 1, 0], [5, 6, 0], [10, 11, 12]]

    # Token 9 was half text, which stands there as token 8: the policy still is asked for 9, where it chose it.
    (spanning,) = make_micro_batches([[5, 6]], [Response([15, 9], [15, 8], "stop_text")], form, 1, torch.device("cpu"))
    assert spanning.texts.ids.tolist() == [5, 6, 15, 8, 2] and spanning.texts.last.tolist() == [4]
    assert spanning.actions.tolist() == [[15, 9]] and spanning.positions.tolist() == [[1, 2]]


# ---------------------------------------------------------------- what is logged


def test_means_of_an_update_leave_out_what_a_step_does_not_have():
    """A step that fp16's scaler skipped has no gradient norm; above the KL stop there is no step at all."""
    history = [{"loss": 1.0, "grad_norm": 4.0}, {"loss": 2.0}, {"loss": 6.0, "grad_norm": 2.0}]
    assert mean_stats(history) == {"loss": 3.0, "grad_norm": 3.0, "policy/optimizer_steps": 3}
    assert mean_stats([]) == {"policy/optimizer_steps": 0}


def test_a_gradient_that_is_not_finite_is_skipped_by_the_scaler_or_ends_the_run():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"name": "policy", "params": [weight]}], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weight.grad = scaler.scale(torch.tensor([torch.inf, 1.0, 1.0]))
    assert ppo_train.step(optimizer, scaler, 1.0) == {} and weight.tolist() == [0, 0, 0] and scaler.get_scale() == 1.0
    with pytest.raises(NotFinite, match="policy gradient"):
        weight.grad = torch.tensor([torch.nan, 1.0, 1.0])
        ppo_train.step(optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0)


def test_the_end_of_a_tracker_leaves_the_processes_together(monkeypatch, tmp_path):
    """accelerate's own end_training() ends their group, too, before all have met at the end of the run."""
    ended = []
    tracker = SimpleNamespace(finish=lambda: ended.append(True))
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *_: self.trackers.append(tracker))
    monkeypatch.setattr(Accelerator, "end_training", lambda _: pytest.fail("ends the group"))
    config = dataclasses.replace(ppo_train.Config(), log_with="tensorboard")
    with Log(config, tmp_path, total=1):
        assert not ended
    assert ended == [True]


# ---------------------------------------------------------------- log-probabilities


def test_chosen_logprobs_equal_log_softmax_in_value_entropy_and_gradient(monkeypatch):
    monkeypatch.setattr("rlhf.logprobs.CHUNK_ELEMENTS", 3 * 11)  # three rows a chunk, in blocks of two: both uneven
    monkeypatch.setattr("rlhf.logprobs.CPU_BLOCK", 2)
    torch.manual_seed(0)
    hidden, weight, tokens = torch.randn(7, 5), torch.randn(11, 5), torch.randint(11, (7,))
    plain = hidden.clone().requires_grad_()
    log_softmax = torch.log_softmax(plain @ weight.T / 0.7, -1)
    expected = log_softmax[torch.arange(7), tokens]
    (expected * torch.arange(7)).sum().backward()
    with torch.no_grad():
        logprobs, entropy, is_top1 = chosen_logprobs(hidden, weight, tokens, 0.7)
    assert is_top1.tolist() == (log_softmax.argmax(-1) == tokens).tolist()
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, -(log_softmax.exp() * log_softmax).sum(-1))
    ours = hidden.clone().requires_grad_()
    logprobs = chosen_logprobs(ours, weight, tokens, 0.7).logprobs
    torch.testing.assert_close(logprobs, expected)
    (logprobs * torch.arange(7)).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)
