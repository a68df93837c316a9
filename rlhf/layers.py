"""A Llama decoder layer with few operations and little kept for backward.

The weights are frozen but for LoRA, and memory, not arithmetic, decides what fits a card. So what is kept of a layer is
what cannot be had cheaply again: the inputs of its norms, the rotated q, k and v, the attention's output, gate and up.
Linear maps that read the same input are one product, and all active adapters on them are one LoRA pair. Texts lie end to
end; only attention sees them padded. Results are those of transformers' and PEFT's own layers; tests hold both side by
side.

Shapes: B texts, T tokens of the longest, S tokens attended to, N tokens of all texts, I and O features in and out, R
summed rank of the active adapters, D features a head, G query heads to each of K key heads.
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from transformers.integrations.sdpa_attention import sdpa_attention_forward


class LeanLayer:
    """The forward pass of one of transformers' Llama-like decoder layers, for plain LoRA without dropout.

    Args:
        layer: LlamaDecoderLayer, MistralDecoderLayer or Qwen2DecoderLayer, with or without PEFT's LoRA layers in it.
    """

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attention = layer, attention
        self.heads = (attention.config.num_attention_heads, attention.config.num_key_value_heads)
        self.qkv = LinearMap(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = LinearMap(attention.o_proj)
        self.gate_up = LinearMap(mlp.gate_proj, mlp.up_proj)
        self.down = LinearMap(mlp.down_proj)

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], padded, mask: Tensor | None, cache=None) -> Tensor:
        """Hidden states after the layer.

        Args:
            x: [N, H].
            rope: cosines and sines of the tokens' positions, each [N, D].
            padded: where each token stands in [B, T], a `decoder.Padded`.
            mask: [B or 1, 1, T, S], added to the attention's scores; None: causal, for a fused kernel.
            cache: a `decoder.KVCache` that keeps k and v and gives those of earlier tokens.
        """
        qkv = self.qkv(x, norm=self.layer.input_layernorm)  # [N, (GK + 2K) D]
        q, k, v = _Rotate.apply(qkv, *rope, self.heads, padded)  # [B, heads, T, D] each
        if cache is not None:
            k, v = cache.update(self.attention.layer_idx, k, v)
        if q.is_cuda:
            out, _ = sdpa_attention_forward(self.attention, q, k, v, mask, scaling=self.attention.scaling)
            out = out.transpose(1, 2)
        else:
            out = _Attention.apply(q, k, v, mask, self.attention.scaling)  # [B, GK, T, D]
        x = self.o(_Join.apply(out, padded), residual=x)
        return self.down(self.gate_up(x, norm=self.layer.post_attention_layernorm), residual=x, gated=True)


# ---------------------------------------------------------------- linear maps with LoRA


class LinearMap:
    """Linear layers that read the same input, as one: x -> [W1 x, W2 x, ...] + B A x.

    A [R, I] stacks the active adapters' A; B [O, R] holds their scaled B where an adapter meets its layer, and 0
    elsewhere. Both are in what the base computes in; PEFT runs each adapter in float32. Weights that are not quantised
    move into one tensor, of which the layers then hold views.
    """

    def __init__(self, *layers: nn.Module):
        self.layers = layers
        self.bases = [layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers]
        self.out_features = [base.out_features for base in self.bases]
        self.weight, self.bias = None, None  # of all layers, if not quantised
        if all(type(base) is nn.Linear for base in self.bases):
            self.weight, self.bias = (self.join(name) for name in ("weight", "bias"))
        self.key, self.pairs, self.a, self.b = None, [], None, None

    def join(self, name: str) -> Tensor | None:
        """Move the layers' weights or biases into one tensor; the model must be on its device already."""
        parts = [getattr(base, name) for base in self.bases]
        if len(parts) == 1 or parts[0] is None:
            return parts[0]
        joined = torch.cat([part.data for part in parts])
        for part, view in zip(parts, joined.split(self.out_features), strict=True):
            part.data = view
        return joined

    def __call__(
        self, x: Tensor, norm: nn.Module | None = None, gated: bool = False, residual: Tensor | None = None
    ) -> Tensor:
        """[N, O] of norm(x), or of silu(gate) * up where x is [gate, up] and `gated`; `residual` is added."""
        prepare = _Gate if gated else _RMSNorm if norm is not None else _AsItIs
        constants = (norm.weight, norm.variance_epsilon) if norm is not None else ()
        weights = self.stack_adapters(x.dtype)
        return _LinearMap.apply(x, residual, self, prepare, constants, *weights)

    def stack_adapters(self, dtype: torch.dtype) -> list[Tensor]:
        """Make A and B of the active adapters, whose weights [A1, B1, A2, ...] are returned.

        Between passes that train they are made only once: a rollout has a pass for each token. In passes that train
        they are always made anew, as a fused optimizer's step does not show in a weight's version.
        """
        layers = [(i, layer) for i, layer in enumerate(self.layers) if isinstance(layer, LoraLayer)]
        names = layers[0][1].active_adapters if layers and not layers[0][1].disable_adapters else []
        lora = [(i, layer, name) for name in names for i, layer in layers if name in layer.lora_A]
        weights = [w for _, layer, name in lora for w in (layer.lora_A[name].weight, layer.lora_B[name].weight)]
        room = self.room()
        key = (dtype, room, [(w.data_ptr(), w._version) for w in weights])
        if key != self.key or torch.is_grad_enabled():
            self.key = None if torch.is_grad_enabled() else key
            self.pairs, self.a, self.b = [], None, None  # the old ones go first
            if weights:
                like = {"dtype": dtype, "device": weights[0].device}
                self.a = torch.zeros(room, weights[0].shape[1], **like)
                self.b = torch.zeros(sum(self.out_features), room, **like)
            start = 0
            for (i, layer, name), a, b in zip(lora, weights[::2], weights[1::2], strict=True):
                columns = slice(start, start := start + a.shape[0])
                rows = slice(sum(self.out_features[:i]), sum(self.out_features[: i + 1]))
                self.pairs.append((columns, rows, layer.scaling[name]))
                self.a[columns] = a.detach()
                self.b[rows, columns] = b.detach() * layer.scaling[name]
        return weights

    def room(self) -> int:
        """R: that of the first adapter and of the largest other one, whichever are active.

        Each role then goes through products of the same shape, so a fresh policy (B = 0) equals its reference bit for bit.
        """
        ranks = [list(layer.r.values()) for layer in self.layers if isinstance(layer, LoraLayer)]
        return sum(first + max(others, default=0) for first, *others in ranks)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, and the bias if there is one"""
        if self.weight is not None:
            return F.linear(x, self.weight, self.bias)
        out = x.new_empty(len(x), sum(self.out_features))
        for base, part in zip(self.bases, out.split(self.out_features, dim=-1), strict=True):
            part.copy_(base(x))
        return out

    def product_transposed(self, grad: Tensor) -> Tensor:
        """grad W"""
        if self.weight is not None:
            return grad @ self.weight
        from bitsandbytes.functional import dequantize_4bit

        result = None
        for base, part in zip(self.bases, grad.split(self.out_features, dim=-1), strict=True):
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state).to(grad.dtype)  # [O, I]
            result = part @ weight if result is None else result.addmm_(part, weight)
            del weight  # before the next one is made
        return result


class _LinearMap(Function):
    """A `LinearMap` of what `prepare` makes of x. Kept: x and the [N, R] between A and B; `prepare` runs again in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, linear: LinearMap, prepare, constants, *weights) -> Tensor:
        y, kept = prepare.forward(x, *constants)
        out = linear.product(y)
        down = None
        if weights:
            down = y @ linear.a.T  # [N, R]
            out.addmm_(down, linear.b.T)
        if residual is not None:
            out += residual
        ctx.save_for_backward(x, down, kept, linear.a, linear.b)
        ctx.linear, ctx.prepare, ctx.constants, ctx.pairs = linear, prepare, constants, linear.pairs
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, down, kept, a, b = ctx.saved_tensors
        y, *again = ctx.prepare.again(x, kept, *ctx.constants)
        need_weights = ctx.needs_input_grad[5:]
        grad_down = grad @ b if down is not None else None  # [N, R]
        grads = [None] * len(need_weights)
        if any(need_weights):
            # Adapters that train come last, so their rows of A are one block.
            first = next(columns.start for i, (columns, *_) in enumerate(ctx.pairs) if need_weights[2 * i])
            grad_a = (grad_down[:, first : ctx.pairs[-1][0].stop].T @ y).float()
            for i, (columns, rows, scaling) in enumerate(ctx.pairs):
                if need_weights[2 * i]:
                    grads[2 * i] = grad_a[columns.start - first : columns.stop - first]
                    grads[2 * i + 1] = (grad[:, rows].T @ down[:, columns]).float().mul_(scaling)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_y = ctx.linear.product_transposed(grad)
            if down is not None:
                grad_y.addmm_(grad_down, a)
            grad_x = ctx.prepare.backward(grad_y, x, kept, *again, *ctx.constants)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, *grads


# ---------------------------------------------------------------- what a map does to its input first


class _AsItIs:
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, None]:
        return x, None

    @staticmethod
    def again(x: Tensor, kept: None) -> tuple[Tensor, None]:
        return x, None

    @staticmethod
    def backward(grad: Tensor, x: Tensor, kept: None, again: None) -> Tensor:
        return grad


class _RMSNorm:
    """weight * x / rms(x), the division in float32. Kept: 1 / rms(x)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # [N, 1]
        scale = torch.rsqrt(length.square() / x.shape[-1] + eps)
        return weight * (x * scale).to(x.dtype), scale

    @staticmethod
    def again(x: Tensor, scale: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed = x * scale  # float32
        return weight * normed.to(x.dtype), normed

    @staticmethod
    def backward(grad: Tensor, x: Tensor, scale: Tensor, normed: Tensor, weight: Tensor, eps: float) -> Tensor:
        grad = grad.float() * weight.float()
        return grad.addcmul_(normed, (grad * normed).mean(-1, keepdim=True), value=-1).mul_(scale).to(x.dtype)


class _Gate:
    """silu(gate) * up, of x = [gate, up]."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, None]:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up), None

    @staticmethod
    def again(x: Tensor, kept: None) -> tuple[Tensor, Tensor]:
        gate, up = x.chunk(2, dim=-1)
        activated = F.silu(gate)
        return activated * up, activated

    @staticmethod
    def backward(grad: Tensor, x: Tensor, kept: None, activated: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad)], dim=-1)


class Norm(Function):
    """`_RMSNorm` by itself: (x, weight, eps) -> [N, H]; the frozen weight gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _RMSNorm.forward(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        return _RMSNorm.backward(grad, x, scale, x * scale, weight, 0.0), None, None


# ---------------------------------------------------------------- attention


class _Rotate(Function):
    """q, k and v, each [B, heads, T, D], out of [N, (GK + 2K) D]; q and k with rotary position embeddings (2104.09864)."""

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], padded):
        ctx.save_for_backward(cos, sin)
        ctx.split, ctx.padded = [*heads, heads[1]], padded
        turned = _rotate(qkv.view(len(qkv), -1, cos.shape[-1]), cos, sin, sum(heads), 1)  # [N, GK + 2K, D]
        return tuple(part.transpose(1, 2).contiguous() for part in padded.spread(turned).split(ctx.split, dim=2))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        grad = ctx.padded.gather(torch.cat([grad.transpose(1, 2) for grad in grads], dim=2))  # [N, GK + 2K, D]
        return _rotate(grad, cos, sin, sum(ctx.split[:2]), -1).flatten(1), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, sign: int) -> Tensor:
    """x [N, heads and others, D] with each pair (x[i], x[i + D / 2]) of the first `heads` turned by its token's angle.

    `sign` -1 turns it back.
    """
    half, out = x.shape[-1] // 2, torch.empty_like(x)
    first, turned, sin = x[:, :heads], out[:, :heads], sin[:, None]
    torch.mul(first, cos[:, None], out=turned)
    turned[..., :half].addcmul_(first[..., half:], sin[..., half:], value=-sign)
    turned[..., half:].addcmul_(first[..., :half], sin[..., :half], value=sign)
    out[:, heads:] = x[:, heads:]
    return out


class _Join(Function):
    """[N, GK D] of the attention's output [B, GK, T, D]."""

    @staticmethod
    def forward(ctx, out: Tensor, padded) -> Tensor:
        ctx.padded, ctx.heads = padded, out.shape[1]
        return padded.gather(out.transpose(1, 2)).flatten(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.padded.spread(grad.view(len(grad), ctx.heads, -1)).transpose(1, 2), None


class _Attention(Function):
    """softmax(q k^T * scaling + mask) v, with grouped heads. Kept: q, k and v.

    On a CPU torch's fused kernel is up to five times slower than this in bfloat16, and the plain formula keeps two
    matrices of [heads, T, S] a text. On a GPU the fused kernel is the right one.
    """

    @staticmethod
    def weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """[B, K, G x T, S] in query's dtype; the softmax is in float32 inside."""
        b, heads, t, d = query.shape
        scores = query.reshape(b, key.shape[1], -1, d) @ key.transpose(-1, -2)
        scores = scores.view(b, heads, t, -1).mul_(scaling)
        if mask is not None:
            scores.add_(mask)
        return scores.softmax(-1).view(b, key.shape[1], -1, key.shape[2])

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        return (_Attention.weights(query, key, mask, scaling) @ value).view_as(query)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, mask = ctx.saved_tensors
        weights = _Attention.weights(query, key, mask, ctx.scaling)
        grad = grad.reshape(*weights.shape[:3], -1)
        grad_scores = grad @ value.transpose(-1, -2)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_scores, weights, -1, grad_scores.dtype)
        grad_scores.mul_(ctx.scaling)
        grad_query = (grad_scores @ key).view_as(query)
        grad_key = grad_scores.transpose(-1, -2) @ query.reshape(*weights.shape[:3], -1)
        return grad_query, grad_key, weights.transpose(-1, -2) @ grad, None, None
