"""PPO on problems with a known answer: ppo_train.main as it is, with a score of our own.

`make test` runs one seed of the first problem, cut short; `make toys` five of each, and RLOO and
GRPO on all of them, as experiments/rivals.py has them.
"""

import dataclasses
import json
import sys

import pytest
import torch
from conftest import ROOT, Checkpoints, make_model

sys.path.insert(0, str(ROOT / "experiments"))

import rivals

import ppo_train
from rlhf.ppo.batch import Batch

SLOW = pytest.mark.slow
TARGET = 10  # a token that the tiny model writes now and then
SETTINGS = {
    "episodes_per_update": 64,
    "num_mini_batches": 2,
    "num_ppo_epochs": 4,
    "rollout_batch_size": 64,
    "micro_batch_tokens": 4096,
    "max_prompt_length": 24,
    "response_length": 8,
    "max_train_samples": 8,
    "max_eval_samples": 8,
    "eval_steps": 1000,
    "save_steps": 1000,
    "num_printed_samples": 0,
    "gradient_checkpointing": False,
    "role_layers": 0,
    "lora_rank": 8,
    "lora_alpha": 16,
    "dtype": "fp32",
    "learning_rate": 1e-2,
    "value_learning_rate": 1e-2,
    "warmup_updates": 1,
    "critic_warmup_updates": 1,
    "kl_coef": 0.0,
    "kl_controller": "fixed",
    "kl_stop": 1e9,
    "missing_eos_penalty": 0.0,
}


def frequency(ids):
    """The share of TARGET among the tokens: 1 at best."""
    return ids.count(TARGET) / len(ids)


def length(ids):
    """1 for a response of three tokens with EOS; a third less for each token more or less."""
    return 1 - abs(len(ids) - 3) / 3


def last_token(ids):
    """1 if the number of the last token is a multiple of 8, else 0, whatever came before."""
    return float(ids[-1] % 8 == 0)


@pytest.fixture(scope="module")
def parents(flags, tiny_data, call_main, tmp_path_factory):
    """SFT and reward checkpoints on a roomier model than the other tests'; hardly trained."""
    folder = tmp_path_factory.mktemp("toys")
    base = make_model(folder / "base", hidden_size=64, layers=2)
    sft = folder / "sft"
    reward = folder / "reward"
    for script, argv in (
        ("sft_train", ["--base-model", base, "--output-dir", sft]),
        ("reward_train", ["--sft-checkpoint", sft, "--output-dir", reward]),
    ):
        result = call_main(script, [*flags[script], *argv])
        assert result.returncode == 0, result.stderr
    return Checkpoints(sft, reward, [], [])


@pytest.fixture
def run(parents, tiny_data, tmp_path, monkeypatch):
    """`run(score, updates, **changes)`: metrics of each update, PPO's with advantage variance."""

    def run(score, updates, method="ppo", **changes):
        lay_out = Batch.lay_out
        whiten = ppo_train.whiten
        sampled = {}
        variances = []

        def watched_lay_out(batch, rows):
            micro = lay_out(batch, rows)
            sampled[id(micro)] = micro, [response.ids for response in batch.responses[rows]]
            return micro

        def scored(shared, role, micro, lower):
            return torch.tensor([score(ids) for ids in sampled[id(micro)][1]])

        def watched_whiten(advantages):
            variances.append(advantages.var().item())
            return whiten(advantages)

        with monkeypatch.context() as patch:
            patch.setattr(Batch, "lay_out", watched_lay_out)
            patch.setattr(ppo_train, "score", scored)
            patch.setattr(ppo_train, "whiten", watched_whiten)
            settings = SETTINGS | changes
            settings["total_episodes"] = updates * settings["episodes_per_update"]
            checkpoints = {
                "sft_checkpoint": str(parents.sft),
                "reward_checkpoint": str(parents.reward),
            }
            folders = {
                "dataset": str(tiny_data),
                "output_dir": str(tmp_path / "ppo"),
                "overwrite": True,
            }
            with rivals.training_by(method):
                ppo_train.main(
                    dataclasses.replace(ppo_train.Config(), **checkpoints, **folders, **settings)
                )
        lines = (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "episode" in row]
        if method != "ppo":
            assert not variances  # nothing is whitened
            return rows
        return [row | {"variance": variance} for row, variance in zip(rows, variances, strict=True)]

    return run


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


REPEAT = {"temperature": 0.5}
PROBLEMS = [
    (frequency, 120, 0.2, REPEAT),
    # What KL costs keeps it varied until it is met.
    (length, 140, 0.0, {"response_length": 12, "learning_rate": 5e-3, "kl_coef": 0.005}),
    (last_token, 120, 0.4, {"learning_rate": 2e-2}),
]


def test_ppo_learns_to_repeat_a_token(run):
    rows = run(frequency, 60, **REPEAT)
    assert mean(rows[:2], "objective/scores") < 0.2
    assert mean(rows[-5:], "objective/scores") >= 0.95


@SLOW
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("score", "updates", "start", "settings"), PROBLEMS)
def test_ppo_finds_the_best_answer(run, score, updates, start, settings, seed):
    rows = run(score, updates, seed=seed, **settings)
    assert mean(rows[:2], "objective/scores") < start
    assert mean(rows[-5:], "objective/scores") >= 0.95


@SLOW
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["rloo", "grpo"])
@pytest.mark.parametrize(("score", "updates", "start", "settings"), PROBLEMS)
def test_groups_find_the_best_answer_without_a_critic(
    run, method, score, updates, start, settings, seed
):
    """Without KL: among equal scores GRPO would divide what it costs by its own small spread.

    GRPO's advantages do not shrink as scores get better, so it needs the smaller steps.
    """
    settings = settings | {"kl_coef": 0.0, "critic_warmup_updates": 0}
    if score is length:
        settings["learning_rate"] = 3e-3
    rows = run(score, updates, method, seed=seed, **settings)
    assert mean(rows[:2], "objective/scores") < start
    assert mean(rows[-5:], "objective/scores") >= 0.95


def test_with_a_huge_kl_coefficient_the_policy_stays_put(run):
    moved, put = (
        run(frequency, 14, kl_coef=kl_coef, learning_rate=2e-3) for kl_coef in (0.0, 10.0)
    )
    assert mean(moved[-5:], "objective/kl") > 1.5
    assert abs(mean(put[-5:], "objective/kl")) < 0.5


@SLOW
def test_without_a_critic_advantages_vary_more(run, monkeypatch):
    """A score of 1 for whatever is said teaches nothing.

    It is 0 in the first look at held-out prompts, whose mean is taken off.

    A critic that knows it leaves no advantage. One that is frozen at 0 leaves lambda ** (tokens to
    come): late tokens look better than early ones.
    """

    small = {"episodes_per_update": 16, "rollout_batch_size": 16}

    def variance():
        looked = []

        def score(ids):
            looked.append(ids)
            return float(len(looked) > SETTINGS["max_eval_samples"])

        return mean(
            run(score, 24, learning_rate=0.0, value_learning_rate=2e-2, **small)[-5:], "variance"
        )

    learned = variance()
    values = ppo_train.token_values
    monkeypatch.setattr(ppo_train, "token_values", lambda *args: values(*args) * 0)
    assert variance() == pytest.approx(
        (0.95 ** torch.arange(8.0)).var(unbiased=False).item(), rel=0.02
    )
    assert learned < 0.001


@SLOW
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ppo_learns_what_a_reward_function_says(run, tmp_path, weight):
    """A rule for short answers; with weight 0 what the reward model likes has no part in it."""
    (tmp_path / "rules.py").write_text(
        "def short(completions, **kwargs):\n    return [1 - len(t) / 20 for t in completions]\n"
    )
    rows = run(
        (lambda ids: len(ids) / 8) if weight == 0 else (lambda ids: 0.0),
        60,
        learning_rate=1e-2,
        reward_function=f"{tmp_path / 'rules.py'}:short",
        reward_weight=weight,
    )
    assert mean(rows[:2], "objective/scores") < 0.5
    assert mean(rows[-5:], "objective/scores") >= 0.95
