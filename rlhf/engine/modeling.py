"""One frozen base, the SFT adapter on it, and a small adapter for each role stacked on the upper layers.

Who reads a text is an argument of each pass, a role. The SFT adapter is frozen and part of every role but the bare base,
so the reference is simply "SFT and no more", and a fresh policy (LoRA B = 0) *is* the reference, bit for bit. A role
adapts only the upper layers: what the lower layers compute for a text is the same for policy, reference, reward and value
model, in every epoch, and is computed once.

Shapes: N tokens of a batch of texts, B texts, H hidden size, V vocabulary.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf.data.format import PromptFormat
from rlhf.engine.base import Weights, ends_sha256, find_files, open_weights, read_config
from rlhf.engine.decoder import Decoder, MergedLayers, Texts, lay_out, lay_out_pairs
from rlhf.engine.decoding import Decoding
from rlhf.engine.graphs import Graphs
from rlhf.engine.layers import LeanLayer
from rlhf.engine.micro_batches import CPU_TOKENS, MicroBatchSize, cut_by_tokens
from rlhf.engine.portable import save_tokenizer
from rlhf.runs.checkpoints import check_same_base, sha256
from rlhf.runs.cli import UserError, one_line
from rlhf.runs.hub import hub_errors
from rlhf.runs.processes import is_main, sharded, this_process, whole
from rlhf.runs.reporting import plain

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils import cached_file

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<|pad|>",
    "<pad>",
    "[PAD]",
    "<|reserved_special_token_0|>",
)
BASE = "base"  # the role of the bare base, without the SFT adapter
REFERENCE = "reference"  # the role of the SFT model
HEAD_KEY = "base_model.model.score.weight"  # where PEFT keeps the head of a sequence classification adapter


# ---------------------------------------------------------------- the base model


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype the base computes in: what was asked for, or for "auto" the best this device has.

    Adapters, heads and optimizer states are float32 whatever this says.

    Raises:
        UserError: the device cannot compute in it.
    """
    if device.type == "cuda":
        card, capability = (
            torch.cuda.get_device_name(device),
            torch.cuda.get_device_capability(device),
        )
        bf16, fp16 = torch.cuda.is_bf16_supported(including_emulation=False), capability >= (6, 0)
        where = f"{card} (compute capability {capability[0]}.{capability[1]})"
    else:
        have = torch.cpu.get_capabilities()
        bf16, fp16, where = bool(have.get("avx512_bf16") or have.get("amx_bf16")), False, "a CPU"
    if name == "auto":
        if device.type != "cuda":
            return torch.bfloat16 if bf16 else torch.float32
        if not (bf16 or fp16):
            raise UserError(
                f"{where} has neither bf16 nor usable fp16: use a newer card, or --dtype fp32 on a small model"
            )
        return torch.bfloat16 if bf16 else torch.float16
    if (name == "bf16" and device.type == "cuda" and not bf16) or (name == "fp16" and not fp16):
        raise UserError(f"--dtype {name} does not work on {where}: leave it at auto")
    return DTYPES[name]


def check_4bit(device: torch.device) -> None:
    """Raise UserError unless NF4 weights can be made and used on `device`: it quantises and runs one small layer."""
    try:
        import bitsandbytes as bnb

        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32).to(device)
        layer(torch.ones(1, 64, device=device))
    except Exception as error:
        raise UserError(
            f"4-bit weights do not work on {device.type} here ({one_line(error)}): pass --no-load-in-4bit"
        ) from None


def base_facts(model: str, revision: str | None, load_in_4bit: bool) -> dict[str, Any]:
    """What identifies a base model, for run.json, without loading it; `identified` adds the hashes of its weights.

    A local folder is named by its absolute path, a hub model by its id and its commit. Of weights that are on this
    machine the headers are read, to see that they are those of the config.

    Raises:
        UserError: no such folder or hub model, a gated one, no network; one that this pipeline does not run, or whose
            weights are not those of its config; in 4 bit, but to be sharded.
    """
    if load_in_4bit and sharded():
        raise UserError(
            "FSDP shards 16-bit bases: add --no-load-in-4bit (to sft_train.py; the later phases take it over)"
        )
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model} is not a model folder (it has no config.json)")
        name, config, revision = str(folder.resolve()), folder / "config.json", None
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith("."):
        with hub_errors(model, "model", "--base-model"):
            config = Path(cached_file(model, "config.json", revision=revision))
        name, revision = model, config.parent.name
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
    """`base_facts` of the base that the SFT checkpoint at `folder` was trained on, or of `model`, its copy elsewhere.

    It has the record of that base's weights, by which `open_weights` knows them.

    Raises:
        UserError: it is another base.
    """
    named = sft["base"]
    revision = named["revision"] if model in (None, named["model"]) else None
    base = base_facts(model or named["model"], revision, named["load_in_4bit"])
    if named.get("weights_sha256") and base["revision"] is None:
        check_same_base(sft, folder, base | {"weights_sha256": ends_sha256(Path(base["model"]))})
    check_same_base(sft, folder, base)
    base["weights"] = named.get("weights")
    if (base["model"], base["revision"]) != (named["model"], named["revision"]):
        base["copy_of"] = {"model": named["model"], "revision": named["revision"]}
    return base


def load_tokenizer(folder: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer with an EOS, and a pad token that is not EOS: with pad = EOS a model never learns to stop.

    Raises:
        UserError: it cannot be loaded, has no EOS, or no token that could be padded with.
    """
    with hub_errors(folder, "tokenizer", "--base-model"):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    if tokenizer.eos_token is None:
        raise UserError(f"the tokenizer of {folder} has no EOS token")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = unused_token(tokenizer)
        if tokenizer.pad_token is None:
            raise UserError(
                f"the tokenizer of {folder} has no token to pad with but EOS: set its pad_token to an unused one"
            )
    if hasattr(tokenizer, "legacy"):  # of Llama 2's kind; transformers forgets to save it
        tokenizer.init_kwargs["legacy"] = tokenizer.legacy
    tokenizer.padding_side = "right"
    return tokenizer


def unused_token(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """A token that no text has: a usual one, or any special one that is not BOS or EOS, nor in a chat template."""
    vocabulary = tokenizer.get_vocab()
    for token in (*PAD_TOKENS, tokenizer.unk_token):
        if token in vocabulary and token != tokenizer.eos_token:
            return token
    templates = json.dumps(tokenizer.chat_template, ensure_ascii=False)
    special = [
        token.content
        for _, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special
    ]
    taken = (tokenizer.bos_token, tokenizer.eos_token)
    free = [token for token in special if token not in taken and token not in templates]
    return next((token for token in free if "pad" in token.lower()), free[0] if free else None)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, base: dict[str, Any]) -> None:
    """Raise UserError if the tokenizer can give an id for which the base's embedding has no row."""
    rows = read_config(base).vocab_size
    beyond = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= rows)
    if beyond:
        id, token = beyond[0]
        raise UserError(
            f"the tokenizer of {base['model']} has {len(beyond)} tokens more than the model has embeddings "
            f"({rows}; the first is {plain(token)!r}, id {id}): resize the model's embeddings, or use the tokenizer it was "
            "trained with"
        )


def load_format(folder: str, run: dict[str, Any]) -> PromptFormat:
    """The prompt format of a checkpoint with its tokenizer; `run` is its run.json."""
    return PromptFormat(run["prompt_format"], load_tokenizer(folder))


def load_base(
    base: dict[str, Any], dtype: torch.dtype, pad_token_id: int, with_head: bool = False
) -> PreTrainedModel:
    """Load the base named by `base_facts`, frozen, in evaluation mode; in NF4 if it says so.

    With `with_head` it is a sequence classification model whose one-number head is a `ScalarHead`. One that will be
    sharded stays in its file, which torch maps into memory: accelerate deals the first process's weights out.
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
        config.num_labels, config.pad_token_id = 1, pad_token_id
    with hub_errors(name, "model", "--base-model"):
        # Given the weights themselves, transformers looks for no others, and for no adapter beside them.
        model = classes[type(config)].from_pretrained(
            None, config=config, state_dict=weights.tensors(), **options
        )
    model.name_or_path = model.config.name_or_path = name
    if with_head:
        model.score = ScalarHead(config.hidden_size).to(device)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs bitsandbytes repacks the weights at the first no-grad forward; backward then gives no gradients.
            module.support_avx512bf16_for_cpu = False
    model.requires_grad_(False)
    model.config.use_cache = False
    if base["load_in_4bit"]:
        return model.eval()
    return model.eval() if sharded() else model.to(device).eval()


class ScalarHead(nn.Linear):
    """H -> 1 in float32 whatever the trunk and autocast do; initialised as in the N+ paper (2403.17031), std 1/sqrt(H+1)."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.normal_(self.weight, std=(hidden_size + 1) ** -0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.weight)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside a decoder layer (q_proj, ..., down_proj): where LoRA goes."""
    layer = model.get_decoder().layers[0]
    return sorted(
        {
            name.rsplit(".", 1)[-1]
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        }
    )


# ---------------------------------------------------------------- the shared base


class SharedBase:
    """A loaded base with the SFT adapter and any number of role adapters on its upper layers.

    Args:
        model: what `load_base` returned.
        folder: the SFT checkpoint; None: there is none, and only the bare base can answer.
        dtype: what the trunk computes in.
    """

    def __init__(self, model: PreTrainedModel, folder: str | None, dtype: torch.dtype):
        self.dtype = dtype
        self.device = this_process().device
        self.num_layers = self.first_role_layer = len(model.get_decoder().layers)
        self.heads: dict[str, ScalarHead] = {}
        self.adapters: dict[str, list[str]] = {BASE: [], REFERENCE: ["sft"]}  # of each role
        self.micro_batch = MicroBatchSize(CPU_TOKENS)
        self.rollout_rows: int | None = None  # that fit, once more have run out of memory
        self.merged: MergedLayers | None = (
            None  # what a role samples from, if not the base with its adapters
        )
        self.graphs = Graphs(enabled=self.device.type == "cuda")  # of decoding
        self.decoding: Decoding | None = None  # kept from one rollout to the next, with its graphs
        self.trained: tuple[str, ...] = ()  # the roles whose weights get gradients
        if folder is None:  # PEFT wants an adapter; a new one adds nothing
            config, state = LoraConfig(r=1, target_modules=linear_names(model)), {}
        else:
            config, state = read_adapter(folder)
        if any(weight.shape[0] != config.r for key, weight in state.items() if "lora_A" in key):
            raise UserError(
                f"the adapter at {folder} does not have the rank of its config ({config.r})"
            )
        try:
            self.peft = PeftModel(model, config, adapter_name="sft")
        except ValueError as error:  # no such layers
            raise UserError(
                f"the adapter at {folder} does not fit this base model ({one_line(error)})"
            ) from None
        self.decoder = (
            None if sharded() else Decoder(model)
        )  # it reads weights of which FSDP has a part only
        if folder:
            self.load("sft", state)
        self.stack()

    def add_role(
        self,
        role: str,
        rank: int,
        alpha: int,
        num_layers: int,
        state: dict[str, Tensor] | None = None,
        head: Tensor | None = None,
    ) -> None:
        """Stack a LoRA adapter for `role` on the upper `num_layers` layers (0: on all), from `state` or fresh.

        `head` [1, H], if given, becomes the role's scalar head. The role starts frozen; `train` makes it learn.
        """
        num_layers = num_layers or self.num_layers
        if not 0 < num_layers <= self.num_layers:
            raise UserError(
                f"--role-layers {num_layers}: this model has {self.num_layers} layers, give 0 to that"
            )
        first = self.num_layers - num_layers
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=sorted(self.peft.peft_config["sft"].target_modules),
            layers_to_transform=list(range(first, self.num_layers)),
        )
        self.peft.add_adapter(role, config)
        self.adapters[role] = ["sft", role]
        if state is not None:
            self.load(role, state)
        if head is not None:
            self.heads[role] = ScalarHead(head.shape[1]).to(self.device)
            self.heads[role].weight.data.copy_(head)
        self.first_role_layer = min(self.first_role_layer, first)
        self.train(*self.trained)  # PEFT has a new adapter learn, and may have an old one
        self.stack()

    def load(self, role: str, state: dict[str, Tensor]) -> None:
        """Copy LoRA weights under PEFT's names into `role`. Raises UserError if they do not fit."""
        try:
            result = set_peft_model_state_dict(self.peft, state, adapter_name=role)
        except RuntimeError as error:  # weights of other shapes
            raise UserError(
                f"the {role} adapter does not fit its config or this base model ({one_line(error)})"
            ) from None
        missing = [key for key in result.missing_keys if f".{role}." in key and "lora_" in key]
        if missing or result.unexpected_keys:
            odd = (missing + result.unexpected_keys)[0]
            raise UserError(
                f"the {role} adapter does not fit this base model (first odd weight: {odd})"
            )
        self.restack()

    def train(self, *roles: str) -> None:
        """Have the weights of these roles learn, and nothing else.

        A sharded base goes through PEFT's own forward, which knows only one role at a time: the last.
        """
        self.trained = roles
        if sharded() and roles:
            for module in self.peft.modules():
                if isinstance(module, BaseTunerLayer):
                    module.set_adapter(self.adapters[roles[-1]])
        for module in (self.peft, *self.heads.values()):
            module.requires_grad_(False)
        for role in roles:
            for parameter in self.parameters(role):
                parameter.requires_grad_(True)

    # Passes read stacked copies of the adapters (rlhf/engine/layers.py). Whatever writes to the adapters themselves comes
    # through here, or says so by `restack`.

    def stack(self) -> None:
        if self.decoder:
            self.decoder.stack(self.adapters)

    def restack(self) -> None:
        """Have all passes see the weights of the adapters as they are now. To be called after each write to them."""
        if self.decoder:
            self.decoder.restack()

    def drop_gradients(self, role: str) -> None:
        for parameter in self.parameters(role):
            parameter.grad = None

    def trained_weights(self) -> dict[str, Tensor]:
        """What is trained, by a name of its own; views, on the device."""
        return {
            f"{role}.{i}": parameter.detach()
            for role in self.trained
            for i, parameter in enumerate(self.parameters(role))
        }

    def load_trained(self, weights: dict[str, Tensor]) -> None:
        """Put back what `trained_weights` gave."""
        for name, weight in self.trained_weights().items():
            weight.copy_(weights[name])
        self.restack()

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The weights that belong to `role`: its LoRA matrices and its head."""
        lora = [p for name, p in self.peft.named_parameters() if f".{role}." in name]
        return lora + (list(self.heads[role].parameters()) if role in self.heads else [])

    def adapter_state(self, role: str) -> dict[str, Tensor]:
        """A copy of `role`'s LoRA weights under PEFT's names, on the CPU. If they are sharded, all processes call it."""
        state = get_peft_model_state_dict(self.peft, adapter_name=role)
        return {
            name: whole(weight.detach()).to("cpu", copy=True)
            for name, weight in state.items()
            if "lora_" in name
        }

    # -- forward

    @torch.no_grad()
    def lower(self, texts: Texts) -> Tensor:
        """Hidden states [N, H] below the first role layer, the same for every role but the bare base."""
        return self.decoder.run(
            self.decoder.embed(texts),
            texts,
            REFERENCE,
            self.decoder.layers[: self.first_role_layer],
        )

    def upper(self, lower: Tensor, texts: Texts, role: str) -> Tensor:
        """Final hidden states [N, H] of `role`, from those that `lower` gave."""
        return self.decoder.norm(
            self.decoder.run(lower, texts, role, self.decoder.layers[self.first_role_layer :])
        )

    def read_head(self, texts: Texts, role: str = "reward") -> Tensor:
        """What the reward model `role` says at the last token of each text [B], float32; of pairs [2 x B]."""
        return self.heads[role](self.upper(self.lower(texts), texts, role)[texts.last]).squeeze(-1)

    # -- decoding

    def merge(self, role: str) -> None:
        """Have `role` sample from a copy of the base with its adapters merged in, as they are now."""
        if self.merged and self.merged.role == role:
            self.merged.write()
        else:
            self.merged = MergedLayers(self.decoder, role, self.first_role_layer)

    @property
    def rollout_weights(self) -> str:
        """What is sampled from: "merged" or "base"."""
        return "merged" if self.merged else "base"

    def layers_of(self, role: str) -> list[LeanLayer]:
        """The layers that `role` samples through."""
        merged = self.merged and self.merged.role == role
        return self.merged.layers if merged else self.decoder.layers

    def lm_head_weight(self) -> Tensor:
        """[V, H]"""
        return self.peft.base_model.model.get_output_embeddings().weight

    def score(self, sequences: list[list[int]]) -> Tensor:
        """The reward model's score of each text.

        Args:
            sequences: token ids, prompt and response, with EOS.
        Returns:
            [len(sequences)], float32, on the CPU.
        """
        return self._score(
            sequences,
            list(map(len, sequences)),
            lambda texts: self.read_head(lay_out(texts, self.device)),
        )

    def score_pairs(self, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
        """The same of pairs that begin alike, where what they share is read once: [2, len(pairs)]."""
        lengths = [len(a) + len(b) for a, b in pairs]
        return self._score(pairs, lengths, lambda some: self.read_pairs(some).view(2, -1))

    @torch.no_grad()
    def _score(self, items: list, lengths: list[int], read: Callable[[list], Tensor]) -> Tensor:
        """What `read` says of the items [..., len(items)], some of like length at a time."""

        def work() -> Tensor:
            parts = cut_by_tokens(lengths, self.micro_batch.tokens)
            scores = torch.cat([read([items[i] for i in part]) for part in parts], -1).cpu()
            return scores[..., torch.tensor(sum(parts, [])).argsort()]

        return self.micro_batch.fit(work, max(lengths)) if items else torch.empty(0)

    def read_pairs(self, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
        """What the reward model says of the first texts, then of the second ones [2 x B]."""
        if not sharded():
            return self.read_head(lay_out_pairs(pairs, self.device))
        texts = [text for side in zip(*pairs, strict=True) for text in side]
        ids = pad_right(texts, self.peft.base_model.model.config.pad_token_id, self.device)
        mask = pad_right([[1] * len(text) for text in texts], 0, self.device)
        return self.peft(input_ids=ids, attention_mask=mask).logits.squeeze(-1)


def pad_right(sequences: list[list[int]], pad: float, device: torch.device) -> Tensor:
    """[B, T] of token ids, or of whatever numbers, padded on the right."""
    tensors = [torch.tensor(sequence, device=device) for sequence in sequences]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=pad)


# ---------------------------------------------------------------- adapters on disk


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
        raise UserError(f"{folder} holds an adapter of another kind than LoRA")
    config.task_type = config.modules_to_save = None
    config.inference_mode = True
    return config, state


def save_stacked(
    folder: Path, shared: SharedBase, role: str, form: PromptFormat, base: dict[str, Any]
) -> None:
    """Save SFT adapter + `role`'s as one ordinary PEFT adapter, with the role's head if it has one, and the tokenizer.

    Two LoRA adapters on one layer are one of the summed rank: [A1; A2] and [B1 B2]. The scalings alpha / r go into B,
    so the saved adapter has scaling 1. Some readers know one rank or one alpha for all layers: where the role has no
    adapter, A2 and B2 are zero. `read_stacked` takes it apart again. If they are sharded, all processes call it.
    """
    sft, config = shared.adapter_state("sft"), shared.peft.peft_config[role]
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
    save_tokenizer(form.tokenizer, folder)


def read_stacked(folder: str, shared: SharedBase) -> dict[str, Any]:
    """Take a checkpoint of `save_stacked` apart: the arguments of `SharedBase.add_role` for the role in it.

    Its scaling is in B already, so alpha is the rank. Layers where the role's part is zero throughout have no adapter of
    its own: the role leaves them to the lower pass that all roles share. (One that trains has an A from the start.) In
    checkpoints of earlier versions such layers have the lower rank of the SFT adapter.

    Raises:
        UserError: it is not stacked on the SFT adapter of `shared`.
    """
    _, stacked = read_adapter(folder)
    head = stacked.pop(HEAD_KEY, None)
    sft, state, layers = shared.adapter_state("sft"), {}, set()
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
                f"{folder} is not stacked on this SFT adapter (weight {key}): train it again from this SFT checkpoint"
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
