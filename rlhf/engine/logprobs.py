"""Log-probabilities of chosen tokens from hidden states, one chunk of logits at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

CPU_BLOCK = 8  # rows in float32 at a time on a CPU, so that they stay in the cache


def chunk_elements(on_card: bool) -> int:
    """Logits held at a time. Each chunk reads the head once; 256 tokens keep a card busy."""
    return 1 << 25 if on_card else 1 << 23


class TokenLogprobs(NamedTuple):
    """What is known about N chosen tokens, in float32."""

    logprobs: Tensor  # [N] nats
    entropy: Tensor | None  # [N] nats, of the whole distribution
    is_top1: Tensor | None  # [N] 1 where no other token is likelier


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / T)[token] and its gradient for `hidden`, in one pass over chunks.

    Each output is one number, so its gradient for `hidden` is one vector: (W[token] - softmax W) /
    T. It is computed in the forward pass, where the softmax is at hand; backward only multiplies.
    The frozen W gets no gradient.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        tokens: Tensor,
        temperature: float,
        statistics: bool,
        need_grad: bool,
    ):
        rows = max(1, chunk_elements(hidden.is_cuda) // weight.shape[0])
        block = rows if hidden.is_cuda else CPU_BLOCK
        logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        entropy, is_top1 = (torch.empty_like(logprobs) if statistics else None for _ in range(2))
        gradient = torch.empty_like(hidden) if need_grad else None
        for start in range(0, hidden.shape[0], rows):
            # [rows, V], in float32 on a GPU
            logits = matmul(hidden[start : start + rows], weight.T)
            for row in range(0, logits.shape[0], block):
                part = slice(start + row, min(start + row + block, start + rows, hidden.shape[0]))
                here = logits[row : row + block]  # [block, V]
                scaled = here.float().div_(temperature)
                softmax = scaled.softmax(-1)
                # The logsumexp from the likeliest token, as its probability is never tiny.
                top1 = scaled.amax(-1)
                logsumexp = top1 - softmax.amax(-1).log()
                chosen = scaled.gather(-1, tokens[part, None]).squeeze(-1)
                logprobs[part] = chosen - logsumexp
                if statistics:
                    is_top1[part] = chosen == top1
                    # A product, so that there is no third tensor of this size.
                    mean = torch.bmm(softmax[:, None], scaled[:, :, None])
                    entropy[part] = logsumexp - mean.flatten()
                if need_grad:
                    here.copy_(softmax)
            if need_grad:
                mean_weight = matmul(logits.to(weight.dtype), weight)  # [rows, H]
                part = slice(start, start + rows)
                gradient[part] = (weight[tokens[part]] - mean_weight) / temperature
        ctx.save_for_backward(gradient)
        if statistics:
            ctx.mark_non_differentiable(entropy, is_top1)
        return logprobs, entropy, is_top1

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_logprobs[:, None]).to(gradient.dtype), None, None, None, None, None


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b. On a GPU, a 16-bit product is returned in float32, unrounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def logprobs_of(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, statistics: bool = False
) -> TokenLogprobs:
    """Log-probability of each chosen token at the sampling temperature.

    Args:
        hidden: [N, H], final hidden states of the positions before the tokens.
        weight: [V, H], the frozen output embedding.
        tokens: [N].
        statistics: whether to compute `entropy` and `is_top1` too.
    Returns:
        a `TokenLogprobs`; only the log-probabilities have a gradient, for `hidden`.
    """
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    return TokenLogprobs(
        *_ChosenLogprobs.apply(hidden, weight, tokens, temperature, statistics, need_grad)
    )
