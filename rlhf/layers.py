"""A Llama-like decoder's layers, with less kept for backward and fewer steps.

The weights are frozen but for LoRA, and memory, not arithmetic, decides what fits a card. So each function here keeps
its inputs and computes the rest again, which is cheap: no float32 copy of a norm's input, no matrix of attention
weights, no activated gate. Results are those of transformers' and PEFT's own layers; tests hold both side by side.

Shapes: B texts, T tokens, S tokens attended to, N = B x T, I and O features in and out, R summed rank of the active
adapters, D features a head.
"""

import types

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import ACT2FN
from transformers.masking_utils import eager_mask

SiLU = type(ACT2FN["silu"])  # the class that transformers gives `hidden_act: silu`


def lean_layers(model: nn.Module) -> None:
    """Give the LoRA layers, the norms and the MLPs of `model` the forward passes of this module, in place.

    For plain LoRA without dropout. A norm or MLP of another form than Llama's is left alone.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = types.MethodType(_lora_forward, module)
            module.stack = None
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = types.MethodType(_norm_forward, module)
        elif type(module).__name__.endswith("MLP") and isinstance(getattr(module, "act_fn", None), SiLU):
            module.forward = types.MethodType(_mlp_forward, module)


# ---------------------------------------------------------------- LoRA


def _lora_forward(self: LoraLayer, x: Tensor) -> Tensor:
    """All active adapters as one, [A1; A2] and [B1 B2], in what the base computes in; PEFT runs each in float32."""
    out = self.base_layer(x)
    names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
    if not names:
        return out
    weights = [weight for name in names for weight in (self.lora_A[name].weight, self.lora_B[name].weight)]
    a, b = _stack(self, names, weights, out.dtype)
    return _AddLora.apply(out, x.to(out.dtype), a, b, [self.scaling[name] for name in names], *weights)


def _stack(
    layer: LoraLayer, names: list[str], weights: list[nn.Parameter], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[A1; A2] [R, I] and [s1 B1, s2 B2] [O, R] in `dtype`.

    Between passes that train, and until a weight or the choice of adapters changes, they are made only once: a rollout
    has a pass for each token.
    """
    key = (names, dtype, [(weight.data_ptr(), weight._version) for weight in weights])
    if layer.stack is None or layer.stack[0] != key or torch.is_grad_enabled():
        with torch.no_grad():
            a = torch.cat([weight.to(dtype) for weight in weights[::2]])
            b = torch.cat([(weights[2 * i + 1] * layer.scaling[name]).to(dtype) for i, name in enumerate(names)], dim=1)
        layer.stack = None if torch.is_grad_enabled() else (key, a, b)
        return a, b
    return layer.stack[1:]


class _AddLora(Function):
    """out + x A^T B^T, written into `out`; gradients go to the float32 weights that A and B were made of.

    Kept: the layer's input, which the layers beside it share, and the [N, R] between A and B.
    """

    @staticmethod
    def forward(ctx, out: Tensor, x: Tensor, a: Tensor, b: Tensor, scalings: list[float], *weights: Tensor) -> Tensor:
        down = x.flatten(0, -2) @ a.T  # [N, R]
        out.view(-1, out.shape[-1]).addmm_(down, b.T)
        ctx.mark_dirty(out)
        ctx.save_for_backward(x, down, a, b)
        ctx.scalings, ctx.ranks = scalings, [weight.shape[0] for weight in weights[::2]]
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, down, a, b = ctx.saved_tensors
        flat, x_flat = grad.flatten(0, -2), x.flatten(0, -2)
        grad_down = flat @ b  # [N, R]
        grad_x = (grad_down @ a).view_as(x) if ctx.needs_input_grad[1] else None
        grads: list[Tensor | None] = []
        start = 0
        for i, (rank, scaling) in enumerate(zip(ctx.ranks, ctx.scalings, strict=True)):
            part = slice(start, start + rank)
            need_a, need_b = ctx.needs_input_grad[5 + 2 * i : 7 + 2 * i]
            grads.append((grad_down[:, part].T @ x_flat).float() if need_a else None)
            grads.append((flat.T @ down[:, part]).float().mul_(scaling) if need_b else None)
            start += rank
        return grad, grad_x, None, None, None, *grads


# ---------------------------------------------------------------- norm and MLP


def _norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


class _RMSNorm(Function):
    """weight * x / rms(x), in float32 inside; the frozen weight gets no gradient. Kept: x."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x32 * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad = grad.float() * weight.float()
        grad = grad.addcmul_(normed, (grad * normed).mean(-1, keepdim=True), value=-1)
        return grad.mul_(scale).to(x.dtype), None, None


def _mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(_SiluMul.apply(self.gate_proj(x), self.up_proj(x)))


class _SiluMul(Function):
    """silu(gate) * up. Kept: gate and up."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)


# ---------------------------------------------------------------- attention


def _attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


class _Attention(Function):
    """softmax(q k^T * scaling + mask) v, with grouped heads. Kept: q, k and v.

    On a CPU torch's fused kernel is up to five times slower than this in bfloat16, and the plain formula keeps two
    matrices of [heads, T, S] a text. On a GPU the fused kernel is the right one.
    """

    @staticmethod
    def weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """[B, K, G x T, S] in query's dtype: K key heads, G query heads to each."""
        b, heads, t, d = query.shape
        scores = query.reshape(b, key.shape[1], -1, d) @ key.transpose(-1, -2)
        scores = scores.view(b, heads, t, -1).mul_(scaling)
        if mask is not None:
            scores.add_(mask)
        return scores.softmax(-1, dtype=torch.float32).to(query.dtype).view(b, key.shape[1], -1, key.shape[2])

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


CPU_ATTENTION = "lean"  # what to pass as `attn_implementation` on a CPU
AttentionInterface.register(CPU_ATTENTION, _attention_forward)
AttentionMaskInterface.register(CPU_ATTENTION, eager_mask)
