"""PPO's formulas against numbers worked by hand, and properties of the passes through the model."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import tensor

import ppo_train
from ppo_train import adapt_kl_coef, gae, policy_loss, token_rewards, value_loss, whiten
from rlhf.engine.generation import Response
from rlhf.engine.logprobs import logprobs_of
from rlhf.ppo.batch import Measured, NotFinite, count_tokens, make_batch
from rlhf.ppo.log import FAR_SAMPLER, Log, mean_stats, open_tracker, sampler_kl

TRUE = True
FALSE = False


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
    rewards = tensor([[1.0, 2.0, 7.0]])
    values = tensor([[1.0, 2.0, 5.0]])
    advantages, returns = gae(rewards, values, tensor([[TRUE, TRUE, FALSE]]), gamma=0.9, lam=0.5)
    close(advantages, [[1.8, 0.0, 0.0]])
    close(returns, [[2.8, 2.0, 0.0]])
    # three tokens, gamma 1, lambda .95: deltas [0+1-0.5, 0+2-1, 3-2] = [.5, 1, 1]
    advantages, _ = gae(
        tensor([[0.0, 0.0, 3.0]]), tensor([[0.5, 1.0, 2.0]]), torch.ones(1, 3) > 0, 1.0, 0.95
    )
    close(advantages, [[0.5 + 0.95 * (1 + 0.95), 1 + 0.95, 1.0]])


def test_gae_is_the_discounted_sum_of_deltas_and_ignores_padding():
    torch.manual_seed(0)
    lengths = [7, 3, 1, 5]
    mask = torch.arange(7) < tensor(lengths)[:, None]
    rewards = torch.randn(4, 7)
    values = torch.randn(4, 7)
    advantages, returns = gae(rewards, values, mask, gamma=0.97, lam=0.9)
    for i, n in enumerate(lengths):
        v = [*values[i, :n].tolist(), 0.0]
        deltas = [rewards[i, t].item() + 0.97 * v[t + 1] - v[t] for t in range(n)]
        expected = [sum((0.97 * 0.9) ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        close(advantages[i, :n], expected)
        close(returns[i, :n], [a + b for a, b in zip(expected, v, strict=False)])
    assert not advantages[~mask].any() and not returns[~mask].any()


def test_whitening_by_hand():
    close(whiten(tensor([1.0, 2.0, 3.0])), [-1.2247449, 0.0, 1.2247449])  # (1 - 2) / sqrt(2/3)
    close(whiten(tensor([1.0, 2.0, 3.0]), shift_mean=False), [2 - 1.2247449, 2.0, 2 + 1.2247449])


def make_update(ended_by, lengths, **measured):
    """A batch of responses of these lengths, and what was measured of it."""
    responses = [Response([9] * n, [9] * n, why) for n, why in zip(lengths, ended_by, strict=True)]
    form = SimpleNamespace(eos_token_id=2)
    batch = make_batch(
        [[5]] * len(responses), responses, [list(range(len(responses)))], form, torch.device("cpu")
    )
    numbers = {
        "lower": None,
        "entropy": None,
        **{name: tensor(value) for name, value in measured.items()},
    }
    return batch, Measured(**numbers)


def test_advantages_of_an_update_by_hand():
    """Scores are centred, clipped and fined; KL is charged; returns are sums of rewards."""
    config = dataclasses.replace(
        ppo_train.Config(), score_clip=1.5, missing_eos_penalty=1.0, gamma=1.0, lam=1.0
    )
    batch, measured = make_update(
        ("length", "eos"),
        (1, 2),
        scores=[
            0.0,
            3.0,
        ],  # 1 below the baseline, and 1 for the missing EOS; 2 above it, clipped to 1.5
        logprobs=[-1.0, -1.0, -2.0],
        ref_logprobs=[-1.0, -1.5, -1.0],  # KL 0; 0.5 and -1
        values=[0.0, 0.0, 0.0],
    )
    advantages, returns = ppo_train.advantages_and_returns(
        batch, measured, kl_coef=0.1, baseline=1.0, config=config
    )
    close(returns, [-2.0, -0.05 + 1.6, 1.6])  # the last token of the second gets 0.1 + 1.5
    # 1.55, 1.6 and -2 have mean 0.383333 and variance 2.840556
    close(advantages, [-1.414110, 0.692222, 0.721888])


def test_a_mean_taken_off_scores_and_values_leaves_the_advantages():
    """By which the results page counts runs without it as runs of the baseline."""

    def advantages_less(mean):
        batch, measured = make_update(
            ("length", "eos"),
            (2, 3),
            scores=[-0.5, 1.0],
            logprobs=[-0.2, -3.0, -1.0, -2.0, -0.5],
            ref_logprobs=[-0.2, -2.0, -1.5, -1.0, -0.4],
            values=[value - mean for value in (-1.0, 0.4, 0.3, -0.2, 0.9)],
        )
        return ppo_train.advantages_and_returns(
            batch, measured, 0.1, mean, ppo_train.PRESETS["demo"]
        )

    raw = advantages_less(0.0)
    centred = advantages_less(0.7)
    close(centred[0], raw[0].tolist())
    close(centred[1], (raw[1] - 0.7).tolist())


def test_policy_loss_clips_on_both_sides():
    # ratios 2, 0.5 and 1.1; with A > 0 only a rise is clipped, with A < 0 only a fall
    new = tensor([2.0, 0.5, 1.1, 2.0, 0.5, 1.1]).log()
    advantages = tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    losses, stats = policy_loss(new, torch.zeros(6), advantages, cliprange=0.2)
    close(losses, [-1.2, -0.5, -1.1, 2.0, 0.8, 1.1])
    close(stats["policy/clipfrac_avg"], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    close(
        stats["policy/approxkl_avg"][:3],
        [2 - 1 - 0.6931472, 0.5 - 1 + 0.6931472, 1.1 - 1 - 0.0953102],
    )
    close(stats["ratio_off"], [1.0] * 6)
    close(
        policy_loss(tensor([0.0, 9e-5, 2e-4]), torch.zeros(3), torch.ones(3), 0.2)[1]["ratio_off"],
        [0.0, 0.0, 1.0],
    )


def test_clipped_tokens_give_no_gradient():
    new = tensor([2.0, 0.5, 1.1]).log().requires_grad_()
    losses, _ = policy_loss(new, torch.zeros(3), torch.ones(3), 0.2)
    losses.sum().backward()
    close(new.grad, [0.0, -0.5, -1.1])


def test_value_loss_clips_around_the_old_values():
    values = tensor([1.0, 0.1, -1.0])
    old = torch.zeros(3)
    returns = tensor([2.0, 2.0, 1.0])
    losses, stats = value_loss(values, old, returns, cliprange_value=0.2)
    # clipped values .2, .1, -.2: errors max(1, 3.24), 3.61, max(4, 1.44)
    close(losses, [1.62, 1.805, 2.0])
    close(stats["val/clipfrac_avg"], [1.0, 0.0, 0.0])


def test_kl_coefficient_moves_towards_the_target_by_at_most_a_fifth():
    # a batch is 64: one tenth
    settings = {"kl_target": 6.0, "episodes": 64, "kl_horizon": 640}
    assert adapt_kl_coef(0.1, 6.0, **settings) == pytest.approx(0.1)
    assert adapt_kl_coef(0.1, 6.6, **settings) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, 60.0, **settings) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, 0.0, **settings) == pytest.approx(0.1 * 0.98)


def test_learning_rates_warm_up_and_fall_to_zero():
    config = dataclasses.replace(
        ppo_train.Config(), total_episodes=640, warmup_updates=2, critic_warmup_updates=3
    )
    groups = [
        {"name": name, "params": [torch.zeros(1)], "peak_lr": 1.0} for name in ("policy", "value")
    ]
    optimizer = torch.optim.SGD(groups, lr=9.0)
    rates = []
    for update in (1, 2, 3, 4, 5, 10):  # of 10
        ppo_train.set_learning_rates(optimizer, update, config)
        rates.append([group["lr"] for group in optimizer.param_groups])
    expected = [[0.0, 0.5], [0.0, 0.9], [0.0, 0.8], [0.35, 0.7], [0.6, 0.6], [0.1, 0.1]]
    assert [rate for pair in rates for rate in pair] == pytest.approx(
        [rate for pair in expected for rate in pair]
    )


def test_every_prompt_comes_once_an_epoch_and_every_episode_has_its_own_seed():
    config = dataclasses.replace(
        ppo_train.Config(), episodes_per_update=4, num_mini_batches=2, seed=3
    )
    drawn = [ppo_train.draw_prompts(list(range(6)), update, config) for update in (1, 2, 3)]
    order = [prompt for prompts, _ in drawn for prompt in prompts]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6)) and order[:6] != order[6:]
    assert len({seed for _, seeds in drawn for seed in seeds}) == 12
    assert drawn[1] == ppo_train.draw_prompts(list(range(6)), 2, config)


def test_minibatches_are_a_random_partition():
    config = dataclasses.replace(
        ppo_train.Config(), episodes_per_update=12, num_mini_batches=3, seed=3
    )
    first = ppo_train.draw_minibatches(1, config)
    second = ppo_train.draw_minibatches(2, config)
    assert [len(minibatch) for minibatch in first] == [4, 4, 4]
    assert sorted(sum(first, [])) == list(range(12)) != sum(first, [])
    assert first != second and first == ppo_train.draw_minibatches(1, config)


def test_a_batch_by_hand():
    form = SimpleNamespace(eos_token_id=2)
    prompts = [[5, 6, 7], [5], [5, 6]]
    responses = [
        Response([11, 12, 2], [11, 12], "eos"),  # text 11 12, then EOS was sampled
        Response([13, 14], [13, 14], "length"),  # cut: it is scored with an EOS that nobody sampled
        Response([15, 9], [15], "stop_text"),  # text 15; then token 9 began the next turn
    ]

    def make(minibatches, tokens):
        batch = make_batch(prompts, responses, minibatches, form, torch.device("cpu"))
        return batch, batch.micro_batches(tokens)

    batch, ((short, long),) = make([[0, 1, 2]], 8)  # 4, 4 and 6 tokens: 2 x 4 fit, 3 x 6 do not
    assert (
        batch.rows == [1, 2, 0]
        and batch.longest == 6
        and batch.ended.tolist() == [FALSE, FALSE, TRUE]
    )
    assert short.texts.ids.tolist() == [
        5,
        13,
        14,
        2,
        5,
        6,
        15,
        2,
    ] and short.texts.last.tolist() == [3, 7]
    assert long.texts.ids.tolist() == [5, 6, 7, 11, 12, 2] and long.texts.last.tolist() == [5]
    assert short.actions.tolist() == [13, 14, 15, 9] and long.actions.tolist() == [11, 12, 2]
    assert short.positions.tolist() == [0, 1, 5, 6] and long.positions.tolist() == [2, 3, 4]
    assert (short.tokens, long.tokens) == (slice(0, 4), slice(4, 7))
    assert (short.text_tokens, long.text_tokens) == (slice(0, 8), slice(8, 14))
    assert batch.response_mask.tolist() == [
        [TRUE, TRUE, FALSE],
        [TRUE, TRUE, FALSE],
        [TRUE, TRUE, TRUE],
    ]
    assert batch.by_response(torch.arange(7)).tolist() == [[0, 1, 0], [2, 3, 0], [4, 5, 6]]
    assert batch.end_to_end(batch.by_response(torch.arange(7))).tolist() == list(range(7))

    _, ((ragged,),) = make([[0, 1, 2]], 18)
    assert ragged.texts.ids.tolist() == [5, 13, 14, 2, 5, 6, 15, 2, 5, 6, 7, 11, 12, 2]
    assert ragged.texts.last.tolist() == [3, 7, 13] and ragged.positions.tolist() == [
        0,
        1,
        5,
        6,
        10,
        11,
        12,
    ]

    batch, ((first,), (second,)) = make([[2, 0], [1]], 100)
    assert batch.rows == [2, 0, 1] and batch.minibatches == [slice(0, 2), slice(2, 3)]
    assert second.texts.ids.tolist() == [5, 13, 14, 2] and second.tokens == slice(5, 7)
    assert count_tokens(batch) == [5, 2]

    # Token 9 was half text, which stands there as token 8: the policy still is asked for 9, where
    # it chose it.
    halves = [Response([15, 9], [15, 8], "stop_text")]
    (spanning,) = make_batch([[5, 6]], halves, [[0]], form, torch.device("cpu")).micro_batches(9)[0]
    assert spanning.texts.ids.tolist() == [5, 6, 15, 8, 2] and spanning.texts.last.tolist() == [4]
    assert spanning.actions.tolist() == [15, 9] and spanning.positions.tolist() == [1, 2]


def test_what_is_not_finite_is_named_by_its_row():
    batch, measured = make_update(
        ("eos", "eos"),
        (1, 2),
        scores=[0.0, 1.0],
        logprobs=[0.0, 0.0, 0.0],
        ref_logprobs=[0.0, 0.0, torch.nan],
        values=[0.0, 0.0, 0.0],
    )
    with pytest.raises(NotFinite, match="ref_logprobs not finite at texts 1 of the batch"):
        measured.check_finite(batch)


# ---------------------------------------------------------------- what is logged


def test_means_of_an_update_leave_out_what_a_step_does_not_have():
    """A step skipped by fp16's scaler has no gradient norm; above the KL stop there is no step."""
    history = [{"loss": 1.0, "grad_norm": 4.0}, {"loss": 2.0}, {"loss": 6.0, "grad_norm": 2.0}]
    assert mean_stats(history) == {"loss": 3.0, "grad_norm": 3.0, "policy/optimizer_steps": 3}
    assert mean_stats([]) == {"policy/optimizer_steps": 0}


def test_a_gradient_that_is_not_finite_is_skipped_by_the_scaler_or_ends_the_run():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([{"name": "policy", "params": [weight]}], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    weight.grad = scaler.scale(torch.tensor([torch.inf, 1.0, 1.0]))
    stats = ppo_train.read({"loss": torch.tensor(0.0)}, 1.0, ppo_train.clip(optimizer, scaler, 1.0))
    ppo_train.step(optimizer, scaler, stats)
    assert weight.tolist() == [0, 0, 0] and scaler.get_scale() == 1.0
    without = torch.amp.GradScaler("cpu", enabled=False)
    weight.grad = torch.tensor([torch.nan, 1.0, 1.0])
    stats = ppo_train.read(
        {"loss": torch.tensor(0.0)}, 1.0, ppo_train.clip(optimizer, without, 1.0)
    )
    with pytest.raises(NotFinite, match="policy gradient"):
        ppo_train.step(optimizer, without, stats)


def test_how_far_the_sampler_is_from_the_policy_by_hand():
    """Of q = 0.5 where p = 0.25, p/q - 1 - log(p/q) = 0.5 - 1 + log 2; nothing where both agree."""
    log = [math.log(x) for x in (0.25, 0.5, 0.8)]
    batch, measured = make_update(
        ("length", "eos"), (1, 2), scores=[0.0, 0.0], logprobs=log, ref_logprobs=log, values=log
    )
    sampled = (
        [math.log(0.5)],
        [math.log(0.5), math.log(0.8)],
    )  # of the shorter response, of the longer
    for response, logprobs in zip(batch.responses, sampled, strict=True):
        object.__setattr__(response, "logprobs", tuple(logprobs))
    assert sampler_kl(batch, measured) == pytest.approx(-0.5 + math.log(2), abs=1e-6)


@pytest.mark.parametrize("far", [2 * FAR_SAMPLER, math.nan])
def test_a_sampler_that_is_far_off_is_said_once(tmp_path, capsys, far):
    row = {
        "update": 1,
        "objective/scores": 0.0,
        "objective/kl": 0.0,
        "speed/tokens_per_second": 1.0,
    }
    with Log(tmp_path, total=3) as log:
        for distance in (FAR_SAMPLER / 2, far, far):
            log.update(row | {"policy/sampler_kl": distance})
    assert capsys.readouterr().out.count("away from the policy that is trained") == 1


def test_the_end_of_a_tracker_leaves_the_processes_together(monkeypatch, tmp_path):
    """accelerate's own end_training() also ends the group, before all have met at the end."""
    ended = []
    tracker = SimpleNamespace(finish=lambda: ended.append(True))
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, *_: self.trackers.append(tracker)
    )
    monkeypatch.setattr(Accelerator, "end_training", lambda _: pytest.fail("ends the group"))
    tracker = open_tracker("tensorboard", tmp_path, dataclasses.asdict(ppo_train.Config()))
    with Log(tmp_path, total=1, tracker=tracker):
        assert not ended
    assert ended == [True]


# ---------------------------------------------------------------- log-probabilities


def test_chosen_logprobs_equal_log_softmax_in_value_entropy_and_gradient(monkeypatch):
    # three rows a chunk, in blocks of two: both uneven
    monkeypatch.setattr("rlhf.engine.logprobs.chunk_elements", lambda on_card: 3 * 11)
    monkeypatch.setattr("rlhf.engine.logprobs.CPU_BLOCK", 2)
    torch.manual_seed(0)
    hidden = torch.randn(7, 5)
    weight = torch.randn(11, 5)
    tokens = torch.randint(11, (7,))
    plain = hidden.clone().requires_grad_()
    log_softmax = torch.log_softmax(plain @ weight.T / 0.7, -1)
    expected = log_softmax[torch.arange(7), tokens]
    (expected * torch.arange(7)).sum().backward()
    with torch.no_grad():
        logprobs, entropy, is_top1 = logprobs_of(hidden, weight, tokens, 0.7, statistics=True)
    assert is_top1.tolist() == (log_softmax.argmax(-1) == tokens).tolist()
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, -(log_softmax.exp() * log_softmax).sum(-1))
    ours = hidden.clone().requires_grad_()
    logprobs = logprobs_of(ours, weight, tokens, 0.7).logprobs
    torch.testing.assert_close(logprobs, expected)
    (logprobs * torch.arange(7)).sum().backward()
    torch.testing.assert_close(ours.grad, plain.grad)
