"""What is loaded is what the folder says: a base that is not what its config says is refused."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

from rlhf import chat

import pytest
import torch
from conftest import run_main, write_jsonl
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_mistakes import assert_one_line
from transformers import AutoModelForCausalLM

import rlhf.engine.base
from rlhf.engine.adapters import read_stacked
from rlhf.engine.base import (
    base_facts,
    check_context,
    ends_sha256,
    find_files,
    identified,
    same_base,
)
from rlhf.engine.loading import load_base
from rlhf.engine.roles import SharedBase
from rlhf.runs.errors import UserError
from rlhf.runs.resume import new_state

EARLIER = Path(__file__).parent / "fixtures" / "earlier"  # checkpoints that commit 1e17a1f made
IDS = torch.arange(5, 60)[None]


@pytest.fixture
def base(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model, to spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "base"))


def rewrite(base: Path, change) -> None:
    """Put what `change` makes of the weights in their place."""
    weights = change(load_file(base / "model.safetensors"))
    weights = {name: weight.contiguous() for name, weight in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def configure(base: Path, **changes) -> None:
    config = base / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(base: Path, **more):
    return load_base(base_facts(str(base), None, False), torch.float32, 0, **more)


def in_shards(base: Path, *parts: str) -> None:
    """Cut the weights up: names with parts[0] into the first file, and so on, the rest last."""
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    index = {}
    for i, part in enumerate((*parts, "")):
        file = f"model-{i + 1:05d}-of-{len(parts) + 1:05d}.safetensors"
        some = {name: weights.pop(name) for name in list(weights) if part in name}
        save_file(some, base / file, metadata={"format": "pt"})
        index |= dict.fromkeys(some, file)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )


# ---------------------------------------------------------------- weights


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_weights_removed_renamed_or_reshaped_are_refused(tiny_model, tmp_path_factory, data):
    base = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("spoiled") / "base"))
    weights = load_file(base / "model.safetensors")
    odd = data.draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, unique=True))
    for name in odd:
        weight = weights.pop(name)
        how = data.draw(
            st.sampled_from(
                ["removed", "module.", "base_model.model.", ".base_layer", "longer", "flat"]
            )
        )
        if how == ".base_layer":
            weights[name.replace(".weight", ".base_layer.weight")] = weight
        elif how.endswith("."):
            weights[how + name] = weight
        elif how == "longer":
            weights[name] = torch.cat([weight, weight])
        elif how == "flat":
            weights[name] = weight.flatten()[None]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=re.escape(f"the weights of {base} are not those that its config.json describes"),
    ) as e:
        base_facts(str(base), None, False)
    assert any(name in str(e.value) for name in odd)


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_missing_weights_are_one_line_before_training(call_main, flags, base, dry):
    rewrite(
        base, lambda weights: {name: w for name, w in weights.items() if "layers.3." not in name}
    )
    result = call_main("sft_train", [*flags["sft_train"], "--base-model", base, *dry])
    assert_one_line(result.returncode, result.stderr, base, "9 missing (first model.layers.3.")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"model.layers.4.mlp.up_proj.weight": (64, 32)},
            "1 without a place in it (first model.layers.4.mlp",
        ),
        ({"model.layers.4.self_attn.rotary_emb.inv_freq": (4,)}, "1 without a place in it"),
        ({"model.layers.0.self_attn.q_proj.bias": (32,)}, "1 without a place in it"),
        ({"score.weight": (1, 32)}, "1 without a place in it (first score.weight)"),
        (
            {"norm.weight": (32,)},
            "1 held twice (first ",
        ),  # it has its name without the head's prefix, too
    ],
)
def test_weights_without_a_place_are_refused(base, more, says):
    rewrite(
        base, lambda weights: weights | {name: torch.ones(shape) for name, shape in more.items()}
    )
    with pytest.raises(UserError, match=re.escape(says)):
        base_facts(str(base), None, False)


def test_whole_numbers_are_no_weights(base):
    rewrite(base, lambda weights: weights | {"model.norm.weight": torch.ones(32, dtype=torch.int8)})
    with pytest.raises(UserError, match=re.escape("1 quantised (first model.norm.weight is I8)")):
        base_facts(str(base), None, False)


def test_what_transformers_rightly_passes_over_changes_nothing(base, tiny_model):
    """Old versions' frequencies, a tied head saved twice, and a model saved without its head."""
    right = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    frequencies = {"model.layers.3.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(
        base, lambda w: w | frequencies | {"lm_head.weight": w["model.embed_tokens.weight"].clone()}
    )
    assert torch.equal(logits(load(base)), right)
    rewrite(
        base, lambda w: {k.removeprefix("model."): x for k, x in w.items() if k != "lm_head.weight"}
    )
    assert torch.equal(logits(load(base)), right)
    assert (
        load(base, with_head=True)
        .get_decoder()
        .norm.weight.equal(load(base).get_decoder().norm.weight)
    )


def test_shards_are_those_of_the_index_and_no_others(base, tiny_model, call_main, flags, tmp_path):
    right = AutoModelForCausalLM.from_pretrained(tiny_model)
    in_shards(base, "layers.0.", "layers.1.")
    stale = load_file(base / "model-00003-of-00003.safetensors")
    save_file(
        {name: torch.zeros_like(w) for name, w in stale.items()},
        base / "model-00009-of-00009.safetensors",
    )
    assert torch.equal(logits(load(base)), logits(right))
    out = tmp_path / "exported"
    argv = [
        *flags["sft_train"],
        "--base-model",
        base,
        "--learning-rate",
        "1e-12",
        "--output-dir",
        tmp_path / "sft",
    ]
    assert call_main("sft_train", argv).returncode == 0
    assert call_main("rlhf.export", [tmp_path / "sft", out, "--dtype", "fp32"]).returncode == 0
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(right), rtol=0, atol=1e-4
    )


def test_shards_that_leave_open_what_the_model_is(base):
    whole = (base / "model.safetensors").read_bytes()
    in_shards(base, "layers.0.")
    first, second = sorted(base.glob("model-*"))
    index = base / "model.safetensors.index.json"

    def refused(says):
        with pytest.raises(UserError, match=says):
            base_facts(str(base), None, False)

    right = second.read_bytes()
    save_file(load_file(second) | load_file(first), second)
    refused("9 held twice")
    second.unlink()
    refused(f"there is no {second.name}")
    second.write_bytes(right)
    base_facts(str(base), None, False)
    (base / "model.safetensors").write_bytes(whole)
    refused("holds both model.safetensors and model.safetensors.index.json")
    (base / "model.safetensors").unlink()
    for content in (
        "{",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"x": "../x.safetensors"}}',
        '{"weight_map": {"x": "x.bin"}}',
    ):
        index.write_text(content)
        refused(re.escape(str(base)))


def test_an_adapter_in_the_folder_is_left_there(base, tiny_model, capsys):
    right = logits(AutoModelForCausalLM.from_pretrained(tiny_model))
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(base)
    for with_head in (False, True):
        loaded = load(base, with_head=with_head)
        assert not [name for name, _ in loaded.named_parameters() if "lora_" in name]
    assert torch.equal(logits(load(base)), right)
    assert "adapter_config.json" in capsys.readouterr().out


# ---------------------------------------------------------------- the config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes.*16-bit model",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq.*16-bit model"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8.*16-bit model"),
        ({"model_type": "phi3"}, "a phi3 model is not supported"),
        ({"model_type": "gemma2"}, "a gemma2 model is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act gelu"),
        (
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                    "rope_type": "default",
                }
            },
            "only partly rotated",
        ),
        (
            {
                "rope_parameters": {
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                    "rope_type": "linear",
                    "factor": 2.0,
                }
            },
            "only partly rotated",
        ),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Own"}}, "code of its own \\(own.Own\\)"),
        ({"is_causal": False}, "not causal"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_what_is_not_supported_is_said_before_any_weight_is_read(
    call_main, flags, base, changes, says
):
    configure(base, **changes)
    (base / "model.safetensors").write_bytes(b"no weights")
    for dry in ([], ["--dry-run"]):
        result = call_main("sft_train", [*flags["sft_train"], "--base-model", base, *dry])
        assert_one_line(result.returncode, result.stderr, base)
        assert re.search(says, result.stderr)


def test_the_16_bit_model_is_named_after_a_quantised_one():
    config = rlhf.engine.base.AutoConfig.for_model(
        "llama", quantization_config={"quant_method": "bitsandbytes"}
    )
    assert "(unsloth/Llama-3.2-3B?)" in rlhf.engine.base.unsupported(
        config, "unsloth/Llama-3.2-3B-unsloth-bnb-4bit"
    )
    assert "?" not in rlhf.engine.base.unsupported(config, "models/quantised")


# ---------------------------------------------------------------- how long texts may be


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"max_position_embeddings": 64}, 64),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "dynamic", "factor": 4.0},
            },
            64,
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 48,
                }
            },
            48,
        ),
        ({"model_type": "mistral", "sliding_window": 32}, 32),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 512),
    ],
)
def test_how_many_tokens_a_base_reads(base, changes, limit):
    if "rope_parameters" in changes:
        changes["rope_parameters"] |= {"rope_theta": 10000.0}
    configure(base, **changes)
    facts = base_facts(str(base), None, False)
    check_context(facts, limit)
    with pytest.raises(
        UserError, match=f"texts of {limit + 1} tokens, and .* reads {limit} .*lower --some-length"
    ):
        check_context(facts, limit + 1, "--some-length")


@pytest.fixture(scope="module")
def short(tiny_model, flags, tmp_path_factory):
    """Flags of checkpoints on a base whose texts end at 64 tokens."""
    folder = tmp_path_factory.mktemp("short")
    base = Path(shutil.copytree(tiny_model, folder / "base"))
    configure(
        base,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )
    parents = ["--sft-checkpoint", folder / "sft"]
    sft = [
        *flags["sft_train"],
        "--base-model",
        base,
        "--max-length",
        "60",
        "--output-dir",
        folder / "sft",
    ]
    reward = [
        *flags["reward_train"],
        *parents,
        "--max-length",
        "60",
        "--output-dir",
        folder / "reward",
    ]
    for script, argv in (("sft_train", sft), ("reward_train", reward)):
        result = run_main(script, argv)
        assert result.returncode == 0, result.stderr
    return {
        "sft_train": sft,
        "reward_train": reward,
        "parents": [*parents, "--reward-checkpoint", folder / "reward"],
    }


@pytest.mark.parametrize(
    ("script", "more", "names"),
    [
        ("sft_train", ["--max-length", "128"], ["--max-length"]),
        ("sft_train", ["--max-length", "128", "--dry-run"], ["--max-length"]),
        ("reward_train", ["--max-length", "128"], ["--max-length"]),
        ("reward_train", ["--max-length", "128", "--dry-run"], ["--max-length"]),
        ("ppo_train", [], ["--max-prompt-length", "--response-length"]),
        (
            "ppo_train",
            ["--role-layers", "2", "--dry-run"],
            ["--max-prompt-length", "--response-length"],
        ),
        ("compare_outputs", ["--max-new-tokens", "64"], ["--max-new-tokens"]),
        ("rlhf.export", [], ["longer context"]),
    ],
)
def test_texts_beyond_it_are_refused_in_every_phase(
    call_main, short, tiny_data, tmp_path, monkeypatch, script, more, names
):
    monkeypatch.setattr("rlhf.export.PROMPTS", ("Why? " * 40,))
    own = short.get(script, [*short["parents"], "--dataset", tiny_data])
    argv = [*own, "--output-dir", tmp_path / "out", *more]
    if script == "rlhf.export":
        argv = [short["parents"][1], tmp_path / "out"]
    result = call_main(script, argv)
    assert_one_line(result.returncode, result.stderr, "reads 64 (max_position_embeddings)", *names)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# ---------------------------------------------------------------- is it the same base


def test_run_json_keeps_each_weight_file(trained, tiny_model):
    file = tiny_model / "model.safetensors"
    found = json.loads((trained.sft / "run.json").read_text())["base"]["weights"]
    facts = {
        "size": file.stat().st_size,
        "mtime": file.stat().st_mtime_ns,
        "sha256": rlhf.engine.base.sha256(file),
    }
    assert found == {"model.safetensors": facts}
    assert json.loads((trained.reward / "run.json").read_text())["base"]["weights"] == found


@pytest.fixture
def hashed(monkeypatch):
    """The weight files that were hashed."""
    names = []
    right = rlhf.engine.base.sha256

    def watched(path):
        if path.name != "config.json":  # which is hashed each time
            names.append(path.name)
        return right(path)

    monkeypatch.setattr("rlhf.engine.base.sha256", watched)
    return names


@pytest.fixture
def known(base):
    """A stand-in for the run.json of an SFT checkpoint on two shards."""
    in_shards(base, "layers.0.")
    return {"base": identified(base_facts(str(base), None, False))}


def test_only_files_that_look_changed_are_hashed_again(known, base, hashed):
    second = base / "model-00002-of-00002.safetensors"
    load_base(same_base(known, "sft", None), torch.float32, 0)
    assert hashed == []
    os.utime(second)
    load_base(same_base(known, "sft", None), torch.float32, 0)
    assert hashed == [second.name]


def test_a_dry_run_hashes_nothing(call_main, flags, hashed):
    result = call_main("sft_train", [*flags["sft_train"], "--dry-run"])
    assert result.returncode == 0, result.stderr
    assert hashed == []


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("place", ["there", "elsewhere"])
def test_one_changed_number_makes_another_base(known, base, tmp_path, name, place):
    """Elsewhere the time of a file says nothing: an archive may give all its files the same one."""
    there = Path(shutil.copytree(base, tmp_path / "copy")) if place == "elsewhere" else base
    load_base(same_base(known, "sft", str(there)), torch.float32, 0)
    file = next(f for f in there.glob("model-*") if name in load_file(f))
    weights = load_file(file)
    weights[name][20, 20] += 0.5
    before = file.stat()
    save_file(weights, file, metadata={"format": "pt"})
    if place == "elsewhere":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(UserError, match=f"another base model.*{file.name}"):
        load_base(same_base(known, "sft", str(there)), torch.float32, 0)


@pytest.fixture
def hub_copy(base, tmp_path, monkeypatch):
    """The hub's cache with a base in it, as if it had been fetched: `owner/name` and its commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--name" / "snapshots" / commit
    shutil.copytree(base, snapshot)
    (cache / "models--owner--name" / "refs").mkdir()
    (cache / "models--owner--name" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return snapshot


def add_half(base: Path) -> None:
    """Make another base of it, with the same config."""
    rewrite(base, lambda w: w | {"model.norm.weight": w["model.norm.weight"] + 0.5})


def test_a_copy_of_a_hub_model_is_known_by_its_hash(hub_copy, base, hashed):
    """Also where the hub's cache does not have the model."""
    facts = identified(base_facts("owner/name", None, False))
    assert (facts["model"], facts["revision"]) == ("owner/name", hub_copy.name)
    assert hashed == list(facts["weights"]) == ["model.safetensors"]
    loaded = load_base(same_base({"base": facts}, "sft", None), torch.float32, 0)
    assert len(hashed) == 1
    shutil.rmtree(hub_copy)
    copied = load_base(same_base({"base": facts}, "sft", str(base)), torch.float32, 0)
    assert torch.equal(logits(copied), logits(loaded))
    add_half(base)
    with pytest.raises(UserError, match="another base model.*owner/name"):
        load_base(same_base({"base": facts}, "sft", str(base)), torch.float32, 0)


def test_an_earlier_hub_model_is_compared_with_the_cache_or_a_line_says_that_it_is_not(
    hub_copy, base, capsys
):
    """Also for a checkpoint that was trained on the copy."""
    sft = {"base": base_facts("owner/name", None, False)}  # weights: None, as it was
    copied = {"base": same_base(sft, "sft", str(base))}
    load_base(same_base(sft, "sft", None), torch.float32, 0)
    load_base(copied["base"], torch.float32, 0)
    assert "cannot be compared" not in capsys.readouterr().out
    add_half(base)
    for run in (sft, copied):
        with pytest.raises(UserError, match="another base model.*owner/name"):
            load_base(same_base(run, "sft", str(base)), torch.float32, 0)
    (hub_copy / "model.safetensors").unlink()
    for run in (sft, copied):
        load_base(same_base(run, "sft", str(base)), torch.float32, 0)
        said = " ".join(capsys.readouterr().out.split())
        assert said.count("cannot be compared with owner/name") == 1


def test_the_hash_of_an_earlier_version_goes_on_to_later_phases(hub_copy, base, capsys):
    facts = base_facts(str(base), None, False) | {"model": "/models/base"}
    del facts["weights"]
    sft = {"base": facts | {"weights_sha256": ends_sha256(base)}}
    later = {"base": same_base(sft, "sft", str(base))}
    load_base(same_base(later, "ppo", None), torch.float32, 0)
    assert "cannot be compared" not in capsys.readouterr().out
    load_base(same_base(later, "ppo", "owner/name"), torch.float32, 0)
    assert "cannot be compared with /models/base" in " ".join(capsys.readouterr().out.split())
    add_half(base)
    with pytest.raises(UserError, match="ppo was trained on another base model"):
        same_base(later, "ppo", None)


class Crash(Exception):
    """What the operating system would do."""


@pytest.fixture
def cut_on_hub(hub_copy, flags, call_main, tmp_path) -> list:
    """Flags of an SFT run from the hub that was cut short, after which `main` moved on."""
    argv = [*flags["sft_train"], "--base-model", "owner/name", "--save-steps", "1"]
    argv += ["--output-dir", tmp_path / "cut"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sft_train.evaluate", raise_crash)
        with pytest.raises(Crash):
            call_main("sft_train", argv)
    newer = Path(shutil.copytree(hub_copy, hub_copy.with_name("f" * 40)))
    (hub_copy.parent.parent / "refs" / "main").write_text(newer.name)
    return argv


def raise_crash(*_):
    raise Crash


def test_a_resumed_run_keeps_the_commit_that_it_began_with(cut_on_hub, hub_copy, call_main):
    add_half(hub_copy.with_name("f" * 40))
    result = call_main("sft_train", [*cut_on_hub, "--resume"])
    assert result.returncode == 0, result.stderr
    made = json.loads((cut_on_hub[-1] / "run.json").read_text())
    assert made["base"]["revision"] == hub_copy.name


@pytest.mark.parametrize("other", [False, True])
def test_a_run_is_not_resumed_on_a_commit_with_other_weights(
    cut_on_hub, hub_copy, call_main, other
):
    if other:
        add_half(hub_copy.with_name("f" * 40))
    result = call_main("sft_train", [*cut_on_hub, "--resume", "--revision", "f" * 40])
    if other:
        assert_one_line(result.returncode, result.stderr, "began with another base")
    else:
        assert result.returncode == 0, result.stderr


# ---------------------------------------------------------------- checkpoints of an earlier version


@pytest.fixture
def earlier(tmp_path) -> Path:
    return Path(shutil.copytree(EARLIER, tmp_path / "earlier"))


def test_checkpoints_of_an_earlier_version_load(earlier):
    run = json.loads((earlier / "sft" / "run.json").read_text())
    base = same_base(run, "sft", str(earlier / "base"))
    shared = SharedBase(load_base(base, torch.float32, 0), str(earlier / "sft"), torch.float32)
    shared.add_role("policy", **read_stacked(str(earlier / "ppo"), shared))
    assert shared.first_role_layer == 2
    shared.add_role("reward", **read_stacked(str(earlier / "reward"), shared))
    assert shared.first_role_layer == 1
    scores = shared.score([[1, 40, 41, 42, 2], [1, 90, 91, 2]])  # as that version gave them
    torch.testing.assert_close(
        scores, torch.tensor([7.003545761108398e-05, -0.15795102715492249]), rtol=0, atol=1e-6
    )


STEPS = "--dtype fp32 --dataset data --max-length 64 --batch-size 4 --max-steps 2"
SHORT = "--dtype fp32 --max-prompt-length 64 --dataset data"
EARLIER_PPO = (
    "--response-length 4 --episodes-per-update 4 --num-mini-batches 2 --total-episodes 8 "
    "--max-eval-samples 3 --lora-rank 1 --lora-alpha 2 --role-layers 1 --critic-warmup-updates 0"
)


@pytest.fixture
def phases_on_earlier(earlier, tmp_path) -> dict[str, list[str]]:
    """The flags of each phase that starts from the earlier checkpoints, by script."""
    words = "abcdefgh"
    rows = [
        {"prompt": f"\n\nHuman: Say {w}.\n\nAssistant:", "chosen": f" {w}!", "rejected": " no"}
        for w in words
    ]
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    base = ["--base-model", str(earlier / "base")]
    sft = [*base, "--sft-checkpoint", str(earlier / "sft")]
    both = [*sft, "--reward-checkpoint", str(earlier / "reward")]
    ppo = ["--ppo-checkpoint", str(earlier / "ppo"), "--max-new-tokens", "4"]
    return {
        "sft_train": [*base, *STEPS.split(), "--no-load-in-4bit"],
        "reward_train": [*sft, *STEPS.split(), "--role-layers", "2"],
        "ppo_train": [*both, *SHORT.split(), *EARLIER_PPO.split()],
        "compare_outputs": [*both, *ppo, *SHORT.split()],
    }


@pytest.mark.parametrize("script", ["reward_train", "ppo_train", "compare_outputs"])
def test_later_phases_take_checkpoints_of_an_earlier_version(phases_on_earlier, call_main, script):
    result = call_main(script, [*phases_on_earlier[script], "--output-dir", "out"])
    assert result.returncode == 0, result.stderr
    assert "PPO" in result.stdout or script == "reward_train"


def test_an_earlier_checkpoint_answers_in_a_chat(earlier):
    config = chat.Config(str(earlier / "ppo"), str(earlier / "base"), str(earlier / "sft"))
    config = dataclasses.replace(config, reward_checkpoint=str(earlier / "reward"), dtype="fp32")
    shared, prompt_format, names = chat.open_checkpoint(config)
    assert names == ["base", "sft", "ppo"] and "reward" in shared.heads
    talk = chat.Chat(config, shared, prompt_format, names)
    talk.answer("Say a.")
    assert float(talk.command("/score"))


@pytest.mark.parametrize("script", ["sft_train", "reward_train", "ppo_train"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_run_of_an_earlier_version_is_not_resumed(
    earlier, phases_on_earlier, call_main, tmp_path, script, finished
):
    """Its flags are as that version wrote them; nothing of it is touched."""
    run = json.loads((earlier / script.removesuffix("_train") / "run.json").read_text())
    if finished:
        shutil.copytree(earlier / script.removesuffix("_train"), "cut")
    else:
        Path("cut.partial").mkdir()
        facts = {"hyperparameters": run["hyperparameters"], "inputs": {}}
        with new_state(Path("cut.partial"), 2, facts, keep=2) as state:
            (state / "weights.safetensors").write_bytes(b"")
    before = {path: path.read_bytes() for path in tmp_path.glob("cut*/**/*") if path.is_file()}
    result = call_main(script, [*phases_on_earlier[script], "--output-dir", "cut", "--resume"])
    gone = "gradient_accumulation_steps"
    assert_one_line(result.returncode, result.stderr, "another version", gone, "--overwrite")
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_base_of_an_earlier_checkpoint_is_known_by_its_rule(earlier, call_main, tmp_path):
    argv = [earlier / "ppo", tmp_path / "out", "--base-model", earlier / "base"]
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(earlier / "sft" / file, earlier / "ppo")
    assert call_main("rlhf.export", [*argv, "--dtype", "fp32"]).returncode == 0
    rewrite(earlier / "base", lambda w: w | {"model.norm.weight": w["model.norm.weight"] + 1})
    result = call_main("rlhf.export", [*argv, "--overwrite"])
    assert_one_line(
        result.returncode, result.stderr, "trained on another base model (/models/base)"
    )


def test_what_is_fetched_from_the_hub_is_said(tiny_model, monkeypatch, capsys):
    """Once it is on this machine there is nothing to say."""
    there = []
    asked = []

    def download(model, revision, allow_patterns, local_files_only):
        asked.append(local_files_only)
        if local_files_only and not there:
            raise LocalEntryNotFoundError("not in the cache")
        there.append(model)
        return str(tiny_model)

    monkeypatch.setattr("rlhf.engine.base.snapshot_download", download)
    assert find_files("me/model", "main", fetch=False) is None and not there
    assert find_files("me/model", "main") == [tiny_model / "model.safetensors"]
    assert capsys.readouterr().out == "Fetching the weights of me/model from the hub ...\n"
    assert find_files("me/model", "main") == [tiny_model / "model.safetensors"]
    assert capsys.readouterr().out == "" and asked == [True, True, False, True, False]
