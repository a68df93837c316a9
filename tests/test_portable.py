"""Files that other libraries read: what transformers 4 and one-alpha readers find in them.

`make open-elsewhere` has transformers 4.57 itself open them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from rlhf.data.format import PromptFormat
from rlhf.engine.adapters import read_stacked, save_stacked
from rlhf.engine.loading import load_base
from rlhf.engine.portable import save_config, save_tokenizer
from rlhf.engine.roles import SharedBase
from rlhf.engine.tokenizers import load_tokenizer

ROPE = {"rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 64}
ROPES = {
    "default": {"rope_theta": 500000.0},
    "linear": {"rope_theta": 500000.0, "factor": 8.0},
    "yarn": ROPE,
    "llama3": ROPE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "longrope": ROPE | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}


@pytest.mark.parametrize("kind", ROPES)
def test_a_config_has_its_rope_in_both_spellings(tmp_path, kind):
    rope = {"rope_type": kind, **ROPES[kind]}
    config = LlamaConfig(hidden_size=32, num_attention_heads=4, rope_parameters=rope)
    save_config(config, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert content["rope_theta"] == 500000.0
    assert content["rope_scaling"] == (None if kind == "default" else scaling)
    assert {name: content["rope_parameters"][name] for name in rope} == rope
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == content["rope_parameters"]


def make_llama_2_tokenizer(folder: Path, kind: str) -> Path:
    """As Llama 2's: U+2581 for a space, one put before the text, bytes for missing tokens."""
    words = ["▁", *"Hianuse:.", "▁H", "▁Hi", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(words)])}
    merges = [("▁", "H"), ("▁H", "i")]
    bpe = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    bpe.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>", "<|tool|>")]
    )
    folder.mkdir()
    bpe.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": kind,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": True,
    }
    settings["additional_special_tokens"] = ["<|tool|>"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_a_tokenizer_says_a_class_that_all_versions_know_and_means_the_same(tmp_path, kind):
    before = AutoTokenizer.from_pretrained(make_llama_2_tokenizer(tmp_path / "model", kind))
    save_tokenizer(before, tmp_path / "saved")
    content = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert content["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (
        content["additional_special_tokens"] == ["<|tool|>"]
        and "extra_special_tokens" not in content
    )
    after = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in ("Hi", " Hi  Hi", "\n\nHuman: Hi\n\nAssistant:", "é <|tool|>Hi</s>", ""):
        ids = before(text)["input_ids"]
        assert after(text)["input_ids"] == ids
        assert after.decode(ids) == before.decode(ids)
        assert after.decode(ids, skip_special_tokens=True) == before.decode(
            ids, skip_special_tokens=True
        )
    assert after.all_special_ids == before.all_special_ids


def open_shared(trained):
    run = json.loads((trained.sft / "run.json").read_text())
    model = load_base(run["base"], torch.float32, 0)
    return SharedBase(model, str(trained.sft), torch.float32), run["base"]


@pytest.fixture
def stacked(trained, tmp_path):
    """A saved policy on the upper two of four layers, and what it was saved from."""
    shared, base = open_shared(trained)
    shared.add_role("policy", rank=3, alpha=6, num_layers=2)
    for weight in shared.parameters("policy"):
        torch.nn.init.normal_(weight, std=0.1)
    shared.restack()
    form = PromptFormat("hh", load_tokenizer(str(trained.sft)))
    save_stacked(tmp_path / "saved", shared, "policy", form, base)
    return tmp_path / "saved", shared


def test_an_adapter_has_one_rank_and_one_alpha(stacked):
    folder, shared = stacked
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (
        7,
        7,
        {},
        {},
    )
    for key, weight in load_file(folder / "adapter_model.safetensors").items():
        rows = weight if "lora_A" in key else weight.T
        assert len(rows) == 7
        assert rows[:4].any() and bool(rows[4:].any()) == ("layers.2." in key or "layers.3." in key)


def test_the_lower_pass_stays_shared_and_the_weights_what_they_were(stacked, trained):
    folder, before = stacked
    after, _ = open_shared(trained)
    role = read_stacked(str(folder), after)
    assert (role["rank"], role["alpha"], role["num_layers"]) == (3, 3, 2)
    after.add_role("policy", **role)
    assert after.first_role_layer == before.first_role_layer == 2
    ours = before.adapter_state("policy")
    theirs = after.adapter_state("policy")
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 2 * 7
    for key, weight in ours.items():
        assert torch.equal(theirs[key], 2 * weight if "lora_B" in key else weight)
