"""From disk to memory: the frozen base, and the LoRA adapters on it."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from rlhf.engine.base import open_weights, read_config
from rlhf.runs.device import check_4bit
from rlhf.runs.errors import UserError, one_line
from rlhf.runs.hub import hub_errors
from rlhf.runs.processes import sharded, this_process


def load_base(
    base: dict[str, Any], dtype: torch.dtype, pad_token_id: int, with_head: bool = False
) -> PreTrainedModel:
    """Load the base that `base_facts` names, frozen, in evaluation mode; in NF4 if they say so.

    A base that will be sharded stays in its file, which torch maps into memory; accelerate then
    hands out the first process's weights.

    Args:
        with_head: load a sequence classification model, with a `ScalarHead`.
    """
    device = this_process().device
    options: dict[str, Any] = {"dtype": dtype}
    if base["load_in_4bit"]:
        check_4bit(device)
        options["device_map"] = {"": device}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["lm_head", "score"],
        )
    name = base["model"]
    config = read_config(base)
    weights = open_weights(base, config)
    classes = MODEL_FOR_CAUSAL_LM_MAPPING
    if with_head:
        classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
        config.num_labels = 1
        config.pad_token_id = pad_token_id
    with hub_errors(name, "model", "--base-model"):
        # Given the weights themselves, transformers does not look for others, nor for an adapter
        # beside them.
        model = classes[type(config)].from_pretrained(
            None, config=config, state_dict=weights.tensors(), **options
        )
    model.name_or_path = model.config.name_or_path = name
    if with_head:
        model.score = ScalarHead(config.hidden_size).to(device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs bitsandbytes repacks the weights in the first forward without gradients;
            # after that, backward gives none.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.config.use_cache = False
    if base["load_in_4bit"]:
        return model.eval()
    return model.eval() if sharded() else model.to(device).eval()


class ScalarHead(nn.Linear):
    """H -> 1, in float32 whatever trunk and autocast do.

    Initialised as in the N+ paper (2403.17031), with std 1/sqrt(H+1).
    """

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.weight, std=(hidden_size + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside a decoder layer (q_proj, ..., down_proj), for LoRA."""
    layer = model.get_decoder().layers[0]
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
    )


def pad_right(sequences: list[list[int]], pad: float, device: torch.device) -> Tensor:
    """[B, T] of token ids, or of any numbers, padded on the right."""
    tensors = [torch.tensor(sequence, device=device) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)


def read_adapter(folder: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The LoRA config and weights of a checkpoint, from safetensors only."""
    try:
        config = LoraConfig.from_pretrained(folder)
        state = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise UserError(
            f"{folder} holds no LoRA adapter that can be read ({one_line(error)})"
        ) from None
    if not isinstance(config, LoraConfig):
        raise UserError(f"{folder} holds an adapter that is not LoRA")
    config.task_type = config.modules_to_save = None
    config.inference_mode = True
    return config, state
