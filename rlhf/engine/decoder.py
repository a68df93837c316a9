"""A Llama-like decoder for texts of any length, end to end: no padding in its linear maps.

Shapes: B texts, T tokens of the longest, N tokens of all texts, H hidden size, K key heads, D
features a head.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from rlhf.engine.layers import LeanLayer
from rlhf.engine.linear_maps import Norm
from rlhf.runs.device import has_flash_attention
from rlhf.runs.errors import UserError

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer, Qwen3DecoderLayer)
SiLU = type(ACT2FN["silu"])  # the class that transformers gives `hidden_act: silu`


class Padded:
    """Where each of N tokens stands in [B, T], with texts in rows and padding on the right.

    Args:
        lengths: of the texts.
    """

    def __init__(self, lengths: list[int], device: torch.device):
        self.rows = len(lengths)
        self.width = max(lengths)
        self.place: Tensor | None = None  # [N] of B x T, unless nothing is padded
        if sum(lengths) < self.rows * self.width:
            real = np.arange(self.width) < np.array(lengths)[:, None]  # [B, T]
            self.place = torch.from_numpy(np.flatnonzero(real)).to(device)

    def spread(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], with zeros for padding."""
        if self.place is not None:
            x = x.new_zeros(self.rows * self.width, *x.shape[1:]).index_copy_(0, self.place, x)
        return x.view(self.rows, self.width, *x.shape[1:])

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]"""
        x = x.reshape(self.rows * self.width, *x.shape[2:])
        return x if self.place is None else x.index_select(0, self.place)


@dataclass(frozen=True)
class Texts:
    """A batch of texts, made by `lay_out` or `lay_out_pairs`."""

    ids: Tensor  # [N]
    positions: Tensor  # [N] of each token in its text
    padded: Padded
    longest: int  # tokens of the longest text
    # [B or 1, 1, T, S], True where a token may look; None: at itself and everything before it
    mask: Tensor | None = None
    # [B] of N, the last token of each text; for pairs [2 x B], first those of the first texts
    last: Tensor | None = None


def lay_out(sequences: list[list[int]], device: torch.device) -> Texts:
    """Texts from their token ids."""
    lengths = [len(ids) for ids in sequences]
    return Texts(
        ids=torch.tensor([token for ids in sequences for token in ids], device=device),
        positions=torch.cat([torch.arange(length) for length in lengths]).to(device),
        padded=Padded(lengths, device),
        longest=max(lengths),
        last=(torch.tensor(lengths).cumsum(0) - 1).to(device),
    )


def unpad(padded: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of [B, T] as lists, without the padding on the right, where `mask` is 0."""
    return [row[:length] for row, length in zip(padded.tolist(), mask.sum(1).tolist(), strict=True)]


def lay_out_pairs(pairs: list[tuple[list[int], list[int]]], device: torch.device) -> Texts:
    """Pairs that begin alike, each as one text: the shared part, then the rest of both.

    The rest of the second does not see the rest of the first, and its positions follow the shared
    part. So both get the same hidden states as they would alone.
    """
    rows = []
    parts = []
    positions = []
    last = []
    start = 0
    for first, second in pairs:
        shared = next(
            (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b),
            min(len(first), len(second)),
        )
        shared = min(shared, len(first) - 1, len(second) - 1)  # each keeps its own last token
        rows.append([*first, *second[shared:]])
        parts.append([0] * shared + [1] * (len(first) - shared) + [2] * (len(second) - shared))
        positions += [*range(len(first)), *range(shared, len(second))]
        last.append((start + len(first) - 1, start + len(rows[-1]) - 1))
        start += len(rows[-1])
    # [B, T]
    part = nn.utils.rnn.pad_sequence(
        list(map(torch.tensor, parts)), batch_first=True, padding_value=3
    )
    part = part.to(device)
    looks = (part[:, None, :] == 0) | (part[:, :, None] == part[:, None, :])  # [B, T, T]
    return Texts(
        ids=torch.tensor([token for row in rows for token in row], device=device),
        positions=torch.tensor(positions, device=device),
        padded=Padded([len(row) for row in rows], device),
        longest=max(len(ids) for pair in pairs for ids in pair),
        mask=looks.tril()[:, None],
        last=torch.tensor(last).T.flatten().to(device),
    )


class Cache(Protocol):
    """Something that keeps the keys and values of texts, such as `decoding.Decoding`."""

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep a layer's keys and values [B, K, T, D], with texts in rows, from the left."""


def check_layers(model: PreTrainedModel) -> None:
    """Raise UserError unless `model` is a Llama-like decoder."""
    for layer in model.get_decoder().layers:
        if not isinstance(layer, LAYERS) or not isinstance(layer.mlp.act_fn, SiLU):
            raise UserError(
                f"{type(layer).__name__} is not supported: this pipeline is for Llama-like "
                "decoders (Llama, Mistral, Qwen2, Qwen3, SmolLM2)"
            )


class Decoder:
    """The decoder of `model`, with or without adapters: `LeanLayer`s over transformers' weights.

    Each pass is given the role it runs with; `stack` says which adapters a role has. PEFT's active
    adapters play no part.

    Raises:
        UserError: it is not a Llama-like decoder.
    """

    def __init__(self, model: PreTrainedModel):
        check_layers(model)
        self.model = model
        self.inner = model.get_decoder()
        self.window = getattr(model.config, "sliding_window", None)
        self.layers = [LeanLayer(layer) for layer in self.inner.layers]
        # cuDNN's attention makes a plan for every new shape, perhaps one for measuring and another
        # for training.
        torch.backends.cuda.enable_cudnn_sdp(False)
        # Whether trained layers keep only their input and are computed twice.
        self.gradient_checkpointing = False

    def stack(self, roles: dict[str, list[str]]) -> None:
        """Set the roles and each role's adapters, in order. Call `restack` after each change.

        The tensors of earlier stacks go, so call this before anything holds their addresses.
        """
        dtype = self.inner.embed_tokens.weight.dtype
        for layer in self.layers:
            for linear in layer.maps:
                linear.stack(roles, dtype)

    def restack(self, trained_only: bool = False) -> None:
        """Copy the weights of all adapters, or only of the trained ones, into the stacks."""
        for layer in self.layers:
            for linear in layer.maps:
                for stack in set(linear.stacks.values()) - {None}:
                    stack.write(trained_only)

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Restack after each step of `optimizer`, so that all passes see what it changed."""
        optimizer.register_step_post_hook(lambda *_: self.restack(trained_only=True))

    def embed(self, ids: Tensor) -> Tensor:
        """The embeddings [N, H] of token ids [N]."""
        return self.inner.embed_tokens(ids)

    def run(
        self,
        x: Tensor,
        texts: Texts,
        role: str,
        layers: list[LeanLayer],
        cache: Cache | None = None,
    ) -> Tensor:
        """Hidden states [N, H] of `role` after some layers, from those before; no final norm.

        Args:
            layers: some of `self.layers`, or of their merged copies.
            cache: keeps the keys and values of all tokens, if given.
        """
        self.check_window(texts.longest)
        rope = self.rope(x, texts.positions)
        mask = texts.mask
        if mask is None and not self.fused_causal(x):
            square = (1, 1, texts.padded.width, texts.padded.width)
            mask = torch.ones(square, dtype=torch.bool, device=x.device).tril()
        if mask is not None:
            mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill_(
                ~mask, float("-inf")
            )
        for layer in layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    layer,
                    x,
                    rope,
                    texts.padded,
                    mask,
                    role,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = layer(x, rope, texts.padded, mask, role, cache)
        return x

    def check_window(self, tokens: int) -> None:
        """Raise UserError for a text that is longer than the model's attention window."""
        if self.window is not None and tokens > self.window:
            raise UserError(
                f"a text of {tokens} tokens exceeds this model's attention window of "
                f"{self.window} tokens: make texts shorter"
            )

    def rope(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, D] of positions [N], in the type of `x`."""
        cos, sin = self.inner.rotary_emb(x[None], positions[None])
        return cos[0], sin[0]

    @staticmethod
    def fused_causal(x: Tensor) -> bool:
        """Whether flash attention can be used: grouped heads, no mask, no matrix of weights.

        If not, a GPU uses memory-efficient attention, with a mask.
        """
        return x.dtype != torch.float32 and has_flash_attention(x.device)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm [N, H]."""
        return Norm.apply(x, self.inner.norm.weight, self.inner.norm.variance_epsilon)


class MergedLayers:
    """A decoder's layers in 16 bit with a role's adapters merged in, to sample from.

    They are twice as fast as a quantised base with its adapters, and take as much memory as a
    16-bit base. Their tensors keep their addresses.

    Args:
        first: the first layer that may have an adapter that trains.
    """

    def __init__(self, decoder: Decoder, role: str, first: int):
        self.role = role
        self.first = first
        self.layers = [layer.merged() for layer in decoder.layers]
        self.write(0)

    def write(self, first: int | None = None) -> None:
        """Merge the adapters as they are now, from layer `first` on; None: the first trained."""
        for layer in self.layers[self.first if first is None else first :]:
            for linear in layer.maps:
                linear.write(self.role)
