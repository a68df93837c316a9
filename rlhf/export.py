"""Turn a checkpoint into a model that any server opens: merged, in 16 bit, with a model card.

    python -m rlhf.export checkpoints/ppo exported/

Weights go through one layer at a time, so a model of any size takes little memory. On the way, the
same prompts run through four versions of the model, and `export.json` says how far apart their
logits are:

- `trained`: the base in NF4, if it was trained that way, with the adapter beside it;
- `adapter`: the base as it is, with the adapter beside it, in float32;
- `merged`: the adapter merged into the base, in float32;
- `exported`: the same, rounded to what is written.

If merging changes more than rounding does, or a weight or a figure is not finite, nothing is
written. The base is the one that was trained on: its files are read as in training, once their
hashes are checked against run.json.
"""

import contextlib
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, GenerationConfig
from tyro.conf import Positional

from rlhf.data.format import PromptFormat
from rlhf.data.rows import ASSISTANT
from rlhf.engine.base import HEAD, Weights, check_context, open_weights, read_config, same_base
from rlhf.engine.loading import pad_right, read_adapter
from rlhf.engine.portable import save_config, save_tokenizer
from rlhf.engine.tokenizers import load_format
from rlhf.reports.model_card import LICENCE_FILES, model_card
from rlhf.runs.checkpoints import read_run
from rlhf.runs.cli import run
from rlhf.runs.device import DTYPES
from rlhf.runs.errors import UserError
from rlhf.runs.folders import check_output, output_folder
from rlhf.runs.hub import hub_errors
from rlhf.runs.terminal import console

SHARD_BYTES = 300_000_000  # of weights that are held and written together
ROUNDING = 1e-3  # the most that logits may move when the adapter is merged in float32
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
CHECKED = 8  # last tokens of each prompt, of which logits are compared
PROMPTS = (
    "Explain what attention mechanism is.",
    "How do I boil an egg so that the yolk stays soft?",
    "Why is the sky blue?",
    "What can I do to fall asleep faster?",
    "Write a short poem about the sea.",
    "Hi! How are you today?",
)


@dataclass(frozen=True)
class Config:
    checkpoint: Positional[str] = "checkpoints/ppo"  # of ppo_train.py or sft_train.py
    output_dir: Positional[str] = "exported"  # must be empty or not exist yet
    base_model: str | None = None  # where the base is now, if it was moved
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"  # of the exported weights
    name: str | None = None  # of the model, in its card
    overwrite: bool = False  # replace what output_dir holds


def main(config: Config) -> None:
    started = time.monotonic()
    made = read_run(config.checkpoint, phase_of(config.checkpoint), "the first argument")
    check_output(
        config.output_dir,
        config.overwrite,
        config.checkpoint,
        config.base_model,
        made["base"]["model"],
    )
    base = same_base(made, config.checkpoint, config.base_model)
    prompt_format = load_format(config.checkpoint, made)
    settings = read_config(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    weights = open_weights(base, settings)
    adapter = Adapter(config.checkpoint)
    source = base_folder(base)
    odd = sorted(set(adapter.names()) - set(weights.files))
    if odd:
        raise UserError(
            f"the adapter at {config.checkpoint} does not fit its base (there is no {odd[0]})"
        )
    dtype = DTYPES[config.dtype]
    texts = [prompt_format.prompt_ids((("user", text),)) for text in PROMPTS]
    check_context(base, max(map(len, texts)))
    with output_folder(config.output_dir) as folder, torch.no_grad():
        writer = Writer(folder)
        check = Check(
            model, texts, prompt_format.pad_token_id, adapter, dtype, base["load_in_4bit"]
        )
        for part in parts(weights, model):
            writer.add(check.go_through(part))
        writer.finish()
        report = check.report(weights[HEAD if HEAD in weights.files else EMBEDDING])
        refuse_wrong_merge(report)
        settings.architectures = [type(model).__name__]  # a base's may be without a head
        write_settings(folder, settings, prompt_format, dtype)
        for file in licence_files(source):
            shutil.copyfile(file, folder / file.name)
        (folder / "export.json").write_text(json.dumps(report, indent=2) + "\n")
        (folder / "README.md").write_text(
            model_card(config.name, made, base, source, report), encoding="utf-8"
        )
    console.print(describe(report))
    console.print(f"Saved {config.output_dir} after {time.monotonic() - started:.0f} s.")


def phase_of(checkpoint: str) -> str:
    """ "sft" or "ppo": what the checkpoint's run.json says; "ppo" if that cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        if (
            json.loads((Path(checkpoint) / "run.json").read_text(encoding="utf-8"))["phase"]
            == "sft"
        ):
            return "sft"
    return "ppo"


# ---------------------------------------------------------------- weights


def base_folder(base: dict[str, Any]) -> Path:
    """The folder with the base's licence and card, which are fetched for a hub model."""
    if Path(base["model"]).is_dir():
        return Path(base["model"])
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "README.md", *LICENCE_FILES]  # the README names the licence
    with hub_errors(base["model"], "model", "--base-model"):
        return Path(
            snapshot_download(base["model"], revision=base["revision"], allow_patterns=wanted)
        )


def parts(weights: Weights, model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The weights in the order of a forward pass: embedding, each layer, norm and head."""
    number = {
        name: int(found.group(1))
        for name in weights.files
        if (found := re.match(r"model\.layers\.(\d+)\.", name))
    }
    rest = [name for name in weights.files if name not in number and name != EMBEDDING]
    yield {EMBEDDING: weights[EMBEDDING]}
    for i in range(len(model.get_decoder().layers)):
        yield {name: weights[name] for name in weights.files if number.get(name) == i}
    yield {name: weights[name] for name in rest}


class Adapter:
    """A LoRA adapter, by the names of the weights that it belongs to."""

    def __init__(self, folder: str):
        self.config, self.state = read_adapter(folder)

    def names(self) -> list[str]:
        return [name_of(key) for key in self.state if "lora_A" in key]

    def get(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A [r, in] and B [out, r] in float32, with the scaling in B; None if there is none."""
        module = name.removesuffix(".weight")
        key = f"base_model.model.{module}"
        if f"{key}.lora_A.weight" not in self.state:
            return None
        a, b = (self.state[f"{key}.lora_{x}.weight"].float() for x in "AB")
        pattern = get_pattern_key(self.config.alpha_pattern, module)
        return a, b * (self.config.alpha_pattern.get(pattern, self.config.lora_alpha) / len(a))

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The weight with the adapter merged in, in float32; as it is if there is no adapter."""
        low_rank = self.get(name)
        return weight if low_rank is None else torch.addmm(weight.float(), low_rank[1], low_rank[0])


def name_of(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")


class Writer:
    """Writes weights as they come, in files of up to SHARD_BYTES, and then their index."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.waiting = {}
        self.shards = []
        self.total = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if (
                self.waiting
                and sum(t.nbytes for t in self.waiting.values()) + tensor.nbytes > SHARD_BYTES
            ):
                self.flush()
            self.waiting[name] = tensor
            if tensor.nbytes > SHARD_BYTES:
                self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        save_file(
            self.waiting, self.folder / f"{len(self.shards)}.partial", metadata={"format": "pt"}
        )
        self.total += sum(tensor.nbytes for tensor in self.waiting.values())
        self.shards.append(list(self.waiting))
        self.waiting = {}

    def finish(self) -> None:
        self.flush()
        count = len(self.shards)
        if count == 1:
            (self.folder / "0.partial").rename(self.folder / "model.safetensors")
            return
        index = {}
        for i, names in enumerate(self.shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            (self.folder / f"{i}.partial").rename(self.folder / file)
            index |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self.total}, "weight_map": index}
        (self.folder / "model.safetensors.index.json").write_text(
            json.dumps(content, indent=2) + "\n"
        )


# ---------------------------------------------------------------- the check


class Check:
    """Takes PROMPTS through the model, in each version of its weights."""

    def __init__(
        self,
        model: nn.Module,
        texts: list[list[int]],
        pad_token_id: int,
        adapter: Adapter,
        dtype: torch.dtype,
        in_4bit: bool,
    ):
        self.model = model
        self.adapter = adapter
        self.dtype = dtype
        self.versions = (["trained"] if in_4bit else []) + ["adapter", "merged", "exported"]
        self.ids = pad_right(texts, pad_token_id, torch.device("cpu"))
        self.read = [
            (i, len(text) - 1 - back)
            for i, text in enumerate(texts)
            for back in range(min(CHECKED, len(text)))
        ]
        self.positions = torch.arange(self.ids.shape[1])[None]
        rotary = type(model.get_decoder().rotary_emb)(config=model.config)
        self.rotary = rotary(torch.zeros(1), self.positions)
        self.hidden: dict[str, Tensor] = {}  # by version

    def go_through(self, base: dict[str, Tensor]) -> dict[str, Tensor]:
        """Go on through one part of the base's weights. Returns the part to write.

        Args:
            base: one of `parts`.
        """
        for version in self.versions[:-2]:
            self.step(version, base)
        merged = {name: self.adapter.merge(name, weight) for name, weight in base.items()}
        refuse_not_finite(merged, "train that phase again, or use another base")
        self.step("merged", merged)
        written = {name: weight.to(self.dtype).contiguous() for name, weight in merged.items()}
        wider = "bf16" if self.dtype == torch.float16 else "fp32"
        refuse_not_finite(written, f"use --dtype {wider}, which holds larger numbers")
        del merged  # the largest thing here
        self.step("exported", written)
        return written

    def step(self, version: str, weights: dict[str, Tensor]) -> None:
        """Take one version through a part, in float32."""
        decoder = self.model.get_decoder()
        hidden = self.hidden.get(version)
        if EMBEDDING in weights:
            hidden = nn.functional.embedding(self.ids, weights[EMBEDDING]).float()
        elif NORM in weights:
            hidden = functional_call(decoder.norm, {"weight": weights[NORM].float()}, (hidden,))
        else:
            prefix = re.match(r"model\.layers\.\d+\.", next(iter(weights))).group()
            layer = decoder.layers[int(prefix.split(".")[2])]
            if version == "trained":
                weights = {name: through_nf4(weight) for name, weight in weights.items()}
            weights = {
                name.removeprefix(prefix): weight.float() for name, weight in weights.items()
            }
            with (
                self.beside(layer, prefix)
                if version in ("trained", "adapter")
                else contextlib.nullcontext()
            ):
                more = {"position_embeddings": self.rotary, "position_ids": self.positions}
                hidden = functional_call(layer, weights, (hidden,), more)
        self.hidden[version] = hidden

    @contextlib.contextmanager
    def beside(self, layer: nn.Module, prefix: str) -> Iterator[None]:
        """Add the adapter beside the layer's weights, as PEFT does."""
        hooks = []
        for name, module in layer.named_modules():
            low_rank = self.adapter.get(f"{prefix}{name}.weight")
            if low_rank is not None:
                a, b = low_rank
                hooks.append(
                    module.register_forward_hook(lambda _, x, y, a=a, b=b: y + x[0] @ a.T @ b.T)
                )
        yield
        for hook in hooks:
            hook.remove()

    def report(self, head: Tensor) -> dict[str, Any]:
        """How far apart successive versions are, and the first and the last.

        Args:
            head: [V, H], as it is in the base.
        """
        rows, columns = zip(*self.read, strict=True)
        logits = {version: [] for version in self.versions}
        for part in head.split(4096):
            whole = part.float()
            written = whole if part.dtype == self.dtype else part.to(self.dtype).float()
            for version, hidden in self.hidden.items():
                logits[version].append(
                    hidden[rows, columns] @ (written if version == "exported" else whole).T
                )
        logits = {version: torch.cat(parts, 1) for version, parts in logits.items()}
        steps = [
            *zip(self.versions, self.versions[1:], strict=False),
            (self.versions[0], self.versions[-1]),
        ]
        return {f"{one} to {other}": apart(logits[one], logits[other]) for one, other in steps}


def through_nf4(weight: Tensor) -> Tensor:
    """A weight as it is in the NF4 base; vectors stay as they are."""
    if weight.dim() < 2:
        return weight
    return bnb.dequantize_4bit(
        *bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    )


def refuse_not_finite(weights: dict[str, Tensor], advice: str) -> None:
    """Raise UserError if a weight holds an infinity or a NaN, which would spread to all logits."""
    for name, weight in weights.items():
        if not torch.stack(weight.aminmax()).isfinite().all():  # NaN goes through to both
            raise UserError(
                f"{name} is not finite in {str(weight.dtype).removeprefix('torch.')}: {advice}. "
                "Nothing was written"
            )


def refuse_wrong_merge(report: dict[str, Any]) -> None:
    """Raise UserError if merging changed more than rounding does, or a figure is not finite."""
    for step, figures in report.items():
        if not all(map(math.isfinite, figures.values())):
            raise UserError(
                f"the logits of {step} cannot be compared, as they are not finite: train that "
                "phase again, or use another base. Nothing was written"
            )
    largest = report["adapter to merged"]["largest_logit_difference"]
    if largest > ROUNDING:
        raise UserError(
            "the merged weights do not compute what base and adapter do: logits differ by up to "
            f"{largest:.1e}, where rounding moves them by less than {ROUNDING:.0e}. Nothing was "
            "written; please report it"
        )


def apart(one: Tensor, other: Tensor) -> dict[str, float]:
    """How far apart two sets of logits [tokens, V] are; KL in nats a token."""
    p = one.log_softmax(1)
    q = other.log_softmax(1)
    return {
        "largest_logit_difference": (one - other).abs().max().item(),
        "kl": (p.exp() * (p - q)).sum(1).mean().item(),
        "same_first_choice": (one.argmax(1) == other.argmax(1)).float().mean().item(),
    }


def describe(report: dict[str, Any]) -> str:
    return "\n".join(
        f"{step}: largest logit difference {r['largest_logit_difference']:.1e}, KL {r['kl']:.1e} "
        f"nats a token, the same first choice at {r['same_first_choice']:.0%}"
        for step, r in report.items()
    )


# ---------------------------------------------------------------- what goes with it


def write_settings(folder: Path, settings, prompt_format: PromptFormat, dtype: torch.dtype) -> None:
    """Write config.json, generation_config.json and the tokenizer with its chat template.

    `\\n\\nHuman:` is not set as a stop string, because `generate` then fails without a tokenizer.
    """
    tokenizer = prompt_format.tokenizer
    if prompt_format.stop_text:
        tokenizer.response_template = response_template(
            prompt_format.stop_text, tokenizer.eos_token
        )
    ends = {
        "eos_token_id": prompt_format.eos_token_id,
        "pad_token_id": prompt_format.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    settings.dtype = dtype
    for name, value in ends.items():
        setattr(settings, name, value)
    save_config(settings, folder)
    GenerationConfig(**ends, do_sample=True, temperature=0.7, max_new_tokens=256).save_pretrained(
        folder
    )
    save_tokenizer(tokenizer, folder)


def response_template(stop_text: str, eos: str) -> dict[str, Any]:
    """How `transformers serve` should read an answer: stripped, and up to EOS or `stop_text`."""
    end = "|".join(map(re.escape, (stop_text, eos)))
    answer = {"open_pattern": r"\A\s*", "close_pattern": rf"\s*(?:{end}).*", "content": "text"}
    return {
        "start_anchor": ASSISTANT,
        "defaults": {"role": "assistant"},
        "fields": {"content": answer},
    }


def licence_files(source: Path) -> list[Path]:
    return [
        path for pattern in LICENCE_FILES for path in sorted(source.glob(pattern)) if path.is_file()
    ]


if __name__ == "__main__":
    run(main, Config, {}, __doc__)
