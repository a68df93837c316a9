"""The lean layers against PEFT's and transformers' own, on the same weights."""

import copy

from rlhf.layers import CPU_ATTENTION, lean_layers

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

IDS = torch.tensor([[5, 9, 17, 3, 40, 8], [7, 7, 30, 21, 2, 11]])


def two_adapters(tiny_model, **load):
    """PEFT's model with an `sft` adapter on all layers and a `policy` on the upper two; both active, the policy trains."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, **load)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=12, target_modules=targets), adapter_name="sft")
    peft.add_adapter("policy", LoraConfig(r=2, lora_alpha=1, target_modules=targets, layers_to_transform=[2, 3]))
    for name, weight in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    peft.base_model.set_adapter(["sft", "policy"])
    for name, weight in peft.named_parameters():
        weight.requires_grad_(".policy." in name)
    return peft.eval()


def lean(peft):
    """A copy of `peft` with our layers and attention."""
    model = copy.deepcopy(peft)
    lean_layers(model)
    model.set_attn_implementation(CPU_ATTENTION)
    return model


def run(peft, **inputs):
    """Logits, and the gradient of each weight that has one."""
    peft.zero_grad()
    logits = peft(input_ids=IDS, **inputs).logits
    logits.log_softmax(-1)[..., 4].sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in peft.named_parameters() if p.grad is not None}


def assert_same(ours, own):
    torch.testing.assert_close(ours[0], own[0], atol=1e-4, rtol=0)
    assert ours[1].keys() == own[1].keys() and len(own[1]) == 2 * 7 * 2
    for name, gradient in own[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[1][name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("base", ["fp32", "nf4", "checkpointed"])
def test_logits_and_gradients_equal_pefts(tiny_model, base):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    own = two_adapters(tiny_model, **({"quantization_config": nf4} if base == "nf4" else {}))
    ours = lean(own)
    if base == "checkpointed":
        ours.train()
        ours.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(run(ours), run(own))


def test_switching_adapters_and_optimizer_steps_are_seen(tiny_model):
    own = two_adapters(tiny_model)
    ours = lean(own)
    run(ours)  # the stacks are made now
    for peft in (own, ours):
        optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=0.01, fused=True)
        run(peft)
        optimizer.step()
    assert_same(run(ours), run(own))
    with torch.no_grad():
        for names in (["sft"], ["policy"], ["sft", "policy"]):
            for peft in (own, ours):
                peft.base_model.set_adapter(names)
            torch.testing.assert_close(ours(input_ids=IDS).logits, own(input_ids=IDS).logits, atol=1e-4, rtol=0)
        with own.disable_adapter(), ours.disable_adapter():
            torch.testing.assert_close(ours(input_ids=IDS).logits, own(input_ids=IDS).logits, atol=1e-4, rtol=0)


def test_padding_and_the_kv_cache(tiny_model):
    """A padded text, and one read token by token, give the logits that transformers' own attention gives."""
    own = two_adapters(tiny_model)
    own.set_attn_implementation("eager")
    ours, mask = lean(own), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert_same(run(ours, attention_mask=mask), run(own, attention_mask=mask))
    with torch.no_grad():
        whole = own(input_ids=IDS, attention_mask=mask).logits
        start = ours(input_ids=IDS[:, :3], attention_mask=mask[:, :3], use_cache=True)
        cache, logits = start.past_key_values, [start.logits]
        for t in range(3, 6):
            step = ours(input_ids=IDS[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache)
            logits.append(step.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(logits, dim=1)[real], whole[real], atol=1e-4, rtol=1e-4)


def test_what_is_kept_for_backward(tiny_model):
    """Of a layer three tensors of the MLP's width, and no matrix of attention weights."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lean(two_adapters(tiny_model))(input_ids=IDS.repeat(4, 8)).logits.sum()
    shapes = [tuple(tensor.shape) for tensor in kept.values()]
    assert shapes.count((8, 48, 64)) == 3 * 2  # the two layers above the first weight that trains
    assert not [shape for shape in shapes if shape[-2:] == (48, 48) and shape != (8, 1, 48, 48)]  # the mask
