"""A Llama decoder layer with few operations and little kept for backward.

The weights are frozen except for LoRA, and memory, not arithmetic, decides what fits a card. So a
layer keeps only what is not cheap to compute again: the inputs of its norms, the rotated q, k and
v, the attention's output, gate and up. Texts lie end to end; only `attention` sees them padded.
Results are those of transformers' and PEFT's own layers; tests compare the two.

Shapes: B texts, T tokens of the longest, S tokens attended to, N tokens of all texts, H hidden
size, D features a head, G query heads to each of K key heads.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf.engine.attention import Attention, Join, NormHeads, Rotate, one_query_attention
from rlhf.engine.linear_maps import LinearMap, MergedMap, rms_norm


class LeanLayer:
    """The forward pass of a Llama-like decoder layer of transformers, with LoRA but no dropout.

    Args:
        layer: one of `decoder.LAYERS`, with or without PEFT's LoRA layers in it.
    """

    def __init__(self, layer: nn.Module):
        attention = layer.self_attn
        mlp = layer.mlp
        self.layer = layer
        self.attention = attention
        self.heads = (attention.config.num_attention_heads, attention.config.num_key_value_heads)
        # Qwen3
        self.head_norms = (
            (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        )
        self.qkv = LinearMap(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = LinearMap(attention.o_proj)
        self.gate_up = LinearMap(mlp.gate_proj, mlp.up_proj)
        self.down = LinearMap(mlp.down_proj)
        self.maps = (self.qkv, self.o, self.gate_up, self.down)

    def __call__(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        padded,
        mask: Tensor | None,
        role: str,
        cache=None,
    ) -> Tensor:
        """Hidden states after the layer.

        Args:
            x: [N, H].
            role: whose adapters to use; `LinearMap.stack` knows it.
            rope: cosines and sines of the tokens' positions, each [N, D].
            padded: where each token stands in [B, T], a `decoder.Padded`.
            mask: [B or 1, 1, T, S], added to the attention's scores. None: causal, for a fused
                kernel.
            cache: a `decoder.Cache` that keeps k and v.
        """
        qkv = self.qkv(x, role, norm=self.layer.input_layernorm)  # [N, (GK + 2K) D]
        if self.head_norms:
            q_norm, k_norm = self.head_norms
            qkv = NormHeads.apply(
                qkv, q_norm.weight, k_norm.weight, q_norm.variance_epsilon, self.heads
            )
        q, k, v = Rotate.apply(qkv, *rope, self.heads, padded)  # [B, heads, T, D] each
        if cache is not None:
            cache.keep(self.attention.layer_idx, k, v)
        if q.is_cuda:
            out, _ = sdpa_attention_forward(
                self.attention, q, k, v, mask, scaling=self.attention.scaling
            )
            out = out.transpose(1, 2)
        else:
            out = Attention.apply(q, k, v, mask, self.attention.scaling)  # [B, GK, T, D]
        x = self.o(Join.apply(out, padded), role, residual=x)
        gate_up = self.gate_up(x, role, norm=self.layer.post_attention_layernorm)
        return self.down(gate_up, role, residual=x, gated=True)

    def merged(self) -> "LeanLayer":
        """A copy of this layer with a `MergedMap` in place of each linear map."""
        layer = copy.copy(self)
        layer.maps = tuple(map(MergedMap, self.maps))
        layer.qkv, layer.o, layer.gate_up, layer.down = layer.maps
        return layer

    def next(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        role: str,
        keys: Tensor,
        values: Tensor,
        at,
    ) -> Tensor:
        """Hidden states [B, H] of one more token of each text, without gradients.

        All shapes are fixed and the CPU reads nothing, so that a CUDA graph can hold it.

        Args:
            x: [B, H].
            rope: cosines [B, 1, D], and sines with the first half negated.
            mask: [B, 1, 1, S], 0 where the token may look and -inf elsewhere.
            keys, values: [B, K, W, D] of the earlier tokens, W >= S. The token's own are written
                to them.
            at: where to write, as indices of dimensions 0 and 2: two tensors [B].
        """
        rows, places = at
        cos, sin = rope
        width = mask.shape[-1]
        (heads, kv_heads) = self.heads
        qkv = self.qkv.apply(rms_norm(x, self.layer.input_layernorm), role)
        qk, v = qkv.view(len(x), -1, cos.shape[-1]).split([heads + kv_heads, kv_heads], dim=1)
        if self.head_norms:
            q_norm, k_norm = self.head_norms
            q, k = qk.split([heads, kv_heads], dim=1)
            qk = torch.cat([rms_norm(q, q_norm), rms_norm(k, k_norm)], dim=1)
        first, second = qk.chunk(2, dim=-1)
        q, k = (
            torch.cat([second, first], dim=-1)
            .mul_(sin)
            .addcmul_(qk, cos)
            .split([heads, kv_heads], dim=1)
        )
        keys[rows, :, places] = k
        values[rows, :, places] = v
        out = one_query_attention(
            q, keys[:, :, :width], values[:, :, :width], mask, self.attention.scaling
        )
        x = self.o.apply(out, role, residual=x)
        gate, up = self.gate_up.apply(rms_norm(x, self.layer.post_attention_layernorm), role).chunk(
            2, dim=-1
        )
        return self.down.apply(F.silu(gate).mul_(up), role, residual=x)
