"""The scripts in order on a tiny model: what they write and move, saved as it was trained."""

import ast
import dataclasses
import importlib
import json
import re
import signal
from pathlib import Path

import datasets
import pytest
import torch
from conftest import ROOT, count_host_reads
from safetensors.torch import load_file

import ppo_train
import reward_train
import sft_train
from rlhf.data.format import PromptFormat, tokenize_pairs
from rlhf.data.sources import load_pairs
from rlhf.engine.adapters import read_stacked
from rlhf.engine.base import base_facts
from rlhf.engine.decoder import lay_out
from rlhf.engine.loading import load_base, pad_right
from rlhf.engine.roles import SharedBase
from rlhf.engine.tokenizers import load_format, load_tokenizer
from rlhf.engine.trainer import Resumable, steps_between_evaluations
from rlhf.ppo.log import PANELS
from rlhf.reports.probe import judge_probe, load_probe
from rlhf.reports.reward_evaluation import judge
from rlhf.runs.cli import parse
from rlhf.runs.metrics import read_jsonl

SCRIPTS = ("sft_train", "reward_train", "ppo_train", "compare_outputs")
ABOVE_A_FIELD = r"^    # (.*)\n    (\w+): [^#\n]*$"
PPO_SIZES = {
    "episodes-per-update": 8,
    "num-mini-batches": 2,
    "total-episodes": 24,
    "rollout-batch-size": 8,
    "response-length": 12,
    "max-prompt-length": 160,
    "role-layers": 2,
    "lora-rank": 4,
    "critic-warmup-updates": 1,
    "warmup-updates": 1,
    "eval-steps": 2,
    "learning-rate": 1e-2,
    "value-learning-rate": 1e-2,
    "dtype": "fp32",
}


def ppo_flags(trained, data, output, **more):
    flags = [
        "--sft-checkpoint",
        trained.sft,
        "--reward-checkpoint",
        trained.reward,
        "--dataset",
        data,
    ]
    flags += ["--output-dir", output, "--no-gradient-checkpointing"]
    for name, value in (PPO_SIZES | {k.replace("_", "-"): v for k, v in more.items()}).items():
        flags += [f"--{name}", value]
    return list(map(str, flags))


@pytest.fixture(scope="module")
def ppo(trained, tiny_data, call_main, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ppo") / "ppo"
    before = {
        phase: (getattr(trained, phase) / "adapter_model.safetensors").read_bytes()
        for phase in ("sft", "reward")
    }
    result = call_main("ppo_train", ppo_flags(trained, tiny_data, folder))
    assert result.returncode == 0, result.stderr
    assert (
        "CPU: micro-batches of 1,024 tokens (as on any CPU), 4 rows a step, float32"
        in result.stdout
    )
    assert re.search(
        r"^PPO: update 1 of 3, score -?[\d.]+, KL 0.00, [\d,]+ tokens/s, .* left$",
        result.stdout,
        re.M,
    )
    assert "\nPPO: update 3 of 3, score " in result.stdout and "PPO: update 2 " not in result.stdout
    after = {
        phase: (getattr(trained, phase) / "adapter_model.safetensors").read_bytes()
        for phase in ("sft", "reward")
    }
    assert before == after
    return folder


def open_shared(trained, dtype=torch.float32):
    run = json.loads((trained.sft / "run.json").read_text())
    tokenizer = load_tokenizer(str(trained.sft))
    shared = SharedBase(
        load_base(run["base"], dtype, tokenizer.pad_token_id), str(trained.sft), dtype
    )
    return shared, PromptFormat("hh", tokenizer)


# ---------------------------------------------------------------- files and hand-off


def test_exactly_these_files(trained, ppo):
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    adapter = {"adapter_config.json", "adapter_model.safetensors"} | tokenizer
    run = {"run.json", "trained_prompts.safetensors", "metrics.jsonl", "curves.png"}
    assert {p.name for p in trained.sft.iterdir()} == adapter | run
    assert {p.name for p in trained.reward.iterdir()} == adapter | run | {
        "evaluation.json",
        "evaluation.png",
    }
    assert {p.name for p in ppo.iterdir()} == adapter | run | {
        "samples.jsonl",
        "frontier.png",
        "value",
    }
    assert {p.name for p in (ppo / "value").iterdir()} == adapter
    assert not list(ppo.parent.glob("*.partial")) and not list(ppo.parent.glob(".*.replaced"))


def test_another_user_may_read_them(trained, ppo, tmp_path):
    (tmp_path / "file").touch()
    files = [
        path
        for folder in (trained.sft, trained.reward, ppo)
        for path in folder.rglob("*")
        if path.is_file()
    ]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "file").stat().st_mode}


def test_metrics_and_samples_of_ppo(ppo):
    rows = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "episode" in row]
    assert [row["episode"] for row in updates] == [8, 16, 24]
    assert updates[0]["objective/kl"] == 0.0  # a fresh policy is the reference, exactly
    assert updates[1]["objective/kl"] == 0.0  # after one update of the critic alone, too
    assert updates[2]["objective/kl"] != 0.0
    assert "loss/policy_avg" not in updates[0] and "loss/value_avg" in updates[0]
    assert [row["update"] for row in rows if "eval/scores" in row] == [0, 2, 3]
    assert {
        row["update"] for row in map(json.loads, (ppo / "samples.jsonl").read_text().splitlines())
    } == {0, 2, 3}
    run = json.loads((ppo / "run.json").read_text())
    assert run["updates"] == 3 and run["episodes"] == 24


def test_style_and_refusals_of_ppo(ppo, tiny_data):
    """Style at each look, beside the chosen answers; the safety probe first and last."""
    looks = [row for row in read_jsonl(ppo / "metrics.jsonl") if "eval/scores" in row]
    assert [("eval/refusals" in row, "eval/overrefusals" in row) for row in looks] == [
        (True, True),
        (False, False),
        (True, True),
    ]
    metrics = json.loads((ppo / "run.json").read_text())["metrics"]
    for name in ("question_share", "opening_share", "refusals", "overrefusals"):
        for who, look in (("sft", looks[0]), ("ppo", looks[-1])):
            assert metrics[f"{who}_{name}"] == look[f"eval/{name}"]
    assert metrics["refusal_requests"] == metrics["overrefusal_requests"] == 4
    assert metrics["refusal_shift_low"] <= metrics["refusal_shift"] <= metrics["refusal_shift_high"]
    assert metrics["refusal_shift"] != 0  # the policy has moved
    chosen = [row["chosen"].strip() for row in read_jsonl(tiny_data / "test.jsonl")]
    assert metrics["chosen_question_share"] == sum(text.endswith("?") for text in chosen) / 8
    samples = [row for row in read_jsonl(ppo / "samples.jsonl") if row["update"] == 3]
    asking = [row["response"].rstrip().endswith("?") for row in samples]
    assert metrics["ppo_question_share"] == pytest.approx(sum(asking) / 8)
    assert metrics["warnings"][0].startswith("the figures are from only 8 held-out prompts")


def test_a_judge_scores_and_changes_nothing_else(trained, ppo, tiny_data, call_main, tmp_path):
    """--gold-checkpoint: its scores are its own checkpoint's; policy and metrics stay the same."""
    gold = tmp_path / "gold"
    folder = tmp_path / "ppo"
    argv = ppo_flags(trained, tiny_data, tmp_path / "ppo")
    flags = [*trained.reward_flags, "--output-dir", gold, "--seed", "5"]
    assert call_main("reward_train", flags).returncode == 0
    refused = call_main("ppo_train", [*argv, "--gold-checkpoint", gold])
    assert (
        refused.returncode == 2
        and "is no judge of its own" in refused.stderr
        and "--half second" in refused.stderr
    )

    edited = json.loads((gold / "run.json").read_text())
    edited["data"] |= {"source": "other pairs", "sha256": "another"}
    (gold / "run.json").write_text(json.dumps(edited))
    (gold / "trained_prompts.safetensors").unlink()  # an earlier version's: known by its name
    result = call_main("ppo_train", [*argv, "--gold-checkpoint", gold])
    assert result.returncode == 0, result.stderr
    assert "gold score" in result.stdout
    run, alone = (json.loads((f / "run.json").read_text()) for f in (folder, ppo))
    assert run["adapter_sha256"] == alone["adapter_sha256"]
    assert run["metrics"]["ppo_scores"] == alone["metrics"]["ppo_scores"]
    assert run["parents"]["gold"] == edited["adapter_sha256"]

    config = parse(ppo_train.Config, {}, ppo_train.__doc__, [*argv, "--gold-checkpoint", str(gold)])
    sft = json.loads((trained.sft / "run.json").read_text())
    form = load_format(str(trained.sft), sft)
    shared, _ = ppo_train.load_models(config, sft, form)
    prompts = ppo_train.load_prompts(config, form).held_out
    result = ppo_train.evaluate(config, shared, form, lambda scores, batch: scores, prompts)
    judge_alone, _ = open_shared(trained)
    judge_alone.add_role("reward", **read_stacked(str(gold), judge_alone))
    texts = [
        p + r.text_ids + [form.eos_token_id] for p, r in zip(prompts, result.responses, strict=True)
    ]
    torch.testing.assert_close(result.gold_scores, judge_alone.score(texts), rtol=0, atol=1e-4)
    assert (result.gold_scores - result.scores).abs().max() > 1e-2


def test_only_the_policy_moved(trained, ppo):
    sft = load_file(trained.sft / "adapter_model.safetensors")
    policy = load_file(ppo / "adapter_model.safetensors")
    assert sft.keys() == policy.keys()
    moved = set()
    for key, weight in sft.items():
        scale = 2.0 if "lora_B" in key else 1.0  # alpha / rank goes into B
        axis = 1 if "lora_B" in key else 0
        ours = policy[key].narrow(axis, 0, weight.shape[axis])
        assert torch.equal(ours, weight * scale), key
        extra = policy[key].narrow(
            axis, weight.shape[axis], policy[key].shape[axis] - weight.shape[axis]
        )
        assert extra.shape[axis] == 4  # one rank for all layers
        layer = int(re.search(r"layers\.(\d+)", key).group(1))
        assert extra.any() == (layer >= 2), key
        moved |= {layer} if extra.any() else set()
    assert moved == {2, 3}  # the upper two of four layers


def test_value_starts_from_the_reward_model_and_moves(trained, ppo):
    reward = load_file(trained.reward / "adapter_model.safetensors")
    value = load_file(ppo / "value/adapter_model.safetensors")
    head = "base_model.model.score.weight"
    assert reward[head].dtype == value[head].dtype == torch.float32
    assert not torch.equal(reward[head], value[head])
    assert (reward[head] - value[head]).abs().max() < 0.2  # six steps of at most 0.01


# ---------------------------------------------------------------- PEFT alone opens them


def test_auto_classes_give_the_same_logits_and_scores(
    trained, ppo, tiny_data, tmp_path, monkeypatch
):
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    shared, form = open_shared(trained)
    shared.add_role("policy", **read_stacked(str(ppo), shared))
    shared.add_role("reward", **read_stacked(str(trained.reward), shared))
    pairs = tokenize_pairs(load_pairs(str(tiny_data), "test"), form, 192, "test")
    texts = [p.prompt_ids + p.chosen_ids for p in pairs]
    ids = pad_right(texts, form.pad_token_id, torch.device("cpu"))
    pad = form.pad_token_id
    laid_out = lay_out(texts, torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        for role, folder in (("reference", trained.sft), ("policy", ppo)):
            ours = shared.upper(shared.lower(laid_out), laid_out, role) @ shared.lm_head_weight().T
            theirs = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
                ids
            ).logits
            torch.testing.assert_close(theirs[ids != pad], ours, rtol=0, atol=1e-4)
        model = AutoPeftModelForSequenceClassification.from_pretrained(
            trained.reward, num_labels=1, pad_token_id=pad, dtype=torch.float32
        )
        torch.testing.assert_close(
            model(ids, attention_mask=ids != pad).logits[:, 0],
            shared.score(texts),
            rtol=0,
            atol=1e-4,
        )


def test_reward_scores_are_those_of_run_json(trained, tiny_data):
    shared, form = open_shared(trained)
    shared.add_role("reward", **read_stacked(str(trained.reward), shared))
    run = json.loads((trained.reward / "run.json").read_text())
    pairs = tokenize_pairs(
        load_pairs(str(tiny_data), "test"), form, run["hyperparameters"]["max_length"], "test"
    )
    metrics = judge(reward_train.score(shared, pairs, form.eos_token_id))
    for kind, asked in load_probe(form, run["hyperparameters"]["max_length"]).items():
        scored = reward_train.score(shared, asked, form.eos_token_id)
        metrics |= judge_probe({kind: (scored.chosen, scored.rejected)})
    warned = run["metrics"].pop("warnings")
    assert {name: metrics[name] for name in run["metrics"]} == pytest.approx(
        run["metrics"], abs=1e-4
    )
    assert warned[0].startswith("the figures are from only 8 test pairs")


# ---------------------------------------------------------------- passes through the shared base


@pytest.mark.parametrize("in_4bit", [False, True])
def test_batch_mates_roles_and_gradients(trained, in_4bit):
    """Batch mates change nothing; only the role that is named gets gradients."""
    run = json.loads((trained.sft / "run.json").read_text())
    tokenizer = load_tokenizer(str(trained.sft))
    base = load_base(run["base"] | {"load_in_4bit": in_4bit}, torch.float32, tokenizer.pad_token_id)
    shared = SharedBase(base, str(trained.sft), torch.float32)
    shared.add_role("policy", 4, 8, 2)
    shared.add_role("value", 4, 8, 3, head=torch.ones(1, 32))
    shared.train("policy", "value")
    form = PromptFormat("hh", tokenizer)

    from rlhf.engine.generation import generate
    from rlhf.ppo.batch import make_batch

    ppo_train = importlib.import_module("ppo_train")
    prompts = [
        form.prompt_ids([("user", text)])
        for text in ("Hi", "Why is the sky blue at noon?", "Name two rivers.")
    ]
    responses = generate(shared, "policy", form, prompts, 8, 1.0, [1, 2, 3], 3)
    batch = make_batch(prompts, responses, [[0, 1, 2]], form, shared.device)
    ((together,),) = batch.micro_batches(10_000)
    said = []
    with torch.no_grad():
        for micro in (together, *batch.micro_batches(1)[0]):
            lower = shared.lower(micro.texts)
            logprobs = ppo_train.token_logprobs(shared, "policy", micro, lower, 1.0).logprobs
            if micro is together:
                assert torch.equal(
                    logprobs,
                    ppo_train.token_logprobs(shared, "reference", micro, lower, 1.0).logprobs,
                )
            said.append(
                torch.stack([logprobs, ppo_train.token_values(shared, micro, lower, baseline=0.5)])
            )
    assert len(said) == 4
    torch.testing.assert_close(said[0], torch.cat(said[1:], 1), rtol=0, atol=1e-4)

    lower = shared.lower(together.texts)
    for role in (
        "policy",
        "value",
    ):  # after a generate(), which on some CPUs used to break NF4's backward
        shared.peft.zero_grad()
        if role == "policy":
            ppo_train.token_logprobs(shared, role, together, lower, 1.0).logprobs.sum().backward()
        else:
            ppo_train.token_values(shared, together, lower, 0.0).sum().backward()
        lora = {name: p.grad for name, p in shared.peft.named_parameters()}
        got = {name for name, grad in lora.items() if grad is not None and grad.abs().sum() > 0}
        assert got == {
            name for name in lora if f".{role}." in name and "lora_B" in name
        }  # B = 0 hides A's
    assert shared.heads["value"].weight.grad.abs().sum() > 0


def test_logprobs_are_those_of_a_plain_forward(trained):
    shared, form = open_shared(trained)
    shared.add_role("policy", 4, 8, 2)

    from rlhf.engine.generation import Response
    from rlhf.ppo.batch import make_batch

    ppo_train = importlib.import_module("ppo_train")
    prompt = form.prompt_ids([("user", "Hi")])
    eos = form.eos_token_id
    word = form.response_ids("There now")
    # One ended by itself, one was cut by the length, one by the next turn (the token after the text
    # was sampled, too).
    responses = [
        Response([*word, eos], word, "eos"),
        Response(word, word, "length"),
        Response([*word, 9], word, "stop_text"),
    ]
    for i, response in enumerate(responses):
        batch = make_batch([prompt], [response], [[0]], form, shared.device)
        ((micro,),) = batch.micro_batches(100)
        assert micro.texts.ids.tolist() == [
            *prompt,
            *word,
            eos,
        ]  # what the reward model reads ends with EOS
        assert micro.texts.last.item() == len(prompt) + len(word)
        assert batch.ended.tolist() == [i == 0]
        with torch.no_grad():
            lower = shared.lower(micro.texts)
            logprobs = ppo_train.token_logprobs(
                shared, "policy", micro, lower, temperature=0.5
            ).logprobs
            logits = shared.peft(input_ids=torch.tensor([prompt + response.ids])).logits[0] / 0.5
        expected = [
            torch.log_softmax(logits[len(prompt) - 1 + t], -1)[token]
            for t, token in enumerate(response.ids)
        ]
        torch.testing.assert_close(logprobs, torch.stack(expected), rtol=0, atol=1e-4)


def test_weights_that_are_copied_in_are_seen_by_the_next_pass(trained):
    shared, _ = open_shared(trained)
    shared.add_role("policy", 4, 8, 2)
    shared.train("policy")
    texts = lay_out([[5, 6, 7, 8]], torch.device("cpu"))
    state = {
        name: torch.full_like(weight, 0.1)
        for name, weight in shared.adapter_state("policy").items()
    }

    def said():
        with torch.no_grad():
            return shared.upper(shared.lower(texts), texts, "policy")

    fresh = said()
    shared.load("policy", state)
    loaded = said()
    assert not torch.allclose(fresh, loaded)
    shared.load_trained({name: weight * 0 for name, weight in shared.trained_weights().items()})
    assert torch.equal(said(), fresh)
    with torch.no_grad():
        peft = shared.peft(input_ids=texts.ids[None], output_hidden_states=True)
    torch.testing.assert_close(said(), peft.hidden_states[-1][0], atol=1e-4, rtol=0)


def test_a_constant_scorer_is_not_called_trained(
    trained, tiny_data, call_main, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "rlhf.engine.loading.ScalarHead.forward",
        lambda self, hidden: hidden.float()[..., :1] * 0 + self.weight.sum() * 0,
    )
    result = call_main(
        "reward_train",
        [*trained.reward_flags, "--output-dir", str(tmp_path / "r"), "--max-steps", "1"],
    )
    assert (
        result.returncode == 2
        and "about the same score" in result.stderr
        and not (tmp_path / "r").exists()
    )


def test_bf16_starts_at_ratio_one_and_kl_zero(trained, tiny_data, call_main, tmp_path):
    flags = ppo_flags(
        trained, tiny_data, tmp_path / "p", dtype="bf16", critic_warmup_updates=0, total_episodes=8
    )
    assert call_main("ppo_train", flags).returncode == 0  # check_ratio raises if not
    rows = [json.loads(line) for line in (tmp_path / "p/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["eval/kl"] == 0.0 and rows[1]["objective/kl"] == 0.0


def test_backward_of_the_reward_model_stops_at_its_lowest_layer(
    trained, call_main, tmp_path, monkeypatch
):
    from rlhf.engine.layers import LeanLayer

    passes = dict.fromkeys(range(4), 0)
    forward = LeanLayer.__call__
    score = reward_train.score

    def counted(self, *args, **kwargs):
        passes[self.attention.layer_idx] += 1
        return forward(self, *args, **kwargs)

    def uncounted(*args):
        monkeypatch.setattr(LeanLayer, "__call__", forward)
        return score(*args)

    monkeypatch.setattr(LeanLayer, "__call__", counted)
    monkeypatch.setattr(reward_train, "score", uncounted)
    argv = [
        *trained.reward_flags,
        "--output-dir",
        tmp_path / "r",
        "--max-steps",
        "3",
        "--gradient-checkpointing",
        "--micro-batch-tokens",  # a step in one part
        "4096",
    ]
    assert call_main("reward_train", argv).returncode == 0
    assert passes == {
        0: 3,
        1: 3,
        2: 6,
        3: 6,
    }  # checkpointed layers run again in backward; two have the adapter


def gradients(model):
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return got


def assert_close(ours: dict, own: dict):
    assert ours.keys() == own.keys() and any(gradient.abs().max() > 0 for gradient in own.values())
    for name, gradient in own.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


def test_the_sft_loss_and_its_gradients_are_those_of_transformers(
    tiny_model, tiny_data, form, tmp_path
):
    config = dataclasses.replace(
        sft_train.Config(),
        batch_size=5,
        lora_rank=4,
        load_in_4bit=False,
    )
    base = load_base(base_facts(str(tiny_model), None, False), torch.float32, form.pad_token_id)
    rows = sft_train.response_only(
        tokenize_pairs(load_pairs(str(tiny_data), "test"), form, 192, "test")
    )
    # The last two have a label at their first token, which nothing predicts: not the text before
    # them either.
    rows = [
        *rows.to_list()[:3],
        {"input_ids": [1, 9], "labels": [1, 9]},
        {"input_ids": [4, 8], "labels": [4, 8]},
    ]
    rows = datasets.Dataset.from_list(rows)
    trainer = sft_train.make_trainer(config, base, form, rows, rows, torch.float32, tmp_path)
    torch.manual_seed(0)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    trainer.decoder.restack()
    batch = next(iter(trainer.get_train_dataloader()))["rows"]
    loss = trainer.part_loss(batch)["loss"] / sum(map(trainer.items, batch))
    loss.backward()
    ours = gradients(trainer.model)
    del trainer.model.get_base_model().forward  # TRL's; what is left is transformers'
    own = trainer.model(**trainer.padded(batch)).loss
    own.backward()
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=0)
    assert_close(ours, gradients(trainer.model))


def test_the_reward_loss_and_its_gradients_are_those_of_pairs_apart(trained, tiny_data, tmp_path):
    """Against transformers' classification model, which reads each padded text by itself."""
    config = dataclasses.replace(
        reward_train.Config(),
        batch_size=5,
        gradient_checkpointing=False,
    )
    run = json.loads((trained.sft / "run.json").read_text())
    tokenizer = load_tokenizer(str(trained.sft))
    form = PromptFormat("hh", tokenizer)
    model = load_base(run["base"], torch.float32, tokenizer.pad_token_id, with_head=True)
    shared = SharedBase(model, str(trained.sft), torch.float32)
    shared.add_role("reward", 4, 8, 2)
    shared.heads["reward"] = model.score
    torch.manual_seed(0)
    for parameter in shared.parameters("reward"):
        parameter.data.normal_(std=0.1)
    pairs = tokenize_pairs(load_pairs(str(tiny_data), "test"), form, 192, "test")
    rows = reward_train.both_responses(pairs, form.eos_token_id)
    trainer = reward_train.make_trainer(config, shared, form, rows, pairs, torch.float32, tmp_path)
    shared.peft.base_model.set_adapter(["sft", "reward"])  # of transformers' own forward
    shared.train("reward")
    shared.restack()
    batch = next(iter(trainer.get_train_dataloader()))["rows"]
    loss = trainer.part_loss(batch)["loss"] / len(batch)
    loss.backward()
    ours = gradients(trainer.model)
    own = trainer.compute_loss(trainer.model, dict(trainer.padded(batch)))  # TRL's
    own.backward()
    torch.testing.assert_close(loss, own, atol=1e-5, rtol=0)
    assert_close(ours, gradients(trainer.model))


AT_1E17A1F = {  # with --per-device-train-batch-size 4 --gradient-accumulation-steps 1
    "sft": {
        "loss": [6.65223, 6.6906, 6.63573, 6.65638],
        "grad_norm": [0.97744, 0.79211, 0.8491, 0.92912],
    },
    "reward": {
        "loss": [0.69114, 0.85508, 0.90437, 1.25617],
        "grad_norm": [2.07693, 2.24952, 2.4295, 2.53964],
    },
}


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_the_parts_of_a_step_change_nothing(phase, trained, call_main, tmp_path):
    """Neither weights nor metrics change; losses and gradients are those of one whole batch."""
    flags = getattr(trained, f"{phase}_flags")
    metrics = []
    weights = []
    for tokens in (40, 400, 100_000):  # each row by itself; two or three together; all together
        folder = tmp_path / str(tokens)
        result = call_main(
            f"{phase}_train", [*flags, "--micro-batch-tokens", tokens, "--output-dir", folder]
        )
        assert result.returncode == 0, result.stderr
        metrics.append(
            [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        )
        weights.append(load_file(folder / "adapter_model.safetensors"))
    for name, before in AT_1E17A1F[phase].items():
        assert [row[name] for row in metrics[0] if name in row] == pytest.approx(
            before, rel=1e-3
        ), name
    for other, weight in zip(metrics[1:], weights[1:], strict=True):
        for mine, theirs in zip(metrics[0], other, strict=True):
            assert mine.keys() == theirs.keys()
            for name in mine:
                if name.startswith(("train_", "time/", "speed/")):
                    continue
                assert mine[name] == pytest.approx(theirs[name], abs=1e-5), name
        for name, value in weights[0].items():
            # Adam makes a visible part of a step of the rounding of a gradient that is almost 0.
            torch.testing.assert_close(weight[name], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_a_step_waits_for_the_device_once(phase, trained, call_main, tmp_path, monkeypatch):
    step = Resumable.training_step
    reads = []

    def counted(*args):
        with count_host_reads() as calls:
            loss = step(*args)
        reads.append(calls)
        return loss

    monkeypatch.setattr(Resumable, "training_step", counted)
    flags = [
        *getattr(trained, f"{phase}_flags"),
        "--micro-batch-tokens",
        "40",
        "--output-dir",
        tmp_path / "out",
    ]
    assert call_main(f"{phase}_train", flags).returncode == 0
    assert reads == [["tolist"]] * 4  # of four parts each


def test_gradient_checkpointing_changes_nothing(trained, tiny_data, call_main, tmp_path):
    adapters = []
    for flag in ("--gradient-checkpointing", "--no-gradient-checkpointing"):
        flags = ppo_flags(
            trained, tiny_data, tmp_path / flag, critic_warmup_updates=0, total_episodes=16
        )
        assert call_main("ppo_train", [*flags, flag]).returncode == 0
        adapters.append(load_file(tmp_path / flag / "adapter_model.safetensors"))
    for key, weight in adapters[0].items():
        torch.testing.assert_close(weight, adapters[1][key], rtol=0, atol=1e-5)


def test_the_kl_coefficient_rests_until_the_policy_has_moved(
    trained, tiny_data, call_main, tmp_path
):
    more = {"critic_warmup_updates": 2, "kl_horizon": 100, "kl_target": 1e9, "total_episodes": 40}
    assert (
        call_main("ppo_train", ppo_flags(trained, tiny_data, tmp_path / "p", **more)).returncode
        == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "p/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "episode" in row]
    assert [row["objective/kl"] for row in rows[:3]] == [0, 0, 0] and rows[3]["objective/kl"] != 0
    assert [row["objective/kl_coef"] for row in rows] == pytest.approx(
        [0.05] * 4 + [0.05 * (1 - 0.2 * 8 / 100)]
    )


def test_held_out_prompts_are_measured_a_micro_batch_at_a_time(trained, monkeypatch):
    """Each holds its texts' lower states until measured; thousands of prompts would fill a card."""
    import weakref

    shared, form = open_shared(trained)
    scorer = read_stacked(str(trained.reward), shared)
    shared.add_role("policy", 4, 8, 2)
    shared.add_role("reward", **scorer)
    shared.add_role("value", **scorer)
    alive = []
    at_once = []
    lower = shared.lower

    def watched(texts):
        states = lower(texts)
        alive.append(weakref.ref(states))
        at_once.append(sum(state() is not None for state in alive))
        return states

    monkeypatch.setattr(shared, "lower", watched)
    prompts = [form.prompt_ids([("user", "Hi" * n)]) for n in range(1, 9)]
    config = dataclasses.replace(ppo_train.Config(), response_length=4)
    shared.micro_batch.tokens = 60
    result = ppo_train.evaluate(config, shared, form, lambda scores, batch: scores, prompts)
    assert len(at_once) > 3 and max(at_once) <= 2  # the one at hand, and the one before it
    assert len(result.scores) == 8 and not result.scores.eq(0).any()


def test_the_loop_waits_for_the_device_once_when_measured_and_once_a_minibatch(trained):
    from rlhf.engine.generation import Response
    from rlhf.ppo.batch import Old, make_batch

    shared, form = open_shared(trained)
    scorer = read_stacked(str(trained.reward), shared)
    shared.add_role("policy", 4, 8, 2)
    shared.add_role("reward", **scorer)
    shared.add_role("value", **scorer)
    shared.train("policy", "value")
    config = dataclasses.replace(
        ppo_train.Config(), num_ppo_epochs=1, num_mini_batches=2, critic_warmup_updates=0
    )
    groups = [{"name": role, "params": shared.parameters(role)} for role in ("policy", "value")]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    shared.decoder.follow(optimizer)
    prompts = [form.prompt_ids([("user", "Hi" * n)]) for n in range(1, 9)]
    responses = [Response([7] * n, [7] * n, "length") for n in range(1, 9)]
    batch = make_batch(prompts, responses, [[0, 2, 4, 6], [1, 3, 5, 7]], form, shared.device)
    shared.micro_batch.tokens = 80
    assert min(map(len, batch.micro_batches(80))) > 1
    with count_host_reads() as reads:
        measured = ppo_train.measure(shared, batch, 1.0, 0.0)
    before_checks = reads.index("cpu")
    assert before_checks == 0, reads[:before_checks]
    old = Old.of(
        measured,
        *ppo_train.advantages_and_returns(batch, measured, 0.05, 0.0, config),
        shared.device,
    )
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with count_host_reads() as reads:
        ppo_train.optimise(config, shared, batch, old, 0.0, optimizer, scaler, 1)
    assert reads == ["tolist"] * 2


# ---------------------------------------------------------------- on the way


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def looks(folder):
    """What each look at the test rows saw, by step."""
    rows = [row for row in rows_of(folder) if "eval_loss" in row]
    return {
        row["step"]: {name: row[name] for name in row if name.startswith("eval_")} for row in rows
    }


@pytest.mark.parametrize("phase", ["sft", "reward"])
def test_the_test_rows_are_looked_at_on_the_way(trained, call_main, tmp_path, monkeypatch, phase):
    """It changes nothing else, is no step's time, and says what a run ending there would say.

    No picture can be drawn meanwhile, which is said on the way and at the end, and ends nothing.
    """
    module = {"sft": sft_train, "reward": reward_train}[phase]
    script = module.__name__
    argv = [*getattr(trained, f"{phase}_flags"), "--eval-steps", 2, "--output-dir"]
    now = [0]
    evaluation = module.Trainer.evaluation

    def slow(trainer):
        now[0] += 1000
        return evaluation(trainer)

    def broken(*_):
        raise ValueError("no fonts")

    with monkeypatch.context() as patch:
        patch.setattr(
            "rlhf.engine.speed.Stopwatch.now",
            lambda watch: now.__setitem__(0, now[0] + 1) or now[0],
        )
        patch.setattr(module.Trainer, "evaluation", slow)
        patch.setattr("rlhf.runs.curves.DRAW_SECONDS", 0.0)
        patch.setattr("rlhf.runs.curves.plot_curves", broken)
        result = call_main(script, [*argv, tmp_path / "whole"])
    assert result.returncode == 0, result.stderr
    name = {"sft": "SFT", "reward": "Reward model"}[phase]
    lines = result.stdout.splitlines()
    progress = [line for line in lines if line.startswith(f"{name}: step ")]
    assert [line.split(",")[0] for line in progress] == [
        f"{name}: step 1 of 4",
        f"{name}: step 4 of 4",
    ]
    assert sum(line.startswith("step 2, test rows: loss ") for line in lines) == 1
    warning = "warning: curves.png could not be drawn (no fonts); the run continues without it"
    assert lines.count(warning) == 2 and not (tmp_path / "whole" / "curves.png").exists()

    usual = getattr(trained, phase)
    name = "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (usual / name).read_bytes()
    whole = rows_of(tmp_path / "whole")
    assert [row["loss"] for row in whole if "loss" in row] == [
        row["loss"] for row in rows_of(usual) if "loss" in row
    ]
    assert max(row["time/step"] for row in whole if "time/step" in row) < 1000
    assert list(looks(tmp_path / "whole")) == ([0, 2, 4] if phase == "sft" else [2, 4])
    assert sum("eval_loss" in row for row in whole) == len(looks(tmp_path / "whole"))
    assert list(looks(usual)) == ([0, 4] if phase == "sft" else [4])

    with monkeypatch.context() as patch:  # stop it at step 2, and have that be all
        patch.setattr(Resumable, "training_step", stopping_at(2))
        assert call_main(script, [*argv, tmp_path / "half"]).returncode == 128 + signal.SIGTERM
    result = call_main(script, [*argv, tmp_path / "half", "--resume", "--max-steps", 2])
    assert result.returncode == 0, result.stderr
    ends = json.loads((tmp_path / "half" / "run.json").read_text())["metrics"]
    names = ["eval_loss"] if phase == "sft" else ["eval_loss", "eval_accuracy", "eval_margin"]
    assert [looks(tmp_path / "whole")[2][name] for name in names] == [ends[name] for name in names]
    assert [looks(tmp_path / "half")[2][name] for name in names] == [ends[name] for name in names]


def stopping_at(number):
    """The training step of a run that is asked to stop in this one."""
    step = Resumable.training_step
    calls = []

    def training_step(*args):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    return training_step


@pytest.mark.parametrize(
    ("eval_steps", "eval_rows", "between"),
    [
        # 100 steps of 16 rows. A tenth of their time is worth 320 test rows, which are only read.
        ("auto", 32, 10),  # ten of 32 rows; the tenth look is the one at the end
        ("auto", 4, 10),  # more are not made
        ("auto", 160, 34),  # two of 160: at steps 34 and 68
        ("auto", 320, 50),
        ("auto", 321, None),
        (7, 321, 7),
        (None, 1, None),
    ],
)
def test_looks_at_the_test_rows_take_a_tenth_of_the_time_at_most(eval_steps, eval_rows, between):
    assert steps_between_evaluations(eval_steps, 100, 16, eval_rows) == between


def test_curves_are_of_metrics_that_are_written(trained, ppo):
    drawn = {trained.sft: sft_train.Trainer.panels, trained.reward: reward_train.Trainer.panels}
    for folder, panels in (drawn | {ppo: PANELS}).items():
        written = {name for row in rows_of(folder) for name in row} | {"eval/gold_scores"}
        assert {name for panel in panels for name in panel.lines} <= written, folder


def test_ppo_draws_its_curves_on_the_way(trained, tiny_data, call_main, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("rlhf.runs.curves.DRAW_SECONDS", 0.0)
    monkeypatch.setattr(
        "rlhf.runs.curves.Curves.draw",
        lambda curves: drawn.append(len(rows_of(curves.path.parent))),
    )
    result = call_main("ppo_train", ppo_flags(trained, tiny_data, tmp_path / "p", max_steps=2))
    assert result.returncode == 0, result.stderr
    assert drawn == [
        2,
        3,
        4,
    ]  # after each update, the evaluation at the start before them; at the end


def test_kl_stop_ends_the_epochs(trained, tiny_data, call_main, tmp_path):
    flags = ppo_flags(
        trained, tiny_data, tmp_path / "p", critic_warmup_updates=0, kl_stop=1e-9, num_ppo_epochs=4
    )
    assert call_main("ppo_train", flags).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "p/metrics.jsonl").read_text().splitlines()]
    assert [row["policy/optimizer_steps"] for row in rows if "episode" in row] == [
        1,
        1,
        1,
    ]  # of 8 possible


# ---------------------------------------------------------------- the scripts as texts


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_first_what_people_change_first(call_main, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "200")
    module = importlib.import_module(script)
    fields = [field.name for field in dataclasses.fields(module.Config)]
    assert 10 <= len(module.FIRST) <= 16 and {*module.FIRST} < {*fields}
    result = call_main(script, ["--help"])
    assert result.returncode == 0
    common, other = result.stdout.split(" common options ")[1].split(" other options ")
    shown = [re.findall(r"^  --([a-z][a-z0-9-]+)", box, re.M) for box in (common, other)]
    rest = [name for name in fields if name not in module.FIRST]
    assert shown == [[name.replace("_", "-") for name in names] for names in (module.FIRST, rest)]
    source = (ROOT / f"{script}.py").read_text()
    behind = re.findall(r"^    (\w+): .*?# (.*)$", source, re.M)
    above = [(name, text) for text, name in re.findall(ABOVE_A_FIELD, source, re.M)]
    explained = [(name, comment) for name, comment in behind + above if name in fields]
    assert sorted(name for name, _ in explained) == sorted(fields)
    for name, comment in explained:
        flag = rf"--{name.replace('_', '-')}\b"
        assert re.search(rf"{flag}.*{re.escape(comment[:40])}", result.stdout, re.S), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_groups_of_the_help_change_no_flag(script):
    module = importlib.import_module(script)
    names = {field.name for field in dataclasses.fields(module.Config)}
    argv = [
        "--output-dir",
        "~/x",
        "--dataset=y",
        "--seed",
        "7",
        "--dtype",
        "fp32",
        "--overwrite",
    ]
    more = {"eval_steps": "3", "max_steps": "9", "micro_batch_tokens": "auto", "load_in_4bit": None}
    for name in sorted(names & {*more}):
        argv += (
            ["--no-load-in-4bit"]
            if name == "load_in_4bit"
            else [f"--{name.replace('_', '-')}", more[name]]
        )
    if "base_model" in names and script != "sft_train":
        argv += ["--base-model", "None"]
    for preset in ([], ["--preset", "demo"]):
        flat, grouped = (
            parse(module.Config, module.PRESETS, module.__doc__, [*preset, *argv], first)
            for first in ((), module.FIRST)
        )
        assert grouped == flat and type(grouped) is module.Config
        assert grouped.seed == 7 and not grouped.output_dir.startswith("~")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_hyperparameter_is_read_and_explained(script):
    module = importlib.import_module(script)
    source = (ROOT / f"{script}.py").read_text()
    shared_code = "".join(path.read_text() for path in (ROOT / "rlhf").rglob("*.py"))
    for field in dataclasses.fields(module.Config):
        reads = rf'(config|self)\.{field.name}\b|flags\["{field.name}"\]'
        assert re.search(reads, source + shared_code), f"{script}: nobody reads {field.name}"
        above = {name for _, name in re.findall(ABOVE_A_FIELD, source, re.M)}
        behind = re.search(rf"^    {field.name}: .*#", source, re.M)
        assert behind or field.name in above, f"{script}: {field.name} has no comment"


def test_the_loop_of_ppo_fits_a_screen():
    source = (ROOT / "ppo_train.py").read_text()
    main = next(
        n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main"
    )
    loop = next(n for n in ast.walk(main) if isinstance(n, ast.For))
    assert loop.end_lineno - loop.lineno < 45


def test_commands_of_the_benchmark_parse(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("train_vs_trl")
    for phase in ("sft", "reward"):
        _, script, *flags = bench.ours(bench.Config(), phase)
        module = importlib.import_module(Path(script).stem)
        parse(module.Config, module.PRESETS, module.__doc__, flags)
