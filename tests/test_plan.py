"""The memory plan against sums by hand, and --dry-run."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from transformers import Trainer, TrainingArguments

import reward_train
import sft_train
from benchmarks import auto_tokens
from rlhf.engine.card import CARD_OVERHEAD, MOST_TOKENS, STEP, Rollouts, tokens_that_fit
from rlhf.engine.plan import Lora, Shape, UpdateSizes, plan_ppo, plan_sft
from rlhf.engine.trainer import num_steps
from rlhf.reports.dry_run import earlier_runs
from rlhf.runs.checkpoints import sha256

# Two layers, hidden 8, MLP 16, 2 heads of 4 with one key head; bf16. The seven maps: 8x8, 8x4, 8x4,
# 8x8, 8x16, 8x16, 16x8 = 576 weights a layer; in + out = 16 + 12 + 12 + 16 + 24 + 24 + 24 = 128.
SMALL = Shape(
    2, 8, 16, 2, 1, 4, vocabulary=100, tied=True, in_4bit=False, width=2, fused_attention=True
)


def shape(**changes) -> Shape:
    return dataclasses.replace(SMALL, **changes)


def test_the_base_by_hand():
    assert shape().base() == 2 * 2 * 576 + 2 * 800
    assert shape(tied=False).base() == 2 * 2 * 576 + 2 * 2 * 800
    joined = 64 + 32 + 32 + 128 + 128
    alone = 64 + 128
    stored = joined * (0.5 + 1 / 16) + alone * (0.5 + 1 / 64 + 1 / 4096)
    assert shape(in_4bit=True).base() == 2 * stored + 2 * 800
    assert shape(in_4bit=True).merged() == 2 * 576 * 2


def test_lora_and_cache_by_hand():
    assert shape().lora(Lora(rank=3)) == 3 * 2 * 128
    assert shape().lora(Lora(rank=3, layers=1)) == 3 * 128
    assert shape().kv_cache(rows=5, tokens=7) == 5 * 7 * 2 * (2 * 4) * 2


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others():
    """A layer keeps 2x8 + 3x8 + 2x4 + 2x16 + 7x3 = 101 numbers a token, two scales, its input of 8.

    While the MLP's backward computes, 7 x 16 numbers a token.
    """
    work = 10 * 7 * 16 * 2
    kept = 10 * (101 * 2 + 8)
    assert shape().backward(10, 10, 0, rank=3, checkpointing=False) == 2 * kept + work
    assert shape().backward(10, 10, 0, rank=3, checkpointing=True) == 2 * 10 * 8 * 2 + kept + work
    # A fused kernel with a mask keeps k and v once for each of the two query heads.
    assert (
        shape().backward(10, 10, 0, rank=3, checkpointing=False, masked=True)
        == 2 * 10 * (109 * 2 + 8) + work
    )
    # As it does on a card without flash attention, which gives it a mask.
    old = shape(flash_attention=False)
    assert (
        old.backward(10, 10, 0, rank=3, checkpointing=False)
        == old.backward(10, 10, 0, rank=3, checkpointing=False, masked=True)
        == shape().backward(10, 10, 0, rank=3, checkpointing=False, masked=True)
    )
    # Without a fused kernel one output of the attention less is kept, and its 3 matrices [2 heads,
    # 40, 40] are larger.
    plain = shape(fused_attention=False).backward(40, 40, 0, rank=3, checkpointing=False)
    assert plain == 2 * 40 * ((101 - 8) * 2 + 8) + 3 * 2 * 40**2 * 2
    # Of 80 tokens in two such texts it has twice as many. Norms of heads keep q, k and v (16) once
    # more, and 3 scales.
    plain = shape(fused_attention=False).backward(80, 40, 0, rank=3, checkpointing=False)
    assert plain == 2 * 80 * ((101 - 8) * 2 + 8) + 3 * 2 * 2 * 40**2 * 2
    normed = shape(head_norms=True).backward(10, 10, 0, rank=3, checkpointing=False)
    assert normed == 2 * kept + work + 2 * 10 * (16 * 2 + 3 * 4)


def test_stacks_by_hand():
    """q, k, v: A [3R, 8], B [16, 3R]; o: [R, 8], [8, R]; gate, up: [2R, 8], [32, 2R]; down."""
    rank = 3 * 8 + 16 * 3 + 8 + 8 + 2 * 8 + 32 * 2 + 16 + 8
    assert shape().stacks(sft_rank=3, role_rank=0, role_layers=0, roles=1) == 2 * rank * 2 * 3
    # Four roles on one of the layers; on the other they share SFT's.
    assert shape().stacks(sft_rank=3, role_rank=5, role_layers=1, roles=4) == 2 * rank * (
        3 + 4 * (3 + 5)
    )
    assert shape().stacks(sft_rank=3, role_rank=5, role_layers=0, roles=4) == 2 * rank * 2 * 4 * (
        3 + 5
    )


@pytest.mark.parametrize("card_gb", auto_tokens.CARDS)
@pytest.mark.parametrize("shape", auto_tokens.LLAMA.values(), ids=auto_tokens.LLAMA)
@pytest.mark.parametrize("phase", ["SFT", "reward model", "PPO"])
def test_auto_takes_what_fits_and_no_less(phase, shape, card_gb):
    room = card_gb * 1e9 * (1 - CARD_OVERHEAD)
    plan, longest, _ = auto_tokens.plans(shape, room)[phase]
    tokens = tokens_that_fit(plan, longest, room)
    assert sum(plan(tokens).values()) <= room
    assert tokens == MOST_TOKENS or sum(plan(tokens + STEP).values()) > room
    assert tokens % STEP == 0 and longest <= tokens <= MOST_TOKENS


@pytest.mark.parametrize("phase", ["sft", "ppo"])
def test_what_is_lowered_lowers_the_plan(phase):
    def total(tokens=2048, rank=16, checkpointing=False) -> float:
        llama = auto_tokens.LLAMA["3B"]
        if phase == "sft":
            return sum(plan_sft(llama, Lora(rank), 16, 512, checkpointing, tokens).values())
        adapters = {"sft": Lora(16), "reward": Lora(16, 14), "policy": Lora(rank, 14)}
        update = UpdateSizes(episodes=64, minibatches=4, prompt=384, response=128)
        plan = plan_ppo(llama, adapters, update, checkpointing, Rollouts(32), tokens)
        return sum(plan.values())

    assert 2.2e9 < total() < 11e9  # the base alone is 2.2 GB; a 12 GB card
    assert total(tokens=1024) < total()
    for changes in ({"checkpointing": True}, {"rank": 8}):
        assert total(**changes) < total()


def test_rows_of_a_rollout_are_planned_even_where_an_update_has_fewer_episodes():
    """A look fills them, and what is kept between rollouts has room for all."""
    adapters = {"sft": Lora(3), "reward": Lora(3), "policy": Lora(3)}
    update = UpdateSizes(episodes=8, minibatches=1, prompt=60, response=4)
    cache = (
        plan_ppo(shape(), adapters, update, False, Rollouts(rows, kept=True), 64)["KV cache"]
        for rows in (8, 32)
    )
    assert list(cache) == [8 * 64 * 2 * (2 * 4) * 2, 32 * 64 * 2 * (2 * 4) * 2]


@pytest.mark.parametrize(
    ("rows", "epochs", "processes", "steps"),
    [
        (24, 1, 1, 6),
        (25, 2, 1, 14),
        (25, 0.5, 1, 4),
        (25, 1, 2, 6),
        (27, 3, 2, 18),
        (100, 1.5, 2, 38),
    ],
)
def test_steps_are_those_that_the_trainer_makes(
    tmp_path, monkeypatch, rows, epochs, processes, steps
):
    """Batches of 4 rows, over all processes: transformers counts whole steps an epoch."""
    for module in ("rlhf.engine.trainer", "rlhf.runs.checks"):
        monkeypatch.setattr(f"{module}.num_processes", lambda: processes)
    assert num_steps(rows, batch_size=4, epochs=epochs) == steps
    size = 4 // processes
    loader = torch.utils.data.DataLoader(range(rows // processes), size, drop_last=processes > 1)
    options = {"per_device_train_batch_size": size, "num_train_epochs": epochs}
    arguments = TrainingArguments(str(tmp_path), **options, use_cpu=True)
    trainer = Trainer(torch.nn.Linear(1, 1), arguments)
    assert trainer.set_initial_training_values(arguments, loader)[-1] == steps


@pytest.mark.parametrize("script", ["sft_train", "reward_train", "ppo_train"])
def test_a_dry_run_tells_and_touches_nothing(
    script, trained, tiny_model, tiny_data, call_main, tmp_path, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("a dry run loaded weights")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)
    flags = ["--dataset", tiny_data, "--output-dir", tmp_path / "out", "--dry-run"]
    flags += (
        ["--base-model", tiny_model] if script == "sft_train" else ["--sft-checkpoint", trained.sft]
    )
    flags += ["--reward-checkpoint", trained.reward] if script == "ppo_train" else []
    if script != "sft_train":
        deep = call_main(script, [*map(str, flags), "--role-layers", "5"])
        assert deep.returncode == 2
        assert deep.stderr == "error: --role-layers must be at least 0 and at most 4, not 5\n"
        flags += ["--role-layers", "4"]
    result = call_main(script, [*map(str, flags), "--card-gb", "4"])
    assert result.returncode == 0, result.stderr
    assert ": 24, " in result.stdout and "tokens each on average" in result.stdout  # 24 rows
    assert (
        ("steps: " in result.stdout)
        if script != "ppo_train"
        else ("updates: 100 of 64" in result.stdout)
    )
    assert ("held-out prompts: " in result.stdout) == (script == "ppo_train")
    for owner in (
        "base",
        "adapters",
        "optimizer",
        "KV cache",
        "activations",
        "logits",
        "all tensors",
    ):
        assert owner in result.stdout
    assert "It fits a card of 4 GB" in result.stdout
    assert not (tmp_path / "out").exists()
    small = call_main(script, [*map(str, flags), "--card-gb", "0.0001"])
    assert "does not fit" in small.stdout and "lower --micro-batch-tokens" in small.stdout


@pytest.mark.parametrize("script", ["sft_train", "reward_train", "ppo_train"])
def test_a_measured_dry_run_says_how_long_and_leaves_nothing(
    script, trained, tiny_model, tiny_data, call_main, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    flags = [
        "--dataset",
        tiny_data,
        "--output-dir",
        tmp_path / "out",
        "--dry-run",
        "--measure",
        "--dtype",
        "fp32",
    ]
    flags += (
        ["--base-model", tiny_model, "--no-load-in-4bit"]
        if script == "sft_train"
        else ["--sft-checkpoint", trained.sft]
    )
    flags += (
        ["--batch-size", "4", "--max-steps", "3"]
        if script != "ppo_train"
        else ["--reward-checkpoint", trained.reward]
    )
    flags += ["--role-layers", "2"] if script != "sft_train" else []
    flags += (
        ["--episodes-per-update", "4", "--total-episodes", "40", "--response-length", "8"]
        if script == "ppo_train"
        else []
    )
    result = call_main(script, [*map(str, flags)])
    assert result.returncode == 0, result.stderr
    counted = 3 if script == "ppo_train" else 2  # the first is not
    assert (
        f"measured on this machine, {counted} steps: " in result.stdout
        and " tokens/s, " in result.stdout
    )
    assert f"{10 if script == 'ppo_train' else 3} steps would take 0 minutes" in result.stdout
    assert ("rollout " in result.stdout) == (script == "ppo_train")
    assert "Saved" not in result.stdout and "a few steps were made and thrown away" in result.stdout
    assert not list(tmp_path.iterdir())
    alone = call_main(script, [*map(str, flags[:4]), *map(str, flags[5:])])
    assert alone.returncode == 2 and "--measure belongs to --dry-run" in alone.stderr


@pytest.mark.parametrize("script", ["reward_train", "ppo_train"])
def test_a_dry_run_before_the_earlier_phases_plans_what_they_would_make(
    script, trained, tiny_model, tiny_data, call_main, tmp_path, monkeypatch
):
    """The very plan that there is after them."""
    reward = reward_train.Config(output_dir="soon/reward", lora_rank=4, role_layers=2)
    sft = sft_train.Config(
        base_model=str(tiny_model), output_dir="soon/sft", lora_rank=4, load_in_4bit=False
    )
    monkeypatch.setitem(sft_train.PRESETS, "soon", sft)
    monkeypatch.setitem(reward_train.PRESETS, "soon", reward)
    flags = ["--dataset", tiny_data, "--output-dir", tmp_path / "out", "--role-layers", 2]
    soon = [
        "--sft-checkpoint",
        "soon/sft",
        *(["--reward-checkpoint", "soon/reward"] if script == "ppo_train" else []),
    ]
    there = [
        "--sft-checkpoint",
        trained.sft,
        *(["--reward-checkpoint", trained.reward] if script == "ppo_train" else []),
    ]
    before = call_main(script, [*flags, *soon, "--dry-run"])
    after = call_main(script, [*flags, *there, "--dry-run"])
    assert before.returncode == after.returncode == 0, before.stderr + after.stderr
    count = 2 if script == "ppo_train" else 1

    def lines(result):
        """But for what is bad about a checkpoint that is there."""
        return [line for line in result.stdout.splitlines() if not line.startswith("warning: ")]

    said = lines(before)[:count]
    plan = lines(before)[count:]
    assert plan == lines(after) and "It fits a card of 12 GB" in before.stdout
    says = (
        "There is no {} checkpoint at soon/{} yet: this plan is for the one that `python "
        "{}_train.py --preset soon`"
    )
    for line, phase in zip(said, ("sft", "reward"), strict=False):
        assert line.startswith(says.format(phase, phase, phase))
    assert said[0].endswith(f" would make of {tiny_model}.")
    assert not list(tmp_path.iterdir())

    if script == "ppo_train":
        half = call_main(script, [*flags, *there[:2], *soon[2:], "--dry-run"])
        assert lines(half) == [said[1], *plan]

    measured = call_main(script, [*flags, *soon, "--dry-run", "--measure"])
    assert measured.returncode == 2 and "no sft checkpoint at soon/sft" in measured.stderr
    assert not measured.stdout
    real = call_main(script, [*flags, *soon])
    assert real.returncode == 2 and "no sft checkpoint at soon/sft" in real.stderr


@pytest.mark.parametrize("script", ["reward_train", "ppo_train"])
def test_a_dry_run_of_another_base_before_the_earlier_phases(
    script, tiny_model, tiny_data, call_main
):
    """By the earlier scripts' defaults, capped at this base's layers, with flags to make them."""
    flags = ["--base-model", tiny_model, "--dataset", tiny_data, "--role-layers", 2]
    result = call_main(script, [*flags, "--sft-checkpoint", "my runs/sft", "--dry-run"])
    assert result.returncode == 0, result.stderr
    command = f"`python sft_train.py --base-model {tiny_model} --output-dir 'my runs/sft'`"
    assert (
        f"at my runs/sft yet: this plan is for the one that {command} would make" in result.stdout
    )
    assert ("`python reward_train.py` would make." in result.stdout) == (script == "ppo_train")
    assert "It fits a card" in result.stdout
    if script == "ppo_train":
        folders = {"sft": "my runs/sft", "reward": "checkpoints/reward", "gold": None}
        scripts = {"sft": sft_train, "reward": reward_train}
        runs = earlier_runs(folders, scripts, str(tiny_model), measure=False)
        assert runs["reward"]["hyperparameters"] == {"lora_rank": 16, "role_layers": 4}


def test_a_dry_run_does_not_pass_over_checkpoints_that_do_not_fit(
    trained, tiny_data, call_main, tmp_path
):
    """A judge is missing; the reward model is there, but of another SFT model."""
    shutil.copytree(trained.sft, tmp_path / "sft")
    run = json.loads((tmp_path / "sft" / "run.json").read_text())
    weights = tmp_path / "sft" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    run["adapter_sha256"] = sha256(weights)
    (tmp_path / "sft" / "run.json").write_text(json.dumps(run))
    flags = ["--sft-checkpoint", tmp_path / "sft", "--reward-checkpoint", trained.reward]
    result = call_main(
        "ppo_train", [*flags, "--gold-checkpoint", "soon", "--dataset", tiny_data, "--dry-run"]
    )
    assert result.returncode == 2 and "was not trained from the SFT checkpoint" in result.stderr


def test_a_dry_run_counts_the_rows_that_training_will_have(
    tiny_model, tiny_data, call_main, tmp_path
):
    rows = [json.loads(line) for line in (tiny_data / "train.jsonl").read_text().splitlines()]
    odd = dict(rows[0], chosen=" x" * 400)  # longer than texts may be
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, odd, odd])
    )
    shutil.copy(tiny_data / "test.jsonl", tmp_path)
    flags = [
        "--base-model",
        tiny_model,
        "--dataset",
        tmp_path,
        "--output-dir",
        tmp_path / "out",
        "--no-load-in-4bit",
    ]
    flags += ["--max-length", "256", "--batch-size", "4"]
    dry = call_main("sft_train", [*map(str, flags), "--dry-run"])
    real = call_main("sft_train", [*map(str, flags), "--max-steps", "1", "--dtype", "fp32"])
    assert dry.returncode == real.returncode == 0, dry.stderr + real.stderr
    trained = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train_rows"]
    assert f"training rows: {trained}, " in dry.stdout
    assert f"optimizer steps: {math.ceil(trained / 4) * 2} of" in dry.stdout
