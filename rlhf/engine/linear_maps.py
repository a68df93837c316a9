"""Linear maps that read the same input as one product, and a role's LoRA adapters on them as one.

A map also does what comes right before it, a norm or the MLP's gate. For backward it keeps only
what is not cheap to compute again.

Shapes: N tokens of all texts, I and O features in and out, R summed rank of a role's adapters.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd import Function

from rlhf.runs.errors import UserError


@dataclass(frozen=True)
class Piece:
    """One adapter on one layer, and where it stands in a `Stack`."""

    a: nn.Parameter  # [r, I]
    b: nn.Parameter  # [O of the layer, r]
    scaling: float
    columns: slice  # the adapter's r of the stack's R
    rows: slice  # the layer's part of the stack's O


class Stack:
    """All adapters of a role on a `LinearMap` as one: A [R, I] and B [O, R], in the base's dtype.

    B holds each adapter's scaled B where its columns meet its layer's rows, and 0 elsewhere. Both
    tensors are made once and keep their addresses. Call `write` after every change to the adapters;
    their own weights are float32.
    """

    def __init__(self, pieces: list[Piece], rank: int, out_features: int, dtype: torch.dtype):
        self.pieces = pieces
        self.weights = [weight for piece in pieces for weight in (piece.a, piece.b)]
        like = {"dtype": dtype, "device": pieces[0].a.device}
        self.a = torch.zeros(rank, pieces[0].a.shape[1], **like)
        self.b = torch.zeros(out_features, rank, **like)
        self.write()

    @torch.no_grad()
    def write(self, trained_only: bool = False) -> None:
        """Copy the adapters' weights, or only the trained ones, to their places."""
        for piece in self.pieces:
            if piece.a.requires_grad or not trained_only:
                self.a[piece.columns] = piece.a
                torch.mul(piece.b, piece.scaling, out=self.b[piece.rows, piece.columns])


class LinearMap:
    """Linear layers that read the same input, as one: x -> [W1 x, W2 x, ...] + B A x, by role.

    (PEFT runs each adapter separately, in float32.) Weights that are not quantised move into one
    tensor, and the layers then hold views of it.
    """

    def __init__(self, *layers: nn.Module):
        self.layers = layers
        self.bases = [
            layer.base_layer if isinstance(layer, LoraLayer) else layer for layer in layers
        ]
        self.out_features = [base.out_features for base in self.bases]
        self.weight: Tensor | None = None  # of all layers, if they are not quantised
        self.quantised: Quantised | None = None  # otherwise
        self.bias = self.join("bias")
        if all(type(base) is nn.Linear for base in self.bases):
            self.weight = self.join("weight")
        else:
            self.quantised = Quantised(self.bases)
        self.stacks: dict[str, Stack | None] = {}  # of each role; None: no adapter

    def stack(self, roles: dict[str, list[str]], dtype: torch.dtype) -> None:
        """Build the stacks of all roles. Roles that have the same adapters here share one.

        All stacks get the largest rank R. Then every role goes through products of the same shape,
        and a fresh policy (B = 0) equals its reference bit for bit.

        Args:
            roles: the names of each role's PEFT adapters, in the order of the stack.
        """
        self.stacks.clear()
        self.dtype = dtype
        pieces = {role: self.pieces(adapters) for role, adapters in roles.items()}
        rank = max((part[-1].columns.stop for part in pieces.values() if part), default=0)
        made: dict[tuple[int, ...], Stack] = {}
        for role, part in pieces.items():
            key = tuple(id(piece.a) for piece in part)
            if part and key not in made:
                made[key] = Stack(part, rank, sum(self.out_features), dtype)
            self.stacks[role] = made.get(key)

    def pieces(self, adapters: list[str]) -> list[Piece]:
        """The adapters of these names on the layers, side by side."""
        pieces: list[Piece] = []
        column = 0
        for name in adapters:
            row = 0
            for layer, features in zip(self.layers, self.out_features, strict=True):
                if isinstance(layer, LoraLayer) and name in layer.lora_A:
                    a = layer.lora_A[name].weight
                    b = layer.lora_B[name].weight
                    columns = slice(column, column + len(a))
                    rows = slice(row, row + features)
                    pieces.append(Piece(a, b, layer.scaling[name], columns, rows))
                    column += len(a)
                row += features
        return pieces

    def join(self, name: str) -> Tensor | None:
        """Move the layers' weights or biases into one tensor. The model must be on its device."""
        parts = [getattr(base, name) for base in self.bases]
        if len(parts) == 1 or parts[0] is None:
            return parts[0]
        joined = torch.cat([part.data for part in parts])
        for part, view in zip(parts, joined.split(self.out_features), strict=True):
            part.data = view
        return joined

    def __call__(
        self,
        x: Tensor,
        role: str,
        norm: nn.Module | None = None,
        gated: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """The map [N, O] of norm(x), or of silu(gate) * up if `gated`, plus `residual`.

        With `gated`, x holds gate and up.
        """
        prepare = _Gate if gated else RMSNorm if norm is not None else _AsItIs
        constants = (norm.weight, norm.variance_epsilon) if norm is not None else ()
        stack = self.stacks[role]
        weights = stack.weights if stack else ()
        return _LinearMap.apply(x, residual, self, stack, prepare, constants, *weights)

    def apply(self, x: Tensor, role: str, residual: Tensor | None = None) -> Tensor:
        """The map [N, O] of x as it is, without gradients, in few operations."""
        out = self.product(x)
        stack = self.stacks[role]
        if stack:
            out.addmm_(x @ stack.a.T, stack.b.T)
        return out if residual is None else out.add_(residual)

    def product(self, x: Tensor) -> Tensor:
        """x W^T, plus the bias if there is one."""
        if self.quantised:
            return self.quantised.product(x, self.bias)
        return F.linear(x, self.weight, self.bias)

    def product_transposed(self, grad: Tensor) -> Tensor:
        """grad W."""
        return grad @ self.whole_weight(grad.dtype)

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        """[O, I], dequantised if necessary."""
        return self.quantised.dequantise(dtype) if self.quantised else self.weight.to(dtype)


class Quantised:
    """The NF4 weights of linear layers that read the same input, as one [O, I].

    Then a product is one kernel, and stays bitsandbytes' fused one for more rows. The scales are
    quantised too, with an offset for each weight. So if there are several weights, their scales go
    back to float32, which is exactly what they are dequantised to anyway. The layers then hold
    views.
    """

    def __init__(self, bases: list[nn.Module]):
        states = [base.weight.quant_state for base in bases]
        self.data = bases[0].weight.data
        self.state = states[0]
        if len(bases) == 1:
            return
        from bitsandbytes.functional import QuantState

        if any(math.prod(state.shape) % state.blocksize for state in states):
            raise UserError(
                "in 4 bit a weight must have a multiple of 64 numbers: add --no-load-in-4bit"
            )
        self.data = torch.cat([base.weight.data for base in bases])
        scales = torch.cat([self.scales(state) for state in states])
        kept = {
            "blocksize": self.state.blocksize,
            "code": self.state.code,
            "quant_type": self.state.quant_type,
        }
        kept["dtype"] = self.state.dtype
        start = first_scale = 0
        for base, state in zip(bases, states, strict=True):
            end = start + len(base.weight.data)
            last_scale = first_scale + len(state.absmax)
            base.weight.data = self.data[start:end]
            state = QuantState(scales[first_scale:last_scale], shape=state.shape, **kept)
            base.weight.quant_state = base.quant_state = state
            start = end
            first_scale = last_scale
        shape = torch.Size([sum(state.shape[0] for state in states), states[0].shape[1]])
        self.state = QuantState(scales, shape=shape, **kept)

    @staticmethod
    def scales(state) -> Tensor:
        """The float32 scale of each block of a weight, computed as `dequantize_4bit` does."""
        from bitsandbytes.functional import dequantize_blockwise

        if not state.nested:
            return state.absmax
        return (dequantize_blockwise(state.absmax, state.state2) + state.offset).float()

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        from bitsandbytes import matmul_4bit

        return matmul_4bit(x, self.data, quant_state=self.state, bias=bias)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I]."""
        from bitsandbytes.functional import dequantize_4bit

        state = copy.copy(self.state)
        state.dtype = dtype
        return dequantize_4bit(self.data, state)


class MergedMap(LinearMap):
    """A `LinearMap` with a role's adapters merged into its own weight, to sample from.

    The weight keeps its address. Call `write` after every change to the adapters.
    """

    def __init__(self, linear: LinearMap):
        self.linear = linear
        self.bias = linear.bias
        self.quantised = None
        self.weight = torch.empty_like(linear.whole_weight(linear.dtype))

    @torch.no_grad()
    def write(self, role: str) -> None:
        """base + adapters, summed in float32 and rounded once, so that a small policy survives."""
        merged = self.linear.whole_weight(torch.float32)
        stack = self.linear.stacks[role]
        if stack and merged is self.linear.weight:  # float32 itself
            merged = merged.clone()
        for piece in stack.pieces if stack else ():
            merged[piece.rows].addmm_(piece.b, piece.a, alpha=piece.scaling)
        self.weight.copy_(merged)
        self.stacks = {role: None}  # there is nothing left to add


def rms_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """`norm` of x, without gradients: one kernel on a card. It rounds once, Llama's own twice."""
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


class _LinearMap(Function):
    """A `LinearMap` of `prepare`(x). Keeps x and the [N, R] after A; backward prepares again.

    Gradients go to `weights`, which `stack` is made of.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        residual: Tensor | None,
        linear: LinearMap,
        stack: Stack | None,
        prepare,
        constants,
        *weights,
    ) -> Tensor:
        y, kept = prepare.forward(x, *constants)
        out = linear.product(y)
        a = None
        b = None
        down = None
        if stack:
            a = stack.a
            b = stack.b
            down = y @ a.T  # [N, R]
            out.addmm_(down, b.T)
        if residual is not None:
            out += residual
        ctx.save_for_backward(x, down, kept, a, b)
        ctx.linear = linear
        ctx.prepare = prepare
        ctx.constants = constants
        ctx.pieces = stack.pieces if stack else []
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, down, kept, a, b = ctx.saved_tensors
        y, *again = ctx.prepare.again(x, kept, *ctx.constants)
        need_weights = ctx.needs_input_grad[6:]
        grad_down = grad @ b if down is not None else None  # [N, R]
        grads = [None] * len(need_weights)
        if any(need_weights):
            # Adapters that train come last, so their rows of A form one block.
            first = next(
                piece.columns.start for i, piece in enumerate(ctx.pieces) if need_weights[2 * i]
            )
            grad_a = (grad_down[:, first : ctx.pieces[-1].columns.stop].T @ y).float()
            for i, piece in enumerate(ctx.pieces):
                if need_weights[2 * i]:
                    columns = piece.columns
                    grads[2 * i] = grad_a[columns.start - first : columns.stop - first]
                    grads[2 * i + 1] = (
                        (grad[:, piece.rows].T @ down[:, columns]).float().mul_(piece.scaling)
                    )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_y = ctx.linear.product_transposed(grad)
            if down is not None:
                grad_y.addmm_(grad_down, a)
            grad_x = ctx.prepare.backward(grad_y, x, kept, *again, *ctx.constants)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None, *grads


# ---------------------------------------------------------------- what a map does to its input


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


class RMSNorm:
    """weight * x / rms(x), divided in float32. Keeps 1 / rms(x)."""

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
    def backward(
        grad: Tensor, x: Tensor, scale: Tensor, normed: Tensor, weight: Tensor, eps: float
    ) -> Tensor:
        grad = grad.float() * weight.float()
        return (
            grad.addcmul_(normed, (grad * normed).mean(-1, keepdim=True), value=-1)
            .mul_(scale)
            .to(x.dtype)
        )


class _Gate:
    """silu(gate) * up, for x = [gate, up]."""

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
        return torch.cat(
            [torch.ops.aten.silu_backward(grad * up, gate), activated.mul_(grad)], dim=-1
        )


class Norm(Function):
    """`RMSNorm` alone: (x, weight, eps) -> [N, H]. The frozen weight gets no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = RMSNorm.forward(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, scale, weight = ctx.saved_tensors
        return RMSNorm.backward(grad, x, scale, x * scale, weight, 0.0), None, None
