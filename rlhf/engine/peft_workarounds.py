"""What we do differently from PEFT 0.21, in one place: look here when its version changes."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.engine.loading import linear_names

UNNAMED = "default"  # PEFT's name for an adapter that was given none


def without_effect(model: PreTrainedModel) -> LoraConfig:
    """An adapter that changes nothing. A `PeftModel` cannot be made without one."""
    return LoraConfig(r=1, target_modules=linear_names(model))


def select_adapters(model: nn.Module, names: list[str]) -> None:
    """Have PEFT's own forward add up these adapters, and no others.

    `PeftModel.set_adapter` takes only one name; its layers take several.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)


def save_adapter(
    model: PeftModel, weights: dict[str, Tensor], base: dict[str, Any], folder: Path
) -> None:
    """Save the unnamed adapter, with the name and revision of its base.

    On its own, PEFT would name the base as it was loaded, without the revision, and add an unfilled
    model card.
    """
    config = model.peft_config[UNNAMED]
    config.base_model_name_or_path = base["model"]
    config.revision = base["revision"]
    model.save_pretrained(str(folder), state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)
