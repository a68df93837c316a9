"""A role's checkpoint: its adapter and SFT's saved as one PEFT adapter, and taken apart again."""

import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from rlhf.data.format import PromptFormat
from rlhf.engine.loading import read_adapter
from rlhf.engine.portable import save_tokenizer
from rlhf.engine.roles import SharedBase
from rlhf.runs.errors import UserError
from rlhf.runs.processes import is_main, whole

# Where PEFT keeps the head of a sequence classification adapter.
HEAD_KEY = "base_model.model.score.weight"


def save_stacked(
    folder: Path, shared: SharedBase, role: str, prompt_format: PromptFormat, base: dict[str, Any]
) -> None:
    """Save SFT's adapter and `role`'s as one ordinary PEFT adapter, with head and tokenizer.

    Two LoRA adapters on a layer make one of the summed rank: [A1; A2] and [B1 B2]. The scalings
    alpha / r go into B, so the saved adapter has scaling 1. Some programs only know one rank and
    one alpha for all layers, so A2 and B2 are zero where the role has no adapter. `read_stacked`
    takes it apart again. All processes call it if the base is sharded.
    """
    sft = shared.adapter_state("sft")
    config = shared.peft.peft_config[role]
    ours = shared.adapter_state(role)
    sft_config = shared.peft.peft_config["sft"]
    state = {}
    for key, weight in sft.items():
        axis, is_b = (1, True) if "lora_B" in key else (0, False)
        below = weight.float() * (sft_config.lora_alpha / sft_config.r if is_b else 1)
        shape = list(below.shape)
        shape[axis] = config.r
        own = torch.zeros(shape)
        if key in ours:
            own = ours[key].float() * (config.lora_alpha / config.r if is_b else 1)
        state[key] = torch.cat([below, own], dim=axis).contiguous()
    rank = sft_config.r + config.r
    has_head = role in shared.heads
    if has_head:
        state[HEAD_KEY] = whole(shared.heads[role].weight.detach()).float().cpu().contiguous()
    if not is_main():
        return
    folder.mkdir(exist_ok=True)
    LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(config.target_modules),
        task_type="SEQ_CLS" if has_head else "CAUSAL_LM",
        modules_to_save=["score"] if has_head else None,
        base_model_name_or_path=base["model"],
        revision=base["revision"],
        inference_mode=True,
    ).save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    save_tokenizer(prompt_format.tokenizer, folder)


def read_stacked(folder: str, shared: SharedBase) -> dict[str, Any]:
    """Take a checkpoint of `save_stacked` apart into the arguments of `SharedBase.add_role`.

    B already contains the scaling, so alpha is the rank. On a layer where its part is all zeros,
    the role has no adapter and uses the lower pass that all roles share. (A trained adapter's A is
    never zero.) In checkpoints of earlier versions, such layers have SFT's lower rank.

    Raises:
        UserError: it is not stacked on the SFT adapter of `shared`.
    """
    _, stacked = read_adapter(folder)
    head = stacked.pop(HEAD_KEY, None)
    sft = shared.adapter_state("sft")
    state = {}
    layers = set()
    rank = None
    for key, weight in stacked.items():
        below = sft.get(key)
        axis = 1 if "lora_B" in key else 0
        if (
            below is None
            or weight.dim() != 2
            or weight.shape[1 - axis] != below.shape[1 - axis]
            or weight.shape[axis] < below.shape[axis]
        ):
            raise UserError(
                f"{folder} is not stacked on this SFT adapter (weight {key}): train it again from "
                "this SFT checkpoint"
            )
        own = weight.narrow(axis, below.shape[axis], weight.shape[axis] - below.shape[axis])
        if own.shape[axis]:
            rank = own.shape[axis]
            state[key] = own
            if own.any():
                layers.add(layer_of(key))
    state = {key: own for key, own in state.items() if layer_of(key) in layers}
    if not layers or layers != set(range(min(layers), shared.num_layers)):
        raise UserError(
            f"{folder} has no role adapter on the upper layers: train it again with this version"
        )
    return {"rank": rank, "alpha": rank, "num_layers": len(layers), "state": state, "head": head}


def layer_of(key: str) -> int:
    """The number of the decoder layer that a weight belongs to."""
    return int(re.search(r"layers\.(\d+)\.", key).group(1))
