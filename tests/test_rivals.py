"""RLOO, GRPO and best-of-n beside PPO: formulas, groups, what is left of PPO, and the page.

The toys that they solve stand in test_toys.py.
"""

import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLOCKS, ROOT
from test_ppo import close, make_update
from torch import tensor

sys.path.insert(0, str(ROOT / "experiments"))

import results
import results_page
import rivals
import rivals_page as page
import tables

import ppo_train
import rlhf.ppo.batch
import rlhf.ppo.state
import rlhf.runs.curves
from rlhf.engine.roles import SharedBase
from rlhf.ppo.batch import NotFinite
from rlhf.runs.errors import UserError

SLOW = pytest.mark.slow


# ---------------------------------------------------------------- formulas


def test_rloo_by_hand():
    # Each less the mean of the other three: 1 - 11/3, 2 - 10/3, 3 - 9/3, 6 - 6/3.
    close(rivals.rloo(tensor([[1.0, 2.0, 3.0, 6.0]])), [[-8 / 3, -4 / 3, 0.0, 4.0]])
    close(rivals.rloo(tensor([[1.0, 4.0], [5.0, 5.0]])), [[-3.0, 3.0], [0.0, 0.0]])


def test_grpo_by_hand():
    # The mean is 3, the variance (4 + 1 + 0 + 9) / 3, its root 2.1602469.
    close(
        rivals.grpo(tensor([[1.0, 2.0, 3.0, 6.0]])),
        [[-0.9257772, -0.4628886, 0.0, 1.3886658]],
    )
    close(rivals.grpo(tensor([[5.0, 5.0, 5.0, 5.0]])), [[0.0, 0.0, 0.0, 0.0]])
    # The deviation of near-ties is 0.001, and EPS a tenth of it: -0.0005 / 0.0011.
    near = tensor([[0.5, 0.5, 0.5, 0.502]], dtype=torch.float64)
    assert rivals.grpo(near).tolist() == [pytest.approx([-1 / 2.2] * 3 + [3 / 2.2])]


@pytest.mark.parametrize("formula", [rivals.rloo, rivals.grpo])
def test_a_groups_advantages_sum_to_0_and_know_no_other_group(formula):
    torch.manual_seed(0)
    returns = torch.randn(5, 4, dtype=torch.float64)
    found = formula(returns)
    assert found.sum(1).abs().max() < 1e-12
    assert found.abs().min() > 1e-3
    # A shift of all scores to a prompt, such as an easy one has, changes nothing.
    shifted = returns + torch.randn(5, 1, dtype=torch.float64) * 10
    torch.testing.assert_close(formula(shifted), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(formula(returns[2:3]), found[2:3], rtol=0, atol=1e-12)
    # Who is who does not matter.
    torch.testing.assert_close(formula(returns.flip(1)), found.flip(1), rtol=0, atol=1e-12)


def test_rloo_is_the_centred_return_times_k_over_k_less_1_and_grpo_has_no_scale():
    torch.manual_seed(1)
    for k in (2, 4, 7):
        returns = torch.randn(3, k, dtype=torch.float64)
        centred = returns - returns.mean(1, keepdim=True)
        assert (rivals.rloo(returns) / centred).flatten().tolist() == pytest.approx(
            [k / (k - 1)] * 3 * k
        )
        assert torch.allclose(rivals.rloo(7 * returns), 7 * rivals.rloo(returns))
        assert torch.allclose(rivals.grpo(7 * returns), rivals.grpo(returns), rtol=1e-3)
        assert rivals.grpo(returns).std(1).tolist() == pytest.approx([1.0] * 3, rel=1e-3)


UPDATE = {
    # Two groups, 0 to 3 and 4 to 7; answers 1 and 3 have two tokens, and so come last.
    "lengths": (1, 2, 1, 2, 1, 1, 1, 1),
    "ended_by": ("eos", "eos", "eos", "eos", "eos", "length", "eos", "eos"),
}
ROWS = [0, 2, 4, 5, 6, 7, 1, 3]
MEASURED = {
    "scores": [2.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 3.0],  # of ROWS; 1 is taken off each
    "logprobs": [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -2.0, -1.0, -1.0],
    # KL is 0 but for answers 1, 0.5 and -1, and 3, 0.5 and 0.5.
    "ref_logprobs": [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.5, -1.0, -1.5, -1.5],
    "values": [0.0] * 10,
}
SETTINGS = dataclasses.replace(
    ppo_train.Config(), episodes_per_update=8, missing_eos_penalty=1.0, score_clip=5.0
)
# 1, 0 + 0.1 * 0.5, -1 and 2 - 0.1 * 1 have the mean 0.4875; 0, -1, 0, 0 the mean -0.25.
RETURNS = [1.0, 0.05, -1.0, 1.9, 0.0, -1.0, 0.0, 0.0]
RLOO = [0.6833333, -0.5833333, -1.9833333, 1.8833333, 1 / 3, -1.0, 1 / 3, 1 / 3]


def test_an_answer_has_one_advantage_from_its_score_less_the_kl_of_all_its_tokens():
    batch, measured = make_update(**UPDATE, **MEASURED)
    assert batch.rows == ROWS
    advantages, returns = rivals.group_advantages(rivals.rloo, batch, measured, 0.1, 1.0, SETTINGS)
    by_token = [0, 2, 4, 5, 6, 7, 1, 1, 3, 3]
    close(returns, [RETURNS[row] for row in by_token])
    close(advantages, [RLOO[row] for row in by_token])


def test_a_group_on_two_processes_is_whole(monkeypatch):
    """Each has some of a group's answers; what they say of them adds up."""
    halves = []
    for process in (0, 1):
        monkeypatch.setattr(rlhf.ppo.batch, "share", lambda items, n=process: items[n::2])
        numbers = {name: values for name, values in MEASURED.items() if name == "scores"}
        token_rows = [0, 2, 4, 5, 6, 7, 1, 1, 3, 3]
        ours = ROWS[process::2]
        numbers = {
            name: [
                v
                for v, row in zip(values, ROWS if name == "scores" else token_rows, strict=True)
                if row in ours
            ]
            for name, values in MEASURED.items()
        }
        halves.append(make_update(**UPDATE, **numbers))
    said = []
    monkeypatch.setattr(rivals, "sum_over_processes", lambda t: said.append(t.clone()) or t)
    for half in halves:
        rivals.group_advantages(rivals.rloo, *half, 0.1, 1.0, SETTINGS)
    monkeypatch.setattr(rivals, "sum_over_processes", lambda t: sum(said))
    for batch, measured in halves:
        advantages, _ = rivals.group_advantages(rivals.rloo, batch, measured, 0.1, 1.0, SETTINGS)
        expected = [
            RLOO[row]
            for row, n in zip(batch.rows, batch.response_lengths, strict=True)
            for _ in range(n)
        ]
        close(advantages, expected)


def test_groups_are_drawn_whole():
    config = dataclasses.replace(ppo_train.Config(), episodes_per_update=8, seed=3)
    prompts = [[i] for i in range(6)]
    drawn = [
        rivals.draw_groups(ppo_train.draw_prompts, prompts, update, config) for update in (1, 2, 3)
    ]
    queries = [query[0] for some, _ in drawn for query in some]
    groups = [queries[i : i + 4] for i in range(0, 24, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sorted(group[0] for group in groups) == [0, 1, 2, 3, 4, 5]  # an epoch
    seeds = [seed for _, some in drawn for seed in some]
    assert seeds == [(3, 2, episode) for episode in range(24)]
    odd = dataclasses.replace(config, episodes_per_update=30)
    with pytest.raises(UserError, match="--episodes-per-update 30: give a multiple of 4"):
        rivals.draw_groups(ppo_train.draw_prompts, prompts, 1, odd)


# ---------------------------------------------------------------- best-of-n


def test_order_statistics_by_hand():
    assert rivals.chances(3).tolist() == [
        pytest.approx([1 / 3, 1 / 3, 1 / 3]),
        pytest.approx([0, 1 / 3, 2 / 3]),
        pytest.approx([0, 0, 1]),
    ]
    assert rivals.chances(64).sum(1).tolist() == pytest.approx([1.0] * 64)
    # The best of two of three: a beats b and c, b beats c.
    found = rivals.best_of([3.0, 1.0, 2.0], [10.0, 40.0, 20.0])
    assert found.tolist() == pytest.approx([70 / 3, (2 * 10 + 20) / 3, 10.0])


@pytest.mark.parametrize(
    "scores", [[0.3, -1.0, 2.0, 0.7, 0.1, 5.0], [1.0, 2.0, 2.0, 0.0, 2.0, 1.0], [4.0] * 6]
)
def test_order_statistics_are_the_mean_over_all_subsets(scores):
    """Of which a tie takes each with the same chance."""
    values = [7.0, -2.0, 3.0, 11.0, 0.5, 1.0]
    found = rivals.best_of(scores, values)
    for n in range(1, 7):
        best = []
        for some in itertools.combinations(range(6), n):
            most = max(scores[i] for i in some)
            best.append(np.mean([values[i] for i in some if scores[i] == most]))
        assert found[n - 1] == pytest.approx(np.mean(best))


def test_the_kl_of_best_of_n():
    assert rivals.best_of_n_kl(1) == 0
    assert rivals.best_of_n_kl(2) == pytest.approx(0.1931472)
    assert rivals.best_of_n_kl(64) == pytest.approx(3.1745081)


def test_a_pool_gives_the_numbers_of_each_n():
    pool = [
        {
            "score": [1.0, 2.0],
            "gold_score": [0.0, 4.0],
            "tokens": [3, 5],
            "ended": [False, False],
        },
        {"score": [2.0, 1.0], "gold_score": [1.0, 1.0], "tokens": [8, 2], "ended": [True, True]},
    ]
    found = rivals.curves_of(pool, [1.0, 1.0], 0.3)
    assert found["means"] == {
        "score": [1.5, 2.0],
        "gold_score": [1.5, 2.5],
        "tokens": [4.5, 6.5],
        "ended": [0.5, 0.5],
        "win": [0.5, 0.75],  # of 0 and 4 one beats 1, and 1 ties with it
    }
    assert found["best_of"]["1"]["gold_score"] == [2.0, 1.0]
    assert found["best_of"]["2"]["tokens"] == [5.0, 8.0]
    assert list(found["best_of"]) == ["1", "2"]


def test_the_best_answer_is_the_one_that_training_would_reward_most():
    """2 without EOS is worth less than 1.5 with it if the penalty is 0.6, and more if it is 0.4."""
    pool = [{"score": [2.0, 1.5], "gold_score": [5, 7], "tokens": [9, 4], "ended": [False, True]}]
    for penalty, tokens in ((0.6, 4.0), (0.4, 9.0), (0.5, 6.5)):  # at 0.5 they tie
        assert rivals.curves_of(pool, [0.0], penalty)["means"]["tokens"] == [6.5, tokens]


# ---------------------------------------------------------------- what follows from the records


def made_cost(device="a CPU", rloo=30.0):
    """Seconds of an update: PPO's 40, GRPO's 25."""
    seconds = {"ppo": (10.0, 10.0, 20.0), "rloo": (10.0, 8.0, rloo - 18), "grpo": (10.0, 5.0, 10.0)}
    parts = ("rollout", "measure", "optimise")
    methods = {
        name: {
            "seconds": dict(zip(parts, values, strict=True)),
            "counted": 6,
            "peak_memory_gib": 2.0 - 0.5 * (name != "ppo"),
        }
        for name, values in seconds.items()
    }
    methods["best_of_n"] = {
        "seconds": {"rollout": 12.8, "measure": 3.2},
        "counted": 6,
        "peak_memory_gib": 1.0,
    }
    return {
        "device": device,
        "threads": 1,
        "look_seconds_a_prompt": 0.5,
        "methods": methods,
    }


def test_each_gets_the_updates_that_cost_what_ppos_do():
    # 48 updates of PPO take 1920 s: 64 of 30 s, 76.8 of 25 s.
    whole = {"ppo": 1.0, "rloo": 1.0, "grpo": 1.0}
    assert rivals.updates_of(made_cost(), whole) == {"ppo": 48, "rloo": 64, "grpo": 77}
    # Half of RLOO's 12 s are not worked where `kl_stop` ends its updates so early: 24 s are left.
    assert rivals.updates_of(made_cost(), {"ppo": 1.0, "rloo": 0.5}) == {"ppo": 48, "rloo": 80}
    # An update of PPO may be cheaper, too: 48 of 30 s buy as many of RLOO's.
    assert rivals.updates_of(made_cost(), {"ppo": 0.5, "rloo": 1.0}) == {"ppo": 48, "rloo": 48}


def test_a_minibatch_that_ends_an_update_is_computed_but_makes_no_step():
    run = {"optimizer_steps": [8, 3, 7], "most_steps": 8}
    assert rivals.share_made(run) == pytest.approx(18 / 24)
    assert rivals.share_computed(run) == pytest.approx((8 + 4 + 8) / 24)


def test_the_better_rate_is_the_one_with_the_higher_gold_gain():
    def run(gains):
        sft = {"gold_score": [0.5] * len(gains)}
        return {"answers": {"sft": sft, "policy": {"gold_score": [0.5 + g for g in gains]}}}

    searches = {5e-4: run([0.1, 0.5]), 1e-3: run([0.2, 0.2])}
    assert rivals.gold_gain(searches[5e-4]) == pytest.approx(0.3)
    assert rivals.better_rate(searches) == 5e-4
    assert rivals.better_rate(searches | {5e-4: {"failed": "not finite"}}) == 1e-3
    with pytest.raises(UserError, match="every learning rate of the search broke off"):
        rivals.better_rate({1e-3: {"failed": "not finite"}})


# ---------------------------------------------------------------- ppo_train.py without its critic

SMALL = {
    "role_layers": 2,
    "lora_rank": 4,
    "lora_alpha": 8,
    "dtype": "fp32",
    "episodes_per_update": 8,
    "num_mini_batches": 2,
    "response_length": 6,
    "max_prompt_length": 64,
    "max_train_samples": 24,
}


@pytest.fixture(scope="module")
def parents(flags, trained, call_main, tmp_path_factory):
    """A reward model of each half of the pairs, on one SFT model."""
    folder = tmp_path_factory.mktemp("parents")
    found = {"sft_checkpoint": str(trained.sft)}
    for name, half in (("reward", "first"), ("gold", "second")):
        argv = [*flags["reward_train"], "--sft-checkpoint", trained.sft, "--half", half]
        result = call_main("reward_train", [*argv, "--output-dir", folder / name])
        assert result.returncode == 0, result.stderr
        found[f"{name}_checkpoint"] = str(folder / name)
    return found


@pytest.fixture
def config(parents, tiny_data, tmp_path, monkeypatch):
    """`config(phase, method, **changes)`, of runs of a second."""
    settings = rivals.settings
    monkeypatch.setattr(
        rivals, "settings", lambda config: dataclasses.replace(settings(config), **SMALL)
    )
    # Pictures would take most of the time.
    monkeypatch.setattr(rlhf.runs.curves.Curves, "draw", lambda curves: None)
    monkeypatch.setattr(rlhf.ppo.state, "plot_frontier", lambda folder, picture: picture.touch())
    monkeypatch.setattr(rivals, "SEARCH_EPISODES", 16)
    monkeypatch.setattr(rivals, "TIMED", 2)
    monkeypatch.setattr(rivals, "ROUNDS", 1)
    monkeypatch.setattr(rivals, "DRAWS", 4)
    places = {
        **parents,
        "dataset": str(tiny_data),
        "records": str(tmp_path / "records"),
        "work": str(tmp_path / "work"),
        "max_eval_samples": 4,
    }

    def config(phase, method="ppo", **changes):
        return rivals.Config(phase=phase, method=method, **(places | changes))

    return config


def do(config, tmp_path):
    """The record of a phase, which is left where later ones look for it."""
    rivals.main(config)
    name = rivals.name_of(config)
    text = (Path(config.work) / f"{name}.json").read_text()
    (tmp_path / "records").mkdir(exist_ok=True)
    (tmp_path / "records" / f"rivals_{name}.json").write_text(text)
    return json.loads(text)


def files_of(folder):
    """Its weights, and its metrics but for the clock's."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]
    weights = {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")
    }
    return rows, weights


def test_ppo_is_ppo_train_to_the_bit_also_after_the_others(config, tmp_path, monkeypatch):
    """Nothing is left of what stood in its place; and all start from the same policy."""
    starts = []
    prepare = ppo_train.prepare_base

    def watched(*args):  # with all models there are, before the first look
        shared, *rest = prepare(*args)
        starts.append([p.detach().clone() for p in shared.parameters("policy")])
        return shared, *rest

    monkeypatch.setattr(ppo_train, "prepare_base", watched)
    own = config("search")
    with rivals.looking_at("selection"):
        ppo_train.main(
            dataclasses.replace(
                rivals.settings(own),
                total_episodes=16,
                learning_rate=1e-3,
                overwrite=True,
                output_dir=str(tmp_path / "alone"),
            )
        )
    assert do(config("search", "rloo"), tmp_path)["episodes"] == 16
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    do(own, tmp_path)
    alone = files_of(tmp_path / "alone")
    assert files_of(tmp_path / "work" / "search_ppo_0.001") == alone
    assert {*alone[1]} == {
        "adapter_model.safetensors",
        "trained_prompts.safetensors",
        "value/adapter_model.safetensors",
    }
    rloo = files_of(tmp_path / "work" / "search_rloo_0.001")
    assert rloo[1]["adapter_model.safetensors"] != alone[1]["adapter_model.safetensors"]


def test_without_a_critic_none_is_trained_read_or_kept(config, tmp_path, monkeypatch):
    passes = []
    upper = SharedBase.upper
    monkeypatch.setattr(
        SharedBase,
        "upper",
        lambda shared, lower, texts, role: passes.append(role) or upper(shared, lower, texts, role),
    )
    kept = []
    load_models = ppo_train.load_models
    monkeypatch.setattr(
        ppo_train, "load_models", lambda *args: kept.append(load_models(*args)) or kept[-1]
    )
    found = do(config("search", "grpo"), tmp_path)
    assert set(passes) == {"policy", "reference", "reward", "gold"}
    shared = kept[0][0]
    assert shared.trained == ("policy",) and {*shared.heads} == {"reward", "gold"}
    assert not any(".value." in name for name, _ in shared.peft.named_parameters())
    folder = tmp_path / "work" / "search_grpo_0.001"
    assert not (folder / "value").exists()
    rows = [row for row in files_of(folder)[0] if "episode" in row]
    assert all("loss/policy_avg" in row and "loss/value_avg" not in row for row in rows)
    assert [row["policy/optimizer_steps"] for row in rows] == [4, 4]  # from the first update on
    assert found["learning_rate"] == 1e-3 and len(found["answers"]["policy"]["tokens"]) == 4


def test_a_search_reads_no_test_prompt_and_trains_on_none_that_judges(
    config, tmp_path, monkeypatch
):
    loaded = {}
    load_prompts = ppo_train.load_prompts
    draw_prompts = ppo_train.draw_prompts
    everything = []

    def watched(some, prompt_format):
        found = load_prompts(dataclasses.replace(some, keep="last"), prompt_format)
        loaded["train"], loaded["test"] = found.train, found.held_out
        return load_prompts(some, prompt_format)

    def drawn(prompts, update, some):
        everything.append(prompts)
        return draw_prompts(prompts, update, some)

    looked = []
    evaluate = ppo_train.evaluate

    def look(some, shared, prompt_format, total, prompts, probe=None):
        looked.append(prompts)
        return evaluate(some, shared, prompt_format, total, prompts, probe)

    monkeypatch.setattr(ppo_train, "load_prompts", watched)
    monkeypatch.setattr(ppo_train, "draw_prompts", drawn)
    monkeypatch.setattr(ppo_train, "evaluate", look)
    do(config("search", "ppo"), tmp_path)
    assert looked[0] == looked[1] and len(looked) == 2
    assert all(prompt in loaded["train"] for prompt in looked[0])
    assert not any(prompt in loaded["test"] for prompt in looked[0])
    assert not any(prompt in everything[0] for prompt in looked[0])


def test_every_phase_runs_and_the_page_is_made_of_what_it_leaves(config, tmp_path, monkeypatch):
    """The whole way, on the tiny model: cost, search, final runs, and best-of-n, which goes on."""

    def in_this_process(whole, folder, method):
        own = dataclasses.replace(whole, phase="timing", method=method, work=str(folder))
        rivals.main(own)
        return json.loads((folder / f"timing_{method}.json").read_text())

    monkeypatch.setattr(rivals, "in_a_process_of_its_own", in_this_process)
    shares = []
    updates = {"ppo": 2, "rloo": 4, "grpo": 3}
    monkeypatch.setattr(rivals, "updates_of", lambda cost, some: shares.append(some) or updates)
    prompts = []
    timed = {"rollout": ppo_train, "answer": rivals}
    for name, module in timed.items():
        whole = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, own=whole: prompts.append(args[3]) or own(*args)
        )
    records = {"rivals_cost": do(config("cost"), tmp_path)}
    assert all(m["counted"] == 1 for m in records["rivals_cost"]["methods"].values())
    # Two updates of each method, on the same prompts, of which each is asked once.
    updates_prompts = [some for some in prompts if len(some) == 8]
    assert updates_prompts == 4 * updates_prompts[:2]
    assert len({tuple(prompt) for prompt in updates_prompts[0]}) > 2
    assert records["rivals_cost"]["look_seconds_a_prompt"] > 0
    for rate, gain in ((5e-4, 0.3), (1e-3, 0.1)):
        found = do(config("search", "rloo", learning_rate=rate), tmp_path)
        found["answers"]["policy"]["gold_score"] = [
            gold + gain for gold in found["answers"]["sft"]["gold_score"]
        ]
        for method in ("rloo", "ppo"):
            records[f"rivals_search_{method}_{rate:g}"] = found
            path = tmp_path / "records" / f"rivals_search_{method}_{rate:g}.json"
            path.write_text(json.dumps(found))
    for method, count in (("ppo", 2), ("rloo", 4)):
        found = records[f"rivals_{method}_1"] = do(config("final", method, seed=1), tmp_path)
        assert (found["learning_rate"], found["updates"]) == (5e-4, count)
        assert found["episodes"] == 8 * count
        assert len(found["looks"]) == 1 + count
        assert 0 < found["accuracy"]["gold"] < 1
        assert len(found["optimizer_steps"]) == count and found["most_steps"] == 4
        assert {*found["seconds"]} == {"time/rollout", "time/measure", "time/optimise"}
        assert shares.pop() == dict.fromkeys(("ppo", method), 1.0)
    with pytest.raises(UserError, match="rivals_search_grpo_0.0005.json, which a final run"):
        rivals.main(config("final", "grpo"))
    best_of_n = config("final", "best_of_n", seed=1)
    pool = records["rivals_best_of_n_1"] = do(best_of_n, tmp_path)
    sft = pool["answers"]["sft"]
    # As all look at SFT's answers of the same seeds, they stand against the same answers, also
    # where the run's own seed is another.
    for method in ("ppo", "rloo"):
        theirs = records[f"rivals_{method}_1"]["answers"]["sft"]
        assert theirs["tokens"] == sft["tokens"]
        assert theirs["gold_score"] == pytest.approx(sft["gold_score"], abs=1e-3)
    for name in ("score", "gold_score", "tokens"):
        assert len(pool["means"][name]) == 4 and len(pool["best_of"]["4"][name]) == 4
    means = zip(pool["means"]["score"], pool["means"]["ended"], strict=True)
    rewards = [score - 0.3 * (1 - ended) for score, ended in means]
    assert rewards == sorted(rewards) and rewards[0] < rewards[-1]
    # Cut short after two prompts, it goes on to the same.
    path = tmp_path / "work" / "best_of_n_1" / "pool.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    path.write_text("\n".join(lines[:3]) + "\n")
    asked = []
    answer = rivals.answer
    monkeypatch.setattr(rivals, "answer", lambda *args: asked.append(args[3]) or answer(*args))
    again = do(best_of_n, tmp_path)
    assert [len(prompts) for prompts in asked] == [4, 4, 4]  # SFT's, and those of two prompts
    assert again == pool and path.read_text().splitlines() == lines

    found = page.summary(records, (0, 1, 2))
    text = "\n\n".join([*page.top(found, [page.PLOT]), *page.details(found, records)])
    assert "**Not decided:** 2 of 9 training runs are in" in text
    assert "| PPO | 1 |" in text and "| RLOO | 1 |" in text and "| best of 4 | 1 |" in text
    page.plot(found, tmp_path / "rivals.png")
    assert (tmp_path / "rivals.png").stat().st_size > 5000


def test_a_run_that_breaks_off_is_a_result(config, tmp_path, monkeypatch):
    def broken(*_):
        raise NotFinite("scores not finite")

    monkeypatch.setattr(ppo_train, "measure", broken)
    found = do(config("search", "rloo"), tmp_path)
    assert found["failed"] == "update 1: scores not finite; the last good state is none"
    assert "answers" not in found and found["config"]["method"] == "rloo"


def test_seconds_are_those_that_the_cpu_worked(config, tmp_path, monkeypatch):
    optimise = ppo_train.optimise

    def waits(*args):
        time.sleep(0.5)
        return optimise(*args)

    monkeypatch.setattr(ppo_train, "optimise", waits)
    began = time.process_time()
    found = do(config("search", "rloo"), tmp_path)
    worked = time.process_time() - began
    assert 0 < sum(found["seconds"].values()) < worked
    assert found["seconds"]["time/optimise"] < 2 * 0.5


@SLOW
def test_a_run_that_was_cut_short_goes_on(config, tmp_path, monkeypatch):
    class Crash(Exception):
        pass

    monkeypatch.setattr(rivals, "SEARCH_EPISODES", 24)
    settings = rivals.settings
    monkeypatch.setattr(
        rivals, "settings", lambda config: dataclasses.replace(settings(config), save_steps=1)
    )
    whole = do(config("search", "rloo", work=str(tmp_path / "whole")), tmp_path)
    measure = ppo_train.measure
    calls = []

    def crash_at_the_third(*args):
        calls.append(1)
        if len(calls) == 3:
            raise Crash
        return measure(*args)

    monkeypatch.setattr(ppo_train, "measure", crash_at_the_third)
    with pytest.raises(Crash):
        rivals.main(config("search", "rloo"))
    # What its length follows from is another now, as after a new record of the cost.
    monkeypatch.setattr(rivals, "SEARCH_EPISODES", 40)
    again = do(config("search", "rloo"), tmp_path)
    assert len(calls) == 4  # two updates, the one that crashed, and that one alone again
    assert again["answers"] == whole["answers"] and again["episodes"] == 24


# ---------------------------------------------------------------- steps


def test_finals_come_after_what_they_rest_on_and_a_measurement_is_alone(monkeypatch, tmp_path):
    config = results.Config(work=str(tmp_path), jobs=3, only="rivals")
    every = results.steps(config)
    names = [step.name for step in every]
    for step in every:
        assert all(names.index(need) < names.index(step.name) for need in step.after)
    shown = {step.name: step.command for step in every}
    todo = results.to_do(config, shown)
    assert {step.name for step in todo if not step.name.startswith("rivals")} == {
        f"{phase}_{seed}" for phase in ("sft", "reward", "gold") for seed in (0, 1, 2)
    }
    assert "rivals_cost_card" not in [step.name for step in todo]
    running = set()
    done = []

    def do(_, step, shown):
        running.add(step.name)
        beside = set(running)
        results.time.sleep(0.005)
        beside |= running
        assert not step.alone or beside == {step.name}
        assert {*step.needs, *step.after} <= set(done)
        running.remove(step.name)
        done.append(step.name)

    monkeypatch.setattr(results, "do", do)
    results.do_all(config, todo, shown)
    assert len(done) == len(todo)
    # A final run alone has what it rests on done, too, where there is no record of it.
    (tmp_path / "records").mkdir()
    one = dataclasses.replace(config, only="rivals_grpo_0")
    names = [step.name for step in results.to_do(one, shown)]
    rests_on = ["rivals_cost"]  # and on PPO's steps, which say what equal cost is
    for method in ("ppo", "grpo"):
        rests_on += [f"rivals_search_{method}_0.0005", f"rivals_search_{method}_0.001"]
    assert [name for name in names if "rivals" in name] == [*rests_on, "rivals_grpo_0"]
    path = tmp_path / "records" / "rivals_cost.json"
    path.write_text(json.dumps({"command": shown["rivals_cost"]}))
    names = [step.name for step in results.to_do(one, shown)]
    assert [name for name in names if "rivals" in name] == [*rests_on[1:], "rivals_grpo_0"]


def test_what_was_not_run_again_keeps_its_published_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "SAMPLES", 10)
    docs = tmp_path / "docs"
    docs.mkdir()
    old = json.loads((ROOT / "docs" / "results.json").read_text())
    (docs / "results.json").write_text(json.dumps(old))
    config = results.Config(
        work=str(tmp_path / "work"), output=str(docs), dataset="x/rm-static", only_report=True
    )
    records = tmp_path / "work" / "records"
    records.mkdir(parents=True)
    how = {"minutes": 1.0, "threads": 1, "cpu": "a CPU", "commit": "abc", "command": "c"}
    (records / "rivals_cost.json").write_text(json.dumps(how | made_cost()))
    results.main(config)
    new = json.loads((docs / "results.json").read_text())
    assert new["records"].pop("rivals_cost")["device"] == "a CPU"
    del old["records"]["rivals_cost"]
    assert new["records"] == old["records"]
    # Of other data nothing is kept.
    results.main(dataclasses.replace(config, dataset="x/others"))
    assert list(json.loads((docs / "results.json").read_text())["records"]) == ["rivals_cost"]


# ---------------------------------------------------------------- the page


def made_run(gain, seed, kl=4.0, updates=48, steps=8):
    """Gains of four prompts around `gain`; made up, as all figures here are."""
    sft = [0.1 * seed, 0.2, 0.3, 0.4]
    spread = [-0.02, 0.02, 0.01, -0.01]
    gold = [a + gain + b for a, b in zip(sft, spread, strict=True)]
    metrics = {
        "ppo_kl": kl,
        **{
            f"{name}{end}": gain
            for name in ("score_gain", "gold_gain")
            for end in ("", "_low", "_high")
        },
        **{
            f"{who}_{name}": 0.5
            for who in ("sft", "ppo")
            for name in ("response_length", "eos_rate")
        },
        # Harmful requests are refused at 0.4 to 0.6 times SFT's odds.
        "refusal_shift": math.log(0.4 + 0.1 * seed),
        "refusal_shift_low": math.log(0.25),
        "refusal_shift_high": math.log(0.75),
        "warnings": ["safety: fewer refusals"] if seed == 2 else [],
    }
    numbers = {"score": gold, "tokens": [40.0, 41.0, 42.0, 43.0]}
    return {
        "learning_rate": 1e-3,
        "updates": updates,
        "episodes": 32 * updates,
        "metrics": metrics,
        "optimizer_steps": [steps] * updates,
        "most_steps": 8,
        "seconds": {"time/rollout": 600.0, "time/optimise": 900.0},
        "peak_memory_gib": 1.5,
        "accuracy": {"reward": 0.65, "gold": 0.61},
        "looks": [
            {"update": 0, "eval/kl": 0.0, "eval/gold_scores": 0.25},
            {"update": updates, "eval/kl": kl, "eval/gold_scores": 0.25 + gain},
        ],
        "answers": {
            "sft": numbers | {"gold_score": sft, "kl": [0.0] * 4},
            "policy": numbers | {"gold_score": gold, "kl": [kl] * 4},
        },
    }


def made_pool(seed, most=0.8):
    """The gain grows evenly from 0 at n = 1 to `most` at n = 64."""
    sft = [0.1 * seed, 0.2, 0.3, 0.4]
    means = [np.mean(sft) + most * n / 63 for n in range(64)]
    best = {
        str(n): {
            "gold_score": [gold + most * (n - 1) / 63 for gold in sft],
            "score": [1.0] * 4,
            "tokens": [40.0] * 4,
            "win": [0.5 + 0.5 * (n > 1)] * 4,
        }
        for n in rivals.SHOWN
    }
    answers = {"sft": {"gold_score": sft, "tokens": [40.0] * 4, "score": [0.0] * 4}}
    return {"draws": 64, "answers": answers, "means": {"gold_score": means}, "best_of": best}


def made_records(**gains):
    """All records, with gains of three seeds by method."""
    records = {"rivals_cost": made_cost()}
    for method, of_seeds in gains.items():
        for rate in rivals.RATES:
            records[f"rivals_search_{method}_{rate:g}"] = made_run(rate * 100, 0)
        for seed, gain in enumerate(of_seeds):
            records[f"rivals_{method}_{seed}"] = made_run(gain, seed)
    records |= {f"rivals_best_of_n_{seed}": made_pool(seed) for seed in range(3)}
    return records


def text_of(records, plots=(page.PLOT,)):
    """The part as it is made of results.json."""
    found = json.loads(json.dumps(results_page.summary(records)))
    assert found["rivals"]["complete"] == all(
        f"rivals_{name}_{seed}" in records for name in page.NAMES for seed in range(3)
    )
    return "\n\n".join(page.top(found["rivals"], list(plots))), "\n\n".join(
        page.details(found["rivals"], records)
    )


def test_a_clear_winner_is_named():
    top, details = text_of(
        made_records(ppo=(0.50, 0.52, 0.54), rloo=(0.77, 0.83, 0.89), grpo=(0.60, 0.62, 0.61))
    )
    assert "**At equal cost RLOO wins:** its gold gain is +0.22 (" in top
    assert "+0.31 (" in top and "above PPO" in top and "above GRPO" in top
    assert "less than the 0.1" not in top
    rows = [line for line in top.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| method | seeds | gold gain | win rate over SFT | at equal length")
    assert rows[2].startswith("| PPO | 3 | +0.52 (+0.50 to +0.54) | 100% (100% to 100%) | 100% (")
    # 48 updates of 40 s, of which 1500 s were worked; an answer is a 32nd of a rollout of 10 s.
    assert rows[2].endswith("| 4.0 | 42 | 25 of 32 min | 0.31 s | 2.0 GiB |")
    assert rows[3].startswith("| RLOO | 3 | +0.83 (")
    # Best of 16: 0.8 * 15 / 63; each of the 16 takes (12.8 + 3.2) / 32 s.
    assert rows[6].startswith("| best of 16 | 3 | +0.19 (+0.19 to +0.19) | 100% (")
    assert rows[6].endswith("| 1.8 | 40 | none | 8.00 s | 1.0 GiB |")
    assert len(rows) == 8
    assert "a standard deviation of 0.05" in top and "differ by up to 0.08 by chance" in top
    assert top.index("What 3 seeds can show") < top.index("| method")
    assert "![gold score against KL, all methods](rivals.png)" in top
    # 0.52 is first reached where 0.8 * (n - 1) / 63 is: at 42, which takes 21 s, not 0.31.
    assert (
        "PPO's gold gain is that of about best of 42 (between 32 and 64), at a KL of 2.8 in place "
        "of 4.0."
    ) in top
    assert f"Its training has paid after about {1500 / (21 - 0.3125):,.0f} answers." in top
    assert "The search of the learning rate is not counted, here or where training has" in top
    # 0.83 against 0.8, two of three runs 0.06 from the mean: 0 is within.
    assert "RLOO's gold gain is not reached by best of 64, which gains -0.03 (" in top
    assert "within the interval, it may be." in top and "what sampling does not" not in top
    assert (
        "Best of 64, which trains nothing but samples 64 answers at every use, cannot be told "
        "apart from it: -0.03 ("
    ) in top
    assert "costs RLOO's 0.75 and GRPO's 0.62 of PPO's on a CPU, with 0.75 of its memory" in top
    assert "On a card it was not measured." in top
    assert "episodes; times PPO's minutes: RLOO 1.00, GRPO 1.00)" in top
    assert "| RLOO | 10.0 | 8.0 | 12.0 | 30.0 | 0.75 | 100% | 64 | 1.50 |" in details
    assert "| best-of-n | 12.8 | 3.2 |  | 16.0 | 0.40 |  |  | 1.00 |" in details
    assert "| RLOO | 0.0005 | +0.05 | 4.0 | 100% | 25 |  |" in details
    assert "| RLOO | 0.001 | +0.10 | 4.0 | 100% | 25 | yes |" in details
    assert "All take 0.001, the highest that was tried" in details and "grid's edge" in details
    assert "which no PPO, RLOO or GRPO run trains on" in details
    # Of the odds of refusing, the span over the runs.
    assert (
        "odds, lowest to highest run: PPO 0.40 to 0.60, RLOO 0.40 to 0.60, GRPO 0.40 to 0.60."
        in top
    )
    assert details.count("| 50% -> 50% | 0.40 (0.25 to 0.75) | 100% | 25 |") == 3
    warned = [f"{name}, seed 2: safety: fewer refusals" for name in ("PPO", "RLOO", "GRPO")]
    assert f"Warnings of the runs: {'; '.join(warned)}." in details
    # Steps made, minutes, and nominal ones.
    assert details.count(" to 0.75) | 100% | 25 | 32 | 1.5 | 0.650, 0.610 |") == 3
    assert details.count(" to 0.75) | 100% | 25 | 24 | 1.5 | 0.650, 0.610 |") == 3
    assert "| GRPO | PPO | +0.09 (" in details
    assert len(top.split()) < 680  # two screens, of which the table is a third


def test_updates_that_end_early_are_counted_as_such():
    records = made_records(ppo=(0.5, 0.5, 0.5), rloo=(0.6, 0.6, 0.6), grpo=(0.5, 0.5, 0.5))
    for rate in rivals.RATES:
        # Of 8 minibatches 4 are computed, and 3 make a step: 24 s an update, of which 6 s.
        records[f"rivals_search_rloo_{rate:g}"] = made_run(-rate, 0, steps=3)
    records["rivals_rloo_0"] = made_run(0.6, 0, updates=80, steps=2)
    top, details = text_of(records)
    assert "| RLOO | 10.0 | 8.0 | 12.0 | 30.0 | 0.75 | 50% | 80 | 1.50 |" in details
    assert "| RLOO | 0.0005 | -0.00 | 4.0 | 38% | 25 | yes |" in details
    assert "grid's edge" not in details  # one of the three takes the lower rate
    assert " to 0.75) | 25% | 25 | 32 | 1.5 |" in details
    assert "| 25 of 32 min |" in next(line for line in top.splitlines() if "| RLOO |" in line)


def test_what_sampling_reaches_is_said_by_its_interval():
    records = made_records(ppo=(0.20, 0.22, 0.21), rloo=(1.2, 1.3, 1.1), grpo=(0.1, 0.9, 0.2))
    top, _ = text_of(records)
    assert "RLOO's gold gain is out of reach for best of 64, which gains -0.40 (" in top
    assert "above it: training gives what sampling does not." in top
    assert "at every use, gains less: -0.40 (" in top  # beside the best of the trained
    # Runs as far apart as GRPO's say little, of any method.
    assert "GRPO's gold gain is that of about best of 33 (between 8 and 64)" in top
    assert "PPO's gold gain is that of about best of 18 (fewer than 64)" in top
    weak, _ = text_of(made_records(ppo=(0.2, 0.2, 0.2), rloo=(0.1, 0.1, 0.1), grpo=(0, 0, 0)))
    assert "gains more: +0.60 (+0.59 to +0.61) above PPO." in weak


def test_a_broken_final_run_is_a_result_and_its_method_cannot_win():
    records = made_records(ppo=(0.50, 0.52, 0.54), rloo=(0.80, 0.83, 0.86), grpo=(0.60, 0.62, 0.61))
    broken = {"failed": "update 3: values not finite"}
    top, details = text_of(records | {"rivals_rloo_1": broken})
    assert "Not decided" not in top
    assert "**At equal cost GRPO wins:** its gold gain is +0.09 (" in top
    assert "Broken off: RLOO, seed 1 (update 3: values not finite). A method with such a run" in top
    assert "| RLOO | 2 | +0.83" in top  # what is left of it is shown
    assert "| GRPO | PPO |" in details and "| RLOO | PPO |" not in details
    top, _ = text_of(records | {"rivals_rloo_1": broken, "rivals_grpo_0": broken})
    assert "**No winner:** only PPO has finished all its runs. Broken off: RLOO, seed 1" in top
    every = {f"rivals_{name}_{seed}": broken for name in page.NAMES for seed in range(3)}
    top, details = text_of(records | every)
    assert "**No winner:** no method has finished all its runs." in top
    assert details.count("values not finite") == 9
    alone, _ = text_of(every)
    assert "**No winner:**" in alone and "| method" not in alone
    # While some are not in, nothing is decided, and what broke off is in.
    some = {name: found for name, found in records.items() if name != "rivals_ppo_2"}
    top, _ = text_of(some | {"rivals_rloo_1": broken})
    assert "**Not decided:** 8 of 9 training runs are in" in top and "Broken off: RLOO" in top


@pytest.mark.parametrize(("lead", "words"), [(0.0, "1%"), (0.1, "31%"), (0.2, "94%")])
def test_what_three_seeds_can_show_is_simulated(monkeypatch, lead, words):
    monkeypatch.setattr(tables, "SAMPLES", 300)
    assert page.winners_named(lead, 200) == pytest.approx(page.NAMED[lead], abs=0.07)
    assert f"{page.NAMED[lead]:.0%}" == words and words in page.power({"seeds": 3})


def test_what_cannot_be_told_apart_is_not():
    top, _ = text_of(
        made_records(ppo=(0.50, 0.60, 0.40), rloo=(0.55, 0.45, 0.52), grpo=(0.40, 0.55, 0.52))
    )
    assert "**At equal cost the table cannot tell PPO, RLOO and GRPO apart.**" in top
    assert "The highest gold gain is RLOO's, +0.01 (-" in top and "wins:" not in top


def test_of_two_that_are_alike_neither_wins_and_the_third_is_behind():
    top, _ = text_of(
        made_records(ppo=(0.40, 0.41, 0.39), rloo=(0.60, 0.58, 0.62), grpo=(0.59, 0.61, 0.58))
    )
    assert "**At equal cost the table cannot tell RLOO and GRPO apart; PPO is behind RLOO.**" in top


def test_a_winner_by_little_moves_no_default():
    top, _ = text_of(
        made_records(ppo=(0.50, 0.51, 0.52), rloo=(0.56, 0.57, 0.58), grpo=(0.40, 0.41, 0.42))
    )
    assert "**At equal cost RLOO wins:**" in top
    assert "That is less than the 0.1 on which a default would move." in top


def test_what_the_runs_of_a_seed_share_is_no_noise_of_a_run():
    """All gains of a seed are high or low together; the methods lie apart by the same in each."""
    found = page.summary(
        made_records(ppo=(0.2, 0.5, 0.8), rloo=(0.3, 0.6, 0.9), grpo=(0.1, 0.4, 0.7)), (0, 1, 2)
    )
    assert found["run_std"] == pytest.approx(0, abs=1e-9)
    assert found["winner"] == "rloo"
    # One run of the nine 0.09 off: of its distance from both means 2/3 * 2/3 are left, 0.04; the
    # nine squares add up to 0.0036, of which there are 4 degrees of freedom.
    found = page.summary(
        made_records(ppo=(0.29, 0.5, 0.8), rloo=(0.3, 0.6, 0.9), grpo=(0.1, 0.4, 0.7)), (0, 1, 2)
    )
    assert found["run_std"] == pytest.approx((0.0036 / 4) ** 0.5)


def test_both_devices_ratios_are_printed():
    records = made_records(ppo=(0.5,), rloo=(0.5,), grpo=(0.5,))
    records["rivals_cost_card"] = made_cost("a card", rloo=36.0)
    top, details = text_of(records)
    assert "0.75 and GRPO's 0.62 of PPO's on a CPU" in top
    assert "0.90 and GRPO's 0.62 of PPO's on a card" in top and "not measured" not in top
    assert "Cost on a card, 1 thread: " in details


def test_any_part_of_the_records_makes_a_page(monkeypatch):
    monkeypatch.setattr(tables, "SAMPLES", 10)
    whole = made_records(ppo=(0.5, 0.5, 0.5), rloo=(0.6, 0.6, 0.6), grpo=(0.5, 0.5, 0.5))
    names = list(whole)
    for left in [*([name] for name in names), *(names[i:] for i in range(len(names))), names[:7]]:
        records = {name: record for name, record in whole.items() if name not in left}
        report = {
            "dataset": "d",
            "rows": {"train": 1, "test": 1},
            "steps": dict.fromkeys(names, ""),
            "records": {
                name: record
                | {"minutes": 1, "threads": 1, "cpu": "c", "commit": "a", "command": "b"}
                for name, record in records.items()
            },
        }
        report["summary"] = json.loads(json.dumps(results_page.summary(records)))
        text = results_page.markdown(report, [])
        decided = all(
            f"rivals_{name}_{seed}" in records for name in page.NAMES for seed in range(3)
        )
        assert ("At equal cost" in text) == decided
        assert ("Not decided" in text) == (
            not decided
            and any(
                name.startswith(("rivals_ppo", "rivals_rloo", "rivals_grpo", "rivals_best"))
                for name in records
            )
        )
        assert not math.isnan(len(text)) and "nan" not in text.lower().split()


def test_without_the_new_records_the_page_is_what_it_was():
    """All of it: test_results_page.py holds the page against the committed one."""
    records = json.loads((ROOT / "docs" / "results.json").read_text())["records"]
    old = {name: record for name, record in records.items() if not name.startswith("rivals")}
    assert len(old) > 60 and page.summary(old, (0, 1, 2)) == {}
    assert page.top({}, []) == page.details({}, {}) == []
