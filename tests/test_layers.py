"""The decoder on texts end to end against PEFT and transformers, text by text."""

import copy

import pytest
import torch
from conftest import make_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf.engine.decoder import Decoder, Padded, lay_out, lay_out_pairs, unpad

CPU = torch.device("cpu")
TEXTS = [[5, 9, 17, 3, 40, 8], [7, 7, 30], [21, 2, 11, 35], [50]]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def two_adapters(model):
    """PEFT's model: `sft` on all layers, `policy` on the upper two; both active, one trains."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)
    peft = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=12, target_modules=TARGETS), adapter_name="sft"
    )
    peft.add_adapter(
        "policy", LoraConfig(r=2, lora_alpha=1, target_modules=TARGETS, layers_to_transform=[2, 3])
    )
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    peft.base_model.set_adapter(["sft", "policy"])  # of PEFT's own passes
    for name, weight in peft.named_parameters():
        weight.requires_grad_(".policy." in name)
    return peft.eval()


def tiny(tiny_model, **load):
    return two_adapters(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, **load)
    )


def own_logits(peft, texts=TEXTS):
    """Logits [N, V] that transformers and PEFT give, one text at a time."""
    return torch.cat([peft(input_ids=torch.tensor([ids])).logits[0] for ids in texts])


def make_decoder(peft):
    decoder = Decoder(peft.get_base_model())
    decoder.stack({"base": [], "reference": ["sft"], "policy": ["sft", "policy"]})
    return decoder


def our_logits(peft, texts=TEXTS, decoder=None, laid_out=None, role="policy"):
    decoder = decoder or make_decoder(peft)
    laid_out = laid_out or lay_out(texts, CPU)
    hidden = decoder.norm(decoder.run(decoder.embed(laid_out.ids), laid_out, role, decoder.layers))
    return hidden @ peft.get_base_model().get_output_embeddings().weight.T


def gradients(peft, logits):
    """The gradient of each weight that has one, of a sum that no two tokens share in alike."""
    peft.zero_grad()
    (logits.log_softmax(-1)[..., 4] * torch.arange(1, len(logits) + 1)).sum().backward()
    return {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}


def assert_same(peft, ours, own, count=2 * 7 * 2):
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=0)
    ours = gradients(peft, ours)
    own = gradients(peft, own)
    assert ours.keys() == own.keys() and len(own) == count
    for name, gradient in own.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Rows of 64: bitsandbytes' CPU kernel misreads weights with rows shorter than its blocks."""
    return make_model(tmp_path_factory.mktemp("wide"), hidden_size=64)


@pytest.mark.parametrize(
    "texts", [TEXTS, [[5, 9, 17], [7, 7, 30]]], ids=["ragged", "of one length"]
)
@pytest.mark.parametrize("base", ["fp32", "nf4", "checkpointed"])
def test_logits_and_gradients_equal_pefts(tiny_model, wide_model, base, texts):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    peft = tiny(wide_model, quantization_config=nf4) if base == "nf4" else tiny(tiny_model)
    decoder = make_decoder(peft)
    decoder.gradient_checkpointing = base == "checkpointed"
    assert_same(peft, our_logits(peft, texts, decoder), own_logits(peft, texts))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (LlamaForCausalLM, None),
        (MistralForCausalLM, MistralConfig),
        (Qwen2ForCausalLM, Qwen2Config),
        (Qwen3ForCausalLM, Qwen3Config),
    ],
)
def test_other_families(tiny_model, make, config):
    """Qwen2 has biases on q, k, v; Mistral its own head size; Qwen3 also norms of each head."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    extra = {"head_dim": 6} if make in (MistralForCausalLM, Qwen3ForCausalLM) else {}
    torch.manual_seed(0)
    model = (
        make(config(**sizes, **heads, **extra))
        if config
        else AutoModelForCausalLM.from_pretrained(tiny_model)
    )
    for name, weight in model.named_parameters():
        if name.endswith("bias") or "_norm.weight" in name:  # which are 0 and 1 in a fresh model
            torch.nn.init.normal_(weight)
    peft = two_adapters(model)
    own = own_logits(peft).detach()
    assert_same(peft, our_logits(peft), own_logits(peft))
    # their weights moved into joined ones, and are the same
    torch.testing.assert_close(own_logits(peft).detach(), own)


def test_another_architecture_and_a_text_beyond_the_attention_window_are_refused():
    from rlhf.runs.errors import UserError

    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    with pytest.raises(UserError, match="GraniteDecoderLayer is not supported"):
        Decoder(GraniteForCausalLM(GraniteConfig(**sizes, **heads)))
    model = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=4))
    decoder = Decoder(model)
    short = lay_out([[1, 2, 3, 4]], CPU)
    long = lay_out([[1, 2, 3, 4, 5]], CPU)
    decoder.stack({"base": []})
    decoder.run(decoder.embed(short.ids), short, "base", decoder.layers)
    with pytest.raises(UserError, match="attention window of 4 tokens"):
        decoder.run(decoder.embed(long.ids), long, "base", decoder.layers)


def test_roles_are_pefts_active_adapters(tiny_model):
    own = tiny(tiny_model)
    ours = copy.deepcopy(own)
    decoder = make_decoder(ours)
    with torch.no_grad():
        for role, names in (("reference", ["sft"]), ("policy", ["sft", "policy"])):
            own.base_model.set_adapter(names)
            torch.testing.assert_close(
                our_logits(ours, decoder=decoder, role=role), own_logits(own), atol=1e-4, rtol=0
            )
        with own.disable_adapter():
            bare = our_logits(ours, decoder=decoder, role="base")
            torch.testing.assert_close(bare, own_logits(own), atol=1e-4, rtol=0)


def test_an_optimizer_step_is_seen_by_the_next_pass(tiny_model):
    """Also after a pass without gradients: a fused step does not show in a weight's version."""
    own = tiny(tiny_model)
    ours = copy.deepcopy(own)
    decoder = make_decoder(ours)
    stacks = [
        (stack.a, stack.b)
        for linear in decoder.layers[3].maps
        for stack in linear.stacks.values()
        if stack
    ]
    before = our_logits(ours, decoder=decoder).detach()
    for peft, logits in (
        (own, lambda: own_logits(own)),
        (ours, lambda: our_logits(ours, decoder=decoder)),
    ):
        optimizer = torch.optim.AdamW(
            [p for p in peft.parameters() if p.requires_grad], lr=0.01, fused=True
        )
        if peft is ours:
            decoder.follow(optimizer)
        for _ in range(2):
            gradients(peft, logits())
            with torch.no_grad():
                logits()
            optimizer.step()
    with torch.no_grad():
        after = our_logits(ours, decoder=decoder)
        assert (after - before).abs().max() > 0.01
        torch.testing.assert_close(after, own_logits(own), atol=1e-4, rtol=0)
    now = [
        (stack.a, stack.b)
        for linear in decoder.layers[3].maps
        for stack in linear.stacks.values()
        if stack
    ]
    # always the same tensors
    assert [(id(a), id(b)) for a, b in stacks] == [(id(a), id(b)) for a, b in now]


def test_roles_share_the_stacks_of_layers_without_adapters_of_their_own(tiny_model):
    decoder = make_decoder(tiny(tiny_model))
    for linear in decoder.layers[0].maps:
        assert (
            linear.stacks["policy"] is linear.stacks["reference"] and linear.stacks["base"] is None
        )
    for linear in decoder.layers[3].maps:
        reference = linear.stacks["reference"]
        policy = linear.stacks["policy"]
        assert reference.a.shape == policy.a.shape and reference is not policy


# ---------------------------------------------------------------- laying out


def test_laying_out_by_hand():
    texts = lay_out([[5, 6, 7], [8]], CPU)
    assert texts.ids.tolist() == [5, 6, 7, 8] and texts.positions.tolist() == [0, 1, 2, 0]
    assert texts.last.tolist() == [2, 3] and texts.mask is None
    assert texts.padded.spread(texts.ids).tolist() == [[5, 6, 7], [8, 0, 0]]
    assert texts.padded.gather(torch.tensor([[5, 6, 7], [8, 9, 9]])).tolist() == [5, 6, 7, 8]
    even = Padded([2, 2], CPU)
    assert even.place is None and even.spread(torch.arange(4)).tolist() == [[0, 1], [2, 3]]
    assert unpad(torch.tensor([[5, 6, 7], [8, 0, 0]]), torch.tensor([[1, 1, 1], [1, 0, 0]])) == [
        [5, 6, 7],
        [8],
    ]


def test_laying_out_pairs_by_hand():
    texts = lay_out_pairs([([5, 6, 7], [5, 8, 9, 2]), ([1], [1, 2])], CPU)
    assert texts.ids.tolist() == [5, 6, 7, 8, 9, 2, 1, 1, 2]
    assert texts.positions.tolist() == [0, 1, 2, 1, 2, 3, 0, 0, 1]
    assert texts.last.tolist() == [2, 6, 5, 8]  # of both first ones, of both second ones
    looks = texts.mask[0, 0].int().tolist()
    assert looks == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [1, 0, 0, 1, 1, 0],
        [1, 0, 0, 1, 1, 1],
    ]


def test_pairs_that_share_their_prompt_equal_the_texts_apart(tiny_model):
    pairs = [
        ([5, 9, 17, 3, 40], [5, 9, 17, 8, 2, 11]),
        ([7, 30, 4], [7, 30, 5]),
        ([7, 8, 9], [7, 8, 9, 10]),
        ([3], [4]),
    ]
    peft = tiny(tiny_model)
    apart = [first for first, _ in pairs] + [second for _, second in pairs]
    ends = torch.tensor(list(map(len, apart))).cumsum(0) - 1
    texts = lay_out_pairs(pairs, CPU)
    assert len(texts.ids) == 19 < sum(map(len, apart)) == 26
    assert_same(peft, our_logits(peft, laid_out=texts)[texts.last], own_logits(peft, apart)[ends])


def test_what_is_kept_for_backward(tiny_model):
    """A layer keeps one tensor of twice the MLP's width, and no matrix of attention weights."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    texts = [[5, 9, 17, 3, 40, 8] * 8] * 7 + [[1, 2, 3]]
    tokens = 7 * 48 + 3
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        our_logits(tiny(tiny_model), texts).sum()
    shapes = [tuple(tensor.shape) for tensor in kept.values()]
    assert shapes.count((tokens, 2 * 64)) == 2  # the two layers above the first weight that trains
    assert not [shape for shape in shapes if shape[-1] == 64 and shape[0] >= tokens]
    # the mask
    assert not [shape for shape in shapes if shape[-2:] == (48, 48) and shape != (1, 1, 48, 48)]
