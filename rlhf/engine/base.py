"""A base model on disk: can it be run, do its weights fit its config, and is it the same as before?

config.json and the headers of the weight files answer all but the last, so even a dry run checks
them. Only `Weights` reads weights, so training and export read the same names from the same files.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import cached_file

from rlhf.runs.checkpoints import check_same_base, sha256
from rlhf.runs.errors import UserError
from rlhf.runs.hub import fetching, hub_errors
from rlhf.runs.processes import agree, is_main, sharded
from rlhf.runs.terminal import console

# model_type; SmolLM2 is a llama. Another family also needs its layers (`LAYERS` in decoder.py, both
# passes of layers.py, attention.py, linear_maps.py), its last norm (decoder.py, decoding.py), its
# plan (plan.py) and its export (`Check` in export.py).
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
HEAD = "lm_head.weight"
# Of all names except the head's. A model saved without its head has no prefix.
PREFIX = "model."


# ---------------------------------------------------------------- the config


def read_config(base: dict[str, Any]) -> PreTrainedConfig:
    """The config of the base that `base_facts` names.

    Raises:
        UserError: it cannot be read, or this pipeline does not support the model.
    """
    name = base["model"]
    with hub_errors(name, "model", "--base-model"):
        config = AutoConfig.from_pretrained(
            name, revision=base["revision"], trust_remote_code=False
        )
    reason = unsupported(config, name)
    if reason:
        raise UserError(f"--base-model {name}: {reason}")
    return config


def unsupported(config: PreTrainedConfig, name: str) -> str | None:
    """Why this pipeline does not support a model with this config; None if it does."""
    quantised = getattr(config, "quantization_config", None) or getattr(
        config, "compression_config", None
    )
    if quantised:
        method = getattr(quantised, "quant_method", None) or dict(quantised).get(
            "quant_method", "a quantiser"
        )
        origin = re.sub(r"(-unsloth)?-bnb-4bit$", "", name)
        named = f" ({origin}?)" if origin != name else ""
        return (
            f"it is saved quantised, by {method}: name the 16-bit model that it was made "
            f"from{named}; --load-in-4bit makes NF4 of that while it loads"
        )
    if config.model_type not in FAMILIES:
        return (
            f"a {config.model_type} model is not supported; this pipeline is for Llama-like "
            "decoders: Llama, SmolLM2, Mistral, Qwen2 and Qwen3"
        )
    code = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in code:
        return (
            f"its config.json names code of its own ({code['AutoModelForCausalLM']}), which is "
            "never run here"
        )
    if getattr(config, "is_causal", True) is False:
        return "it is not causal (is_causal false): a token would see those after it"
    if config.hidden_act != "silu":
        return f"its activation (hidden_act {config.hidden_act}) is not supported, only silu"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") not in ROPES:
        return (
            f"its position embedding (rope_type {rope['rope_type']}) is not supported, only "
            f"{', '.join(ROPES)}"
        )
    if rope.get("partial_rotary_factor", 1) != 1:
        return (
            "heads that are only partly rotated (partial_rotary_factor "
            f"{rope['partial_rotary_factor']}) are not supported"
        )
    if getattr(config, "transformers_weights", None):
        return (
            "its config.json names a weight file of its own (transformers_weights): rename that "
            f"to {WHOLE}"
        )
    return None


def check_context(base: dict[str, Any], longest: int, *flags: str) -> None:
    """Raise UserError if texts of `longest` tokens exceed the base's context.

    A dynamic or longrope base counts with its original context: beyond it, the longest text of a
    batch sets the frequencies for all texts in it.

    Args:
        flags: that would make the texts shorter.
    """
    config = read_config(base)
    rope = config.rope_parameters or {}
    limits = {
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": getattr(config, "sliding_window", None),
    }
    if rope.get("rope_type") in ("dynamic", "longrope"):
        limits["original_max_position_embeddings"] = rope.get("original_max_position_embeddings")
    name, limit = min(
        ((n, x) for n, x in limits.items() if x), key=lambda pair: pair[1], default=("", longest)
    )
    if longest > limit:
        todo = f"lower {' or '.join(flags)}" if flags else "use a base with a longer context"
        raise UserError(
            f"there are texts of {longest} tokens, and {base['model']} reads {limit} ({name}): "
            f"{todo}"
        )


# ---------------------------------------------------------------- the files


def find_files(model: str, revision: str | None, fetch: bool = True) -> list[Path] | None:
    """The weight files of a local folder or hub model: model.safetensors, or those in its index.

    Args:
        fetch: whether to fetch what is missing from the hub. If not, the result is None unless all
            files are on this machine.
    Raises:
        UserError: there are none, or it is not clear which.
    """
    folder = Path(model)
    if folder.is_dir():
        return files_in(folder, model)
    if fetch and find_files(model, revision, fetch=False) is None:
        told = fetching(f"the weights of {model}")
    else:
        told = contextlib.nullcontext()
    try:
        with told, hub_errors(model, "model", "--base-model"):
            folder = fetched(model, revision, [WHOLE, INDEX], fetch)
            if not (folder / WHOLE).exists() and (folder / INDEX).exists():
                fetched(model, revision, shards(folder / INDEX, model), fetch)
        return files_in(folder, model)
    except UserError:
        if fetch:
            raise
        return None


def fetched(model: str, revision: str | None, patterns: list[str], fetch: bool) -> Path:
    """The model's folder in the hub's cache, with the files of these names, if the hub has them."""
    options = {"allow_patterns": patterns, "local_files_only": not fetch}
    return Path(snapshot_download(model, revision=revision, **options))


def files_in(folder: Path, model: str) -> list[Path]:
    whole = folder / WHOLE
    index = folder / INDEX
    if whole.exists() and index.exists():
        raise UserError(
            f"{model} holds both {WHOLE} and {INDEX}: remove the one that is not the model"
        )
    files = [folder / name for name in shards(index, model)] if index.exists() else [whole]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{model} is not a whole model: there is no {file.name} (weights are read from "
                "safetensors)"
            )
    return files


def shards(index: Path, model: str) -> list[str]:
    """The weight files that an index names."""
    with hub_errors(model, "model", "--base-model"):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        odd = [
            name for name in names if Path(name).name != name or not name.endswith(".safetensors")
        ]
        if odd or not names:
            raise ValueError(f"its {INDEX} names {odd[0] if odd else 'no files'}")
    return names


class Weights:
    """A base's weights by their names in transformers' causal language model, read on demand.

    Raises:
        UserError: they are not the weights that the config describes.
    """

    def __init__(self, files: list[Path], config: PreTrainedConfig, model: str):
        with hub_errors(model, "model", "--base-model"):
            with torch.device("meta"):
                wanted = {
                    name: list(x.shape)
                    for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()
                }
            held = [(file, *entry) for file in files for entry in read_header(file)]
        self.files: dict[str, Path] = {}
        self.names: dict[str, str] = {}  # in the files
        twice = []
        foreign = []
        reshaped = []
        quantised = []
        for file, key, shape, dtype in held:
            name = PREFIX + key if PREFIX + key in wanted else key
            if name in self.files:
                twice.append(key)
            elif name not in wanted:
                foreign += [] if passed_over(key, config) else [key]
                continue
            elif shape != wanted[name]:
                reshaped.append(f"{key} is {shape}, not {wanted[name]}")
            elif dtype not in FLOATS:
                quantised.append(f"{key} is {dtype}")
            self.files[name] = file
            self.names[name] = key
        tied = {HEAD} if config.tie_word_embeddings else set()
        missing = [name for name in wanted if name not in self.files and name not in tied]
        odd = {"missing": missing, "without a place in it": foreign, "of another shape": reshaped}
        odd |= {"held twice": twice, "quantised": quantised}
        problems = [
            f"{len(names)} {what} (first {names[0]})" for what, names in odd.items() if names
        ]
        if problems:
            raise UserError(
                f"the weights of {model} are not those that its config.json describes: "
                f"{', '.join(problems)}. Get the model's files again, or correct its config.json"
            )

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(self.names[name])

    def tensors(self) -> dict[str, Tensor]:
        """All weights, mapped into memory. Their bytes are read when they are used."""
        files = {file: load_file(file) for file in set(self.files.values())}
        return {name: files[file][self.names[name]] for name, file in self.files.items()}


def read_header(file: Path) -> list[tuple[str, list[int], str]]:
    """Name, shape and type of each tensor in a safetensors file."""
    with safe_open(file, "pt") as content:
        slices = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118 (it is no dict)
        return [(key, list(part.get_shape()), part.get_dtype()) for key, part in slices.items()]


def passed_over(key: str, config: PreTrainedConfig) -> bool:
    """Whether a weight without a place may be skipped: rotary frequencies, once saved too."""
    found = re.search(r"layers\.(\d+)\.", key)
    of_a_layer = found is None or int(found.group(1)) < config.num_hidden_layers
    return of_a_layer and key.endswith("rotary_emb.inv_freq")


def open_weights(base: dict[str, Any], config: PreTrainedConfig) -> Weights:
    """The weights of the base that `base_facts` names, checked against its config and record.

    Fetches hub models. All processes call it.
    """
    files = find_files(base["model"], base["revision"])
    weights = Weights(files, config, base["model"])
    origin = base["copy_of"]["model"] if "copy_of" in base else "its run.json"
    record = agree(record_of(base) if is_main() else None)
    odd = agree(differing(base, record, files) if record and is_main() else None)
    if odd:
        raise UserError(
            f"{base['model']} is another base model than the earlier phase was trained on: its "
            f"{odd} is not that of {origin}; name the same base for all phases"
        )
    if is_main() and "copy_of" in base and not record and "weights_sha256" not in base:
        console.print(
            f"warning: {base['model']} cannot be compared with {origin}, which the earlier phase "
            "was trained on: neither its run.json nor the hub's cache says what the weights were. "
            "Results are right only if they are the same."
        )
    if is_main() and (Path(base["model"]) / "adapter_config.json").exists():
        console.print(
            f"{base['model']} also holds an adapter (adapter_config.json), which is not used."
        )
    return weights


# ---------------------------------------------------------------- which files they are


def hash_files(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size in bytes, time of last change and SHA-256 of each file, by name."""
    return {file.name: {**size_and_time(file), "sha256": sha256(file)} for file in files}


def size_and_time(file: Path) -> dict[str, int]:
    return {"size": file.stat().st_size, "mtime": file.stat().st_mtime_ns}


def identified(base: dict[str, Any]) -> dict[str, Any]:
    """`base` with the hashes of its files, by which any copy of it is known.

    Fetches hub models. All processes call it; the main one reads the files.
    """
    files = find_files(base["model"], base["revision"])
    return base | {"weights": agree(hash_files(files) if is_main() else None)}


def record_of(base: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The earlier phase's weight files, as `hash_files` gives them; empty if nothing is known.

    Earlier versions kept only the commit of a hub model. Its copy elsewhere is compared with what
    the hub's cache holds.
    """
    record = base.get("weights") or {}
    origin = base.get("copy_of")
    if not record and origin and origin["revision"]:
        record = hash_files(find_files(origin["model"], origin["revision"], fetch=False) or [])
    return record


def differing(
    base: dict[str, Any], record: dict[str, dict[str, Any]], files: list[Path]
) -> str | None:
    """The first weight file that differs from the record; None if none does.

    A file with the recorded size and time is not read, except in a copy elsewhere, where the time
    means nothing.
    """
    found = {file.name: file for file in files}
    for name in sorted({*found, *record}):
        if name not in found or name not in record:
            return name
        now = size_and_time(found[name])
        untouched = "copy_of" not in base and now["mtime"] == record[name]["mtime"]
        if now["size"] != record[name]["size"] or not (
            untouched or sha256(found[name]) == record[name]["sha256"]
        ):
            return name
    return None


def ends_sha256(folder: Path) -> str:
    """A local base's hash in earlier versions: names, sizes, first and last MiB of its files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as weights:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode() + weights.read(1 << 20))
            weights.seek(max(0, size - (1 << 20)))
            digest.update(weights.read())
    return digest.hexdigest()


def base_facts(model: str, revision: str | None, load_in_4bit: bool) -> dict[str, Any]:
    """What identifies a base model in run.json, found without loading the model.

    A local folder goes by its absolute path, a hub model by its id and commit. If the weights are
    on this machine, their headers are checked against the config. `identified` adds their hashes.

    Raises:
        UserError: there is no such folder or hub model, it is gated, or the network is down; this
            pipeline does not support it; its weights do not fit its config; or it would be sharded
            in 4 bit.
    """
    if load_in_4bit and sharded():
        raise UserError(
            "FSDP shards 16-bit bases: add --no-load-in-4bit (to sft_train.py; the later phases "
            "take it over)"
        )
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model} is not a model folder (it has no config.json)")
        name = str(folder.resolve())
        config = folder / "config.json"
        revision = None
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        with hub_errors(model, "model", "--base-model"):
            config = Path(cached_file(model, "config.json", revision=revision))
        name = model
        revision = config.parent.name
    else:
        raise UserError(
            f"--base-model {model}: there is no such folder, and it is not a hub id (owner/name)"
        )
    base = {
        "model": name,
        "revision": revision,
        "config_sha256": sha256(config),
        "weights": None,
        "load_in_4bit": load_in_4bit,
    }
    settings = read_config(base)
    files = find_files(name, revision, fetch=False)
    if files is not None:
        Weights(files, settings, name)
    return base


def same_base(sft: dict[str, Any], folder: str, model: str | None) -> dict[str, Any]:
    """`base_facts` of the base that the SFT checkpoint at `folder` was trained on.

    They include the record of its weights, which `open_weights` checks.

    Args:
        model: where the base is now, if it was moved.
    Raises:
        UserError: it is another base.
    """
    named = sft["base"]
    revision = named["revision"] if model in (None, named["model"]) else None
    base = base_facts(model or named["model"], revision, named["load_in_4bit"])
    if named.get("weights_sha256") and base["revision"] is None:
        base["weights_sha256"] = ends_sha256(Path(base["model"]))
    check_same_base(sft, folder, base)
    base["weights"] = named.get("weights")
    if "copy_of" in named:  # a copy of a copy is one of the first
        base["copy_of"] = named["copy_of"]
    elif (base["model"], base["revision"]) != (named["model"], named["revision"]):
        base["copy_of"] = {"model": named["model"], "revision": named["revision"]}
    return base
