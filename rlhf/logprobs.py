"""Log-probabilities of chosen tokens straight from hidden states, without ever holding their logits."""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23  # logits alive at a time: 32 MiB in float32


class _ChosenLogprobs(torch.autograd.Function):
    """log softmax(hidden W^T / T)[token], and its gradient for `hidden`, in one pass over chunks of tokens.

    Each output is one number, so its gradient for `hidden` is one vector, (W[token] - softmax W) / T. It is computed
    where the softmax is at hand, in the forward pass; backward is a multiplication. The frozen W gets no gradient.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, need_grad: bool):
        rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
        logprobs = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        entropy, gradient = torch.empty_like(logprobs), torch.empty_like(hidden) if need_grad else None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            log_softmax = matmul_fp32(hidden[part], weight.T).div_(temperature)  # [rows, V]
            log_softmax -= log_softmax.logsumexp(-1, keepdim=True)
            logprobs[part] = log_softmax.gather(-1, tokens[part, None]).squeeze(-1)
            if need_grad:
                mean_weight = matmul_fp32(log_softmax.exp_().to(weight.dtype), weight)  # [rows, H]
                gradient[part] = (weight[tokens[part]] - mean_weight) / temperature
            else:
                entropy[part] = -(log_softmax.exp() * log_softmax).sum(-1)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs: Tensor, _):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_logprobs[:, None]).to(gradient.dtype), None, None, None, None


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32; on a GPU straight from the 16-bit product's accumulator, unrounded."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def chosen_logprobs(hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each chosen token at the sampling temperature, and the distribution's entropy.

    Args:
        hidden: [N, H], final hidden states of the positions before the tokens.
        weight: [V, H], the frozen output embedding.
        tokens: [N].
    Returns:
        log-probabilities [N] and entropies [N] in nats, float32. The entropies are filled in only where no gradient is
        being recorded, as only reports need them.
    """
    need_grad = torch.is_grad_enabled() and hidden.requires_grad
    return _ChosenLogprobs.apply(hidden, weight, tokens, temperature, need_grad)
