"""Attention for texts that lie end to end: they are padded only for the product of q and k.

Shapes: B texts, T tokens of the longest, S tokens attended to, N tokens of all texts, D features a
head, G query heads to each of K key heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rlhf.engine.linear_maps import RMSNorm


class NormHeads(Function):
    """`RMSNorm` on each head of q and k in [N, (GK + 2K) D]; v stays as it is.

    The frozen weights [D] get no gradient.
    """

    @staticmethod
    def forward(
        ctx, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, heads: tuple[int, int]
    ) -> Tensor:
        parts = qkv.view(len(qkv), -1, len(q_weight)).split([*heads, heads[1]], dim=1)
        q, q_scale = RMSNorm.forward(parts[0], q_weight, eps)
        k, k_scale = RMSNorm.forward(parts[1], k_weight, eps)
        ctx.save_for_backward(qkv, q_weight, k_weight, q_scale, k_scale)
        ctx.heads = heads
        return torch.cat([q, k, parts[2]], dim=1).flatten(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        qkv, q_weight, k_weight, q_scale, k_scale = ctx.saved_tensors
        split = [*ctx.heads, ctx.heads[1]]
        parts = qkv.view(len(qkv), -1, len(q_weight)).split(split, dim=1)
        grads = list(grad.view(len(grad), -1, len(q_weight)).split(split, dim=1))
        for i, (weight, scale) in enumerate(((q_weight, q_scale), (k_weight, k_scale))):
            grads[i] = RMSNorm.backward(grads[i], parts[i], scale, parts[i] * scale, weight, 0.0)
        return torch.cat(grads, dim=1).flatten(1), None, None, None, None


class Rotate(Function):
    """q, k and v, each [B, heads, T, D], from [N, (GK + 2K) D].

    q and k get rotary position embeddings (2104.09864).
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int], padded):
        ctx.save_for_backward(cos, sin)
        ctx.split = [*heads, heads[1]]
        ctx.padded = padded
        # [N, GK + 2K, D]
        turned = _rotate(qkv.view(len(qkv), -1, cos.shape[-1]), cos, sin, sum(heads), 1)
        return tuple(
            part.transpose(1, 2).contiguous()
            for part in padded.spread(turned).split(ctx.split, dim=2)
        )

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        # [N, GK + 2K, D]
        grad = ctx.padded.gather(torch.cat([grad.transpose(1, 2) for grad in grads], dim=2))
        return _rotate(grad, cos, sin, sum(ctx.split[:2]), -1).flatten(1), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, heads: int, sign: int) -> Tensor:
    """Rotate each pair (x[i], x[i + D / 2]) of the first `heads` heads of x [N, all heads, D].

    With `sign` -1 they are rotated back.
    """
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    first = x[:, :heads]
    turned = out[:, :heads]
    sin = sin[:, None]
    torch.mul(first, cos[:, None], out=turned)
    turned[..., :half].addcmul_(first[..., half:], sin[..., half:], value=-sign)
    turned[..., half:].addcmul_(first[..., :half], sin[..., :half], value=sign)
    out[:, heads:] = x[:, heads:]
    return out


class Join(Function):
    """The attention's output [B, GK, T, D] end to end: [N, GK D]."""

    @staticmethod
    def forward(ctx, out: Tensor, padded) -> Tensor:
        ctx.padded = padded
        ctx.heads = out.shape[1]
        return padded.gather(out.transpose(1, 2)).flatten(1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.padded.spread(grad.view(len(grad), ctx.heads, -1)).transpose(1, 2), None


def one_query_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Attention [B, GK D] of one token per text, q [B, GK, D], to k and v [B, K, S, D].

    Without gradients.
    """
    attend = _attend_by_products if query.is_cuda else _attend_fused
    return attend(query, key, value, mask, scaling)


def _attend_by_products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """The G query heads of a key head are rows of one product, so that keys are not repeated."""
    rows, kv_heads, _, d = key.shape
    # Scaled before the product, as the sum could overflow float16.
    scores = (query * scaling).reshape(rows, kv_heads, -1, d) @ key.transpose(-1, -2)
    return (scores.add_(mask).softmax(-1) @ value).view(rows, -1)


def _attend_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float
) -> Tensor:
    """Torch's own kernel, which takes the G query heads of a key head for G tokens of one head.

    As heads of one token each they would take up to six times as long on a CPU in bfloat16.
    """
    rows, kv_heads, _, d = key.shape
    queries = query.view(rows, kv_heads, -1, d)
    out = F.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(rows, -1)


class Attention(Function):
    """softmax(q k^T * scaling + mask) v, with grouped heads. Keeps q, k and v for backward.

    On a CPU, torch's fused kernel is up to five times slower in bfloat16, and autograd would keep
    two matrices of [heads, T, S] per text. On a GPU, use the fused kernel.
    """

    @staticmethod
    def weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """[B, K, G x T, S] in query's dtype; inside, the softmax computes in float32."""
        b, heads, t, d = query.shape
        scores = query.reshape(b, key.shape[1], -1, d) @ key.transpose(-1, -2)
        scores = scores.view(b, heads, t, -1).mul_(scaling)
        if mask is not None:
            scores.add_(mask)
        return scores.softmax(-1).view(b, key.shape[1], -1, key.shape[2])

    @staticmethod
    def forward(
        ctx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scaling = scaling
        return (Attention.weights(query, key, mask, scaling) @ value).view_as(query)

    @staticmethod
    def backward(ctx, grad: Tensor):
        query, key, value, mask = ctx.saved_tensors
        weights = Attention.weights(query, key, mask, ctx.scaling)
        grad = grad.reshape(*weights.shape[:3], -1)
        grad_scores = grad @ value.transpose(-1, -2)
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_scores, weights, -1, grad_scores.dtype
        )
        grad_scores.mul_(ctx.scaling)
        grad_query = (grad_scores @ key).view_as(query)
        grad_key = grad_scores.transpose(-1, -2) @ query.reshape(*weights.shape[:3], -1)
        return grad_query, grad_key, weights.transpose(-1, -2) @ grad, None, None
