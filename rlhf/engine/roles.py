"""One frozen base, the SFT adapter on it, and a small adapter for each role on its upper layers.

Each pass is told which role reads the text. The SFT adapter is frozen and part of every role except
the bare base. So the reference is simply "SFT and no more", and a fresh policy (LoRA B = 0) *is*
the reference, bit for bit. A role adapts only the upper layers. What the lower layers compute for a
text is therefore the same for policy, reference, reward and value model, in every epoch, and is
computed once.

Shapes: N tokens of a batch of texts, B texts, H hidden size, V vocabulary.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.engine.decoder import Decoder, MergedLayers, Texts, lay_out, lay_out_pairs
from rlhf.engine.decoding import Decoding
from rlhf.engine.graphs import Graphs
from rlhf.engine.layers import LeanLayer
from rlhf.engine.loading import ScalarHead, pad_right, read_adapter
from rlhf.engine.micro_batches import CPU_TOKENS, MicroBatchSize, cut_by_tokens
from rlhf.engine.peft_workarounds import select_adapters, without_effect
from rlhf.runs.errors import UserError, one_line
from rlhf.runs.processes import sharded, this_process, whole

BASE = "base"  # the role of the bare base, without the SFT adapter
REFERENCE = "reference"  # the role of the SFT model


class SharedBase:
    """A loaded base with the SFT adapter, and any number of role adapters on its upper layers.

    Args:
        model: what `load_base` returned.
        folder: the SFT checkpoint. None: there is none, and only the bare base can answer.
        dtype: that the trunk computes in.
    """

    def __init__(self, model: PreTrainedModel, folder: str | None, dtype: torch.dtype):
        self.dtype = dtype
        self.device = this_process().device
        self.num_layers = self.first_role_layer = len(model.get_decoder().layers)
        self.heads: dict[str, ScalarHead] = {}
        self.adapters: dict[str, list[str]] = {BASE: [], REFERENCE: ["sft"]}  # by role
        self.micro_batch = MicroBatchSize(CPU_TOKENS)
        self.rollout_rows: int | None = None  # at most, at a time
        # What a role samples from, if not from the base with its adapters.
        self.merged: MergedLayers | None = None
        self.graphs = Graphs(enabled=self.device.type == "cuda")  # of decoding
        self.decoding: Decoding | None = None  # kept from one rollout to the next, with its graphs
        self.trained: tuple[str, ...] = ()  # the roles that learn
        if folder is None:
            config = without_effect(model)
            state = {}
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
        # The decoder reads whole weights, and under FSDP a process has only part of each.
        self.decoder = None if sharded() else Decoder(model)
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
        """Stack a LoRA adapter for `role` on the upper `num_layers` layers (0: all).

        The role starts frozen; `train` makes it learn.

        Args:
            state: the adapter's weights; None: fresh ones.
            head: [1, H], the weights of the role's scalar head, if it has one.
        """
        num_layers = num_layers or self.num_layers
        if not 0 < num_layers <= self.num_layers:
            raise UserError(
                f"--role-layers {num_layers}: this model has {self.num_layers} layers, so give 0 "
                f"to {self.num_layers}"
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
        self.train(*self.trained)  # PEFT makes a new adapter learn, and perhaps an old one
        self.stack()

    def load(self, role: str, state: dict[str, Tensor]) -> None:
        """Copy LoRA weights, by PEFT's names, into `role`. Raises UserError if they do not fit."""
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
        """Let the weights of these roles learn, and no others.

        A sharded base goes through PEFT's own forward, which knows one role at a time: here the
        last.
        """
        self.trained = roles
        if sharded() and roles:
            select_adapters(self.peft, self.adapters[roles[-1]])
        for module in (self.peft, *self.heads.values()):
            module.requires_grad_(False)
        for role in roles:
            for parameter in self.parameters(role):
                parameter.requires_grad_(True)

    # Passes read stacked copies of the adapters (rlhf/engine/linear_maps.py). Whoever writes to the
    # adapters themselves goes through here, or calls `restack`.

    def stack(self) -> None:
        if self.decoder:
            self.decoder.stack(self.adapters)

    def restack(self) -> None:
        """Show all passes the adapters' weights as they are now. Call it after each change."""
        if self.decoder:
            self.decoder.restack()

    def drop_gradients(self, role: str) -> None:
        for parameter in self.parameters(role):
            parameter.grad = None

    def trained_weights(self) -> dict[str, Tensor]:
        """The weights that learn, by names of our own: views, on the device."""
        return {
            f"{role}.{i}": parameter.detach()
            for role in self.trained
            for i, parameter in enumerate(self.parameters(role))
        }

    def load_trained(self, weights: dict[str, Tensor]) -> None:
        """Copy weights back that came from `trained_weights`."""
        for name, weight in self.trained_weights().items():
            weight.copy_(weights[name])
        self.restack()

    def parameters(self, role: str) -> list[nn.Parameter]:
        """The weights that belong to `role`: its LoRA matrices and its head."""
        lora = [p for name, p in self.peft.named_parameters() if f".{role}." in name]
        return lora + (list(self.heads[role].parameters()) if role in self.heads else [])

    def adapter_state(self, role: str) -> dict[str, Tensor]:
        """A copy of `role`'s LoRA weights by PEFT's names, on the CPU.

        All processes call it if the base is sharded.
        """
        state = get_peft_model_state_dict(self.peft, adapter_name=role)
        return {
            name: whole(weight.detach()).to("cpu", copy=True)
            for name, weight in state.items()
            if "lora_" in name
        }

    # -- forward

    @torch.no_grad()
    def lower(self, texts: Texts) -> Tensor:
        """Hidden states [N, H] below the roles' layers: the same for all except the bare base."""
        return self.decoder.run(
            self.decoder.embed(texts.ids),
            texts,
            REFERENCE,
            self.decoder.layers[: self.first_role_layer],
        )

    def upper(self, lower: Tensor, texts: Texts, role: str) -> Tensor:
        """Final hidden states [N, H] of `role`, from those of `lower`."""
        return self.decoder.norm(
            self.decoder.run(lower, texts, role, self.decoder.layers[self.first_role_layer :])
        )

    def read_head(self, texts: Texts, role: str = "reward") -> Tensor:
        """The scores that reward model `role` gives the texts [B], float32; for pairs [2 x B]."""
        return self.heads[role](self.upper(self.lower(texts), texts, role)[texts.last]).squeeze(-1)

    # -- decoding

    def merge(self, role: str) -> None:
        """Let `role` sample from a copy of the base, with its adapters merged as they are now."""
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
        """The reward model's scores of texts.

        Args:
            sequences: token ids: prompt, response and EOS.
        Returns:
            [len(sequences)], float32, on the CPU.
        """
        return self._score(
            sequences,
            list(map(len, sequences)),
            lambda texts: self.read_head(lay_out(texts, self.device)),
        )

    def score_pairs(self, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
        """The same for pairs of texts: [2, len(pairs)]. What a pair begins with is read once."""
        lengths = [len(a) + len(b) for a, b in pairs]
        return self._score(pairs, lengths, lambda some: self.read_pairs(some).view(2, -1))

    @torch.no_grad()
    def _score(self, items: list, lengths: list[int], read: Callable[[list], Tensor]) -> Tensor:
        """`read` of the items, [..., len(items)], some of similar length at a time."""

        def work() -> Tensor:
            parts = cut_by_tokens(lengths, self.micro_batch.tokens)
            scores = torch.cat([read([items[i] for i in part]) for part in parts], -1).cpu()
            return scores[..., torch.tensor(sum(parts, [])).argsort()]

        return self.micro_batch.retry(work, max(lengths)) if items else torch.empty(0)

    def read_pairs(self, pairs: list[tuple[list[int], list[int]]]) -> Tensor:
        """The reward model's scores of the first texts, then of the second ones [2 x B]."""
        if not sharded():
            return self.read_head(lay_out_pairs(pairs, self.device))
        texts = [text for side in zip(*pairs, strict=True) for text in side]
        ids = pad_right(texts, self.peft.base_model.model.config.pad_token_id, self.device)
        mask = pad_right([[1] * len(text) for text in texts], 0, self.device)
        return self.peft(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
