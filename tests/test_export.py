"""The exported folder: an ordinary model that says what base and adapter say, and its files."""

import json
import shutil

import pytest
import torch
from conftest import make_model
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from test_mistakes import assert_one_line, snapshot
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import rlhf.export
from rlhf.data.files import facts_of_source
from rlhf.engine.base import base_facts
from rlhf.reports.model_card import front_matter, source_of
from rlhf.runs.checkpoints import sha256
from rlhf.runs.errors import UserError


@pytest.fixture
def export(call_main, tmp_path):
    """`export(checkpoint, *flags)`: the folder that was made."""

    def export(checkpoint, *flags):
        folder = tmp_path / "exported"
        result = call_main("rlhf.export", [checkpoint, folder, "--overwrite", *flags])
        assert result.returncode == 0, result.stderr
        return folder

    return export


@pytest.fixture(scope="module")
def ppo(trained, tiny_data, call_main, tmp_path_factory):
    """A PPO checkpoint that has moved: an adapter on all layers and one on the upper two."""
    folder = tmp_path_factory.mktemp("exporting") / "ppo"
    flags = "--response-length 8 --max-prompt-length 64 --episodes-per-update 4"
    flags += (
        " --num-mini-batches 2 --total-episodes 12 --rollout-batch-size 4 --max-eval-samples 3 "
        "--lora-rank 4"
    )
    flags += (
        " --lora-alpha 8 --role-layers 2 --learning-rate 1e-2 --warmup-updates 0 "
        "--critic-warmup-updates 0"
    )
    parents = [
        "--sft-checkpoint",
        trained.sft,
        "--reward-checkpoint",
        trained.reward,
        "--dataset",
        tiny_data,
    ]
    result = call_main(
        "ppo_train", [*flags.split(), *parents, "--dtype", "fp32", "--output-dir", folder]
    )
    assert result.returncode == 0, result.stderr
    return folder


def move_base(checkpoint, base, folder):
    """A copy of a checkpoint that says that it was trained on another base."""
    shutil.copytree(checkpoint, folder)
    made = json.loads((folder / "run.json").read_text()) | {
        "base": base_facts(str(base), None, False)
    }
    (folder / "run.json").write_text(json.dumps(made))
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("phase", ["sft", "ppo"])
def test_a_float32_merge_is_base_and_adapter(export, trained, ppo, phase):
    """Logits of 20 prompts, and 64 greedy tokens after each."""
    checkpoint = trained.sft if phase == "sft" else ppo
    merged = AutoModelForCausalLM.from_pretrained(export(checkpoint, "--dtype", "fp32"))
    peft = AutoPeftModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = torch.randint(3, 400, (20, 12), generator=torch.Generator().manual_seed(0))
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits(merged, ids), logits(peft, ids), rtol=0, atol=1e-4)
    with peft.disable_adapter():
        assert (logits(merged, ids) - logits(peft, ids)).abs().max() > 0.1
    greedy = {"max_new_tokens": 64, "do_sample": False}
    assert torch.equal(merged.generate(ids, **greedy), peft.generate(input_ids=ids, **greedy))


def test_qwen3_is_trained_and_exported(export, call_main, flags, tokenizer, tmp_path):
    """It has norms of each head of q and k, and a head size of its own."""
    sizes = {
        "vocab_size": 448,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "head_dim": 12,
    }
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(**sizes, **heads, tie_word_embeddings=True, initializer_range=0.2)
    )
    for name, weight in model.named_parameters():
        if "_norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    model.save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    argv = [
        *flags["sft_train"],
        "--base-model",
        str(tmp_path / "qwen3"),
        "--output-dir",
        str(tmp_path / "sft"),
    ]
    assert call_main("sft_train", argv).returncode == 0
    merged = AutoModelForCausalLM.from_pretrained(export(tmp_path / "sft", "--dtype", "fp32"))
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    ids = torch.randint(3, 400, (5, 12), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(logits(merged, ids), logits(peft, ids), rtol=0, atol=1e-4)


def test_a_wrong_merge_is_not_written(call_main, ppo, tmp_path, monkeypatch):
    merge = rlhf.export.Adapter.merge

    def forgetful(self, name, weight):
        return (
            weight if name.endswith("layers.3.mlp.down_proj.weight") else merge(self, name, weight)
        )

    monkeypatch.setattr(rlhf.export.Adapter, "merge", forgetful)
    for output in (tmp_path / "exported", tmp_path / "kept"):
        if output.name == "kept":
            shutil.copytree(ppo, output)
        before = snapshot(tmp_path)
        result = call_main("rlhf.export", [ppo, output, "--overwrite"])
        assert_one_line(result.returncode, result.stderr, "merged weights", "Nothing was written")
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (1e5, "is not finite in float16: use --dtype bf16"),
        (float("nan"), "is not finite in float32: train that phase again, or use another base"),
    ],
)
def test_weights_that_are_not_finite_are_not_written(
    call_main, trained, tiny_model, tmp_path, number, says
):
    """Even if, as here, what they are multiplied by keeps the logits small."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][0, 0] = number
    weights["model.layers.1.mlp.down_proj.weight"][:, 0] *= 1e-5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    checkpoint = move_base(trained.sft, base, tmp_path / "sft")
    before = snapshot(tmp_path)
    result = call_main("rlhf.export", [checkpoint, tmp_path / "exported", "--dtype", "fp16"])
    assert_one_line(result.returncode, result.stderr, name, says, "Nothing was written")
    assert snapshot(tmp_path) == before


def test_figures_that_are_not_finite_are_refused():
    fine = {"largest_logit_difference": 0.0, "kl": 0.0}
    report = {"adapter to merged": fine, "merged to exported": fine | {"kl": float("nan")}}
    with pytest.raises(UserError, match="the logits of merged to exported cannot be compared"):
        rlhf.export.refuse_wrong_merge(report)


def test_the_report_is_what_the_models_say(export, ppo):
    """exported against merged, both loaded as any model is."""
    exported = AutoModelForCausalLM.from_pretrained(export(ppo), dtype=torch.float32)
    report = json.loads((export(ppo) / "export.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(export(ppo, "--dtype", "fp32"))
    tokenizer = AutoTokenizer.from_pretrained(ppo)
    largest = 0.0
    kl = []
    for prompt in rlhf.export.PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        one, other = (
            logits(model, ids["input_ids"])[0, -rlhf.export.CHECKED :]
            for model in (merged, exported)
        )
        largest = max(largest, (one - other).abs().max().item())
        kl.append(
            torch.nn.functional.kl_div(
                other.log_softmax(1), one.log_softmax(1), log_target=True, reduction="none"
            ).sum(1)
        )
    step = report["merged to exported"]
    assert step["largest_logit_difference"] == pytest.approx(largest, rel=1e-3)
    assert step["kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-2)
    assert report["adapter to merged"]["largest_logit_difference"] < 1e-4 < largest


def test_leaving_nf4_is_told_apart(export, ppo, tmp_path):
    """What is trained is bitsandbytes' base; the tiny model's own numbers say what that moves."""
    assert "trained to adapter" not in json.loads((export(ppo) / "export.json").read_text())
    quantised = shutil.copytree(ppo, tmp_path / "quantised")
    made = json.loads((quantised / "run.json").read_text())
    made["base"]["load_in_4bit"] = True
    (quantised / "run.json").write_text(json.dumps(made))
    report = json.loads((export(quantised) / "export.json").read_text())
    assert list(report) == [
        "trained to adapter",
        "adapter to merged",
        "merged to exported",
        "trained to exported",
    ]
    assert report["trained to adapter"]["kl"] > 10 * report["merged to exported"]["kl"]
    assert report["trained to exported"]["kl"] == pytest.approx(
        report["trained to adapter"]["kl"], rel=0.5
    )


def test_large_weights_come_in_several_files(export, ppo, monkeypatch):
    one = load_file(export(ppo) / "model.safetensors")
    monkeypatch.setattr("rlhf.export.SHARD_BYTES", 20_000)
    folder = export(ppo)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(
        sum(t.nbytes for t in load_file(f).values()) <= 20_000 or len(load_file(f)) == 1
        for f in files
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    found = {name: load_file(folder / file)[name] for name, file in index["weight_map"].items()}
    assert found.keys() == one.keys() and all(torch.equal(found[name], one[name]) for name in one)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_what_is_no_weight_of_the_model_is_left_out(export, trained, tiny_model, tmp_path):
    """Some repositories have all weights twice, under other names; old ones have buffers."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    before = load_file(export(trained.sft) / "model.safetensors")
    weights = load_file(base / "model.safetensors")
    save_file({"layers.0.wq.weight": torch.ones(2, 2)}, base / "consolidated.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    moved = move_base(trained.sft, base, tmp_path / "moved")
    after = load_file(export(moved) / "model.safetensors")
    assert after.keys() == before.keys() and all(
        torch.equal(after[name], before[name]) for name in after
    )


def test_a_base_that_is_not_whole(call_main, trained, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    moved = move_base(trained.sft, base, tmp_path / "moved")
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    result = call_main("rlhf.export", [moved, tmp_path / "exported"])
    assert_one_line(
        result.returncode,
        result.stderr,
        base,
        "1 missing (first model.layers.1.mlp.up_proj.weight)",
    )


def test_an_untied_head_is_kept(call_main, flags, tiny_data, tmp_path, export):
    base = make_model(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    config["architectures"] = ["LlamaModel"]
    (base / "config.json").write_text(json.dumps(config))
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    argv = [*flags["sft_train"], "--base-model", base, "--output-dir", tmp_path / "sft"]
    assert call_main("sft_train", argv).returncode == 0
    folder = export(tmp_path / "sft", "--dtype", "fp32")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(
        load_file(folder / "model.safetensors")["lm_head.weight"], weights["lm_head.weight"]
    )
    ids = torch.arange(3, 20)[None]
    peft = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(merged, ids), logits(peft, ids), rtol=0, atol=1e-4)
    assert (
        json.loads((folder / "export.json").read_text())["adapter to merged"][
            "largest_logit_difference"
        ]
        < 1e-4
    )


def test_it_stops_and_pads_as_it_was_trained(export, ppo, tokenizer):
    folder = export(ppo)
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.eos_token_id, generation.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    chat = [{"role": "user", "content": "Hi"}]
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (folder, ppo))
    rendered = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos>\n\nHuman: Hi\n\nAssistant:"
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_card_says_where_it_comes_from(export, ppo):
    card = (export(ppo) / "README.md").read_text()
    front, body = card.split("---\n")[1:]
    assert 'pipeline_tag: "text-generation"' in front and "license" not in front
    for part in (
        "Supervised fine-tuning",
        "Reward model",
        "PPO",
        "loss on test responses",
        "24 rows",
        "score gain over SFT",
    ):
        assert part in body, part
    assert "Llama" not in body
    run = json.loads((ppo / "run.json").read_text())
    gain = run["metrics"]
    interval = (
        f"{gain['score_gain']:.3g} (95 % interval {gain['score_gain_low']:.3g} to "
        f"{gain['score_gain_high']:.3g}"
    )
    assert f"{interval}, {gain['eval_prompts']} prompts)" in body
    assert run["data"]["source"] not in card and "a local file or folder (" in body


def test_whether_data_came_from_the_hub_is_what_the_run_recorded(trained, ppo, tmp_path):
    """Not what stands where the export runs; that counts only without a record."""
    for folder in (trained.sft, trained.reward, ppo):
        assert json.loads((folder / "run.json").read_text())["data"]["local"] is True
    path = "a local file or folder (pairs)"
    recorded = {"source": "my/pairs"}
    assert facts_of_source("my/pairs", None) == recorded | {"columns": None, "local": False}
    for there, without_record in ((False, "my/pairs"), (True, path)):
        if there:
            (tmp_path / "my" / "pairs").mkdir(parents=True)
        assert source_of(recorded | {"local": True}) == path
        assert source_of(recorded | {"local": False}) == "my/pairs"
        assert source_of(recorded) == without_record
    base = {"model": "base", "revision": None}
    for local, named in ((True, False), (False, True)):
        runs = {"sft": {"data": recorded | {"local": local}}}
        assert ('datasets: ["my/pairs"]' in front_matter("sft", base, runs, None)) == named


def test_a_llama_carries_its_terms(export, trained, tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "LICENSE.txt").write_text("LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n")
    (base / "USE_POLICY.md").write_text("Use it well.\n")
    folder = export(trained.sft, "--base-model", base, "--name", "Friendly <b>bot</b>")
    card = (folder / "README.md").read_text()
    assert (
        'license: "llama3.2"' in card
        and "# Llama-Friendly _b_bot__b_" in card
        and "Built with Llama" in card
    )
    assert (folder / "USE_POLICY.md").read_text() == "Use it well.\n" and (
        folder / "LICENSE.txt"
    ).exists()


def test_what_cannot_be_exported(call_main, trained, ppo, tmp_path):
    other = shutil.copytree(trained.sft, tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name.replace("layers.0", "layers.9")] = weights.pop(name)
    save_file(weights, other / "adapter_model.safetensors", metadata={"format": "pt"})
    made = json.loads((other / "run.json").read_text()) | {
        "adapter_sha256": sha256(other / "adapter_model.safetensors")
    }
    (other / "run.json").write_text(json.dumps(made))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    before = snapshot(tmp_path)
    for argv, names in (
        ([tmp_path / "none", tmp_path / "out"], ["no ppo checkpoint", "ppo_train.py"]),
        ([trained.reward, tmp_path / "out"], ["holds a reward checkpoint"]),
        ([other, tmp_path / "out"], ["does not fit its base", "layers.9"]),
        ([ppo, tmp_path / "full"], ["is not empty", "--overwrite"]),
        ([ppo, ppo, "--overwrite"], ["which this run reads"]),
    ):
        result = call_main("rlhf.export", argv)
        assert_one_line(result.returncode, result.stderr, *names)
        assert snapshot(tmp_path) == before
