"""Files that older libraries and our own earlier versions can read.

Where transformers 5 uses new names, the files also have those of transformers 4, which many servers
of 2025 and 2026 are built on.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json, with rope under the names of transformers 5 and of transformers 4."""
    config.save_pretrained(folder)
    content = read(folder / "config.json")
    scaling = dict(content["rope_parameters"])
    content["rope_theta"] = scaling.pop("rope_theta")
    content["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if scaling["rope_type"] == "longrope":
        content["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    write(folder / "config.json", content)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer, its chat template and its settings.

    If it is complete in tokenizer.json, its settings name the class that reads any such file.
    """
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    content = read(settings)
    if (folder / "tokenizer.json").exists():
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    write(settings, content)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
