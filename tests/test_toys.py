"""PPO on problems with a known answer: ppo_train.main as it is, on a tiny random model, with a score of the test's own."""

import dataclasses
import json

import ppo_train
from ppo_train import Config

import pytest
from conftest import Checkpoints, make_model

TARGET = 300  # any token that the tiny model seldom writes
SEEDS = range(5)
SIZES = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 2,
    "num_ppo_epochs": 4,
    "rollout_batch_size": 32,
    "max_prompt_length": 64,
    "max_train_samples": 8,
    "max_eval_samples": 8,
    "eval_steps": 1000,
    "num_printed_samples": 0,
    "gradient_checkpointing": False,
    "role_layers": 0,
    "lora_rank": 8,
    "lora_alpha": 16,
    "dtype": "fp32",
}
RUN = {
    "learning_rate": 1e-2,
    "value_learning_rate": 1e-2,
    "warmup_updates": 1,
    "critic_warmup_updates": 1,
    "temperature": 1.0,
    "kl_coef": 0.0,
    "kl_controller": "fixed",
    "kl_stop": 1e9,
    "missing_eos_penalty": 0.0,
}


def frequency(micro):
    """The share of TARGET among the tokens: 1 at best."""
    return ((micro.actions == TARGET) & micro.response_mask).sum(1) / micro.response_mask.sum(1)


def length(micro):
    """1 for a response of four tokens, EOS among them; a quarter less for each token more or less."""
    return 1 - (micro.response_mask.sum(1) - 4).abs() / 4


def last_token(micro):
    """1 if the last token is TARGET, else 0, whatever came before."""
    last = micro.response_mask.sum(1, keepdim=True) - 1
    return (micro.actions.gather(1, last).squeeze(1) == TARGET).float()


@pytest.fixture(scope="module")
def trained(flags, tiny_data, call_main, tmp_path_factory):
    """SFT and reward checkpoints on a model with more room than the other tests' one; hardly trained."""
    folder = tmp_path_factory.mktemp("toys")
    base, sft, reward = make_model(folder / "base", hidden_size=64, layers=2), folder / "sft", folder / "reward"
    for script, argv in (
        ("sft_train", ["--base-model", base, "--output-dir", sft]),
        ("reward_train", ["--sft-checkpoint", sft, "--output-dir", reward]),
    ):
        result = call_main(script, [*flags[script], *argv])
        assert result.returncode == 0, result.stderr
    return Checkpoints(sft, reward, [], [])


@pytest.fixture
def run(trained, tiny_data, tmp_path, monkeypatch):
    def run(score, updates, **changes):
        measure = ppo_train.measure

        def scored(shared, micro, temperature, baseline):
            measure(shared, micro, temperature, baseline)
            micro.scores = score(micro).float()

        monkeypatch.setattr(ppo_train, "measure", scored)
        settings = SIZES | RUN | {"total_episodes": 32 * updates, "response_length": 8} | changes
        checkpoints = {"sft_checkpoint": str(trained.sft), "reward_checkpoint": str(trained.reward)}
        folders = {"dataset": str(tiny_data), "output_dir": str(tmp_path / "ppo"), "overwrite": True}
        ppo_train.main(dataclasses.replace(Config(), **checkpoints, **folders, **settings))
        rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if "episode" in row]

    return run


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("score", "updates"), [(frequency, 40), (length, 60), (last_token, 60)])
def test_ppo_finds_the_best_answer(run, score, updates, seed):
    rows = run(score, updates, seed=seed, response_length=12 if score is length else 8)
    scores = [row["objective/scores"] for row in rows]
    print(
        [round(s, 2) for s in scores[::4]],
        sum(scores[-5:]) / 5,
        sum(r["time/rollout"] + r["time/optimise"] + r["time/measure"] for r in rows),
    )
    assert sum(scores[:2]) / 2 < 0.5
    assert sum(scores[-5:]) / 5 >= 0.95
