"""What we do otherwise than PEFT 0.21, in one place: look here when its version moves."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.engine.loading import linear_names

UNNAMED = "default"  # what PEFT calls an adapter that was given no name


def without_effect(model: PreTrainedModel) -> LoraConfig:
    """An adapter that adds nothing, as a `PeftModel` cannot be made without one."""
    return LoraConfig(r=1, target_modules=linear_names(model))


def select_adapters(model: nn.Module, names: list[str]) -> None:
    """Have PEFT's own forward go through these adapters, above one another, and no other.

    `PeftModel.set_adapter` takes one name only; its layers take several.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)


def save_adapter(
    model: PeftModel, weights: dict[str, Tensor], base: dict[str, Any], folder: Path
) -> None:
    """Save the unnamed adapter as made on `base`, without the model card that PEFT adds unfilled.

    Its config would name the base as it was loaded, and not the revision.
    """
    config = model.peft_config[UNNAMED]
    config.base_model_name_or_path = base["model"]
    config.revision = base["revision"]
    model.save_pretrained(str(folder), state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)
