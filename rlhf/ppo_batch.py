"""The unit that goes through the model: a few rollouts of like length, and what each role says of them.

Shapes: b rows, T tokens of the longest text, R sampled tokens of the longest response, H hidden size.
"""

from dataclasses import dataclass

from rlhf.data import PromptFormat
from rlhf.generation import Response
from rlhf.modeling import pad_right

import torch
from torch import Tensor


@dataclass
class MicroBatch:
    """Responses of like length that go through the model together, in every pass of an update.

    Texts are prompt + response + EOS: a response that was cut is scored as if it had ended there. `actions` are the
    tokens that were sampled, with the one that ended the text; `positions` is where the model stood when it chose them.
    """

    rows: list[int]  # which of the update's responses
    input_ids: Tensor  # [b, T]
    last: Tensor  # [b] index of EOS, where the score is read
    positions: Tensor  # [b, R]
    actions: Tensor  # [b, R]
    response_mask: Tensor  # [b, R] True at sampled tokens
    ended: Tensor  # [b] True where the policy itself wrote EOS
    # Filled in by measure():
    lower: Tensor = None  # [b, T, H] hidden states below the role adapters
    scores: Tensor = None  # [b] what the reward model says
    logprobs: Tensor = None  # [b, R] under the policy that sampled
    ref_logprobs: Tensor = None  # [b, R]
    entropy: Tensor = None  # [b, R] nats
    values: Tensor = None  # [b, R] expected centred score from here on
    # Filled in by set_advantages():
    advantages: Tensor = None  # [b, R]
    returns: Tensor = None  # [b, R]


def make_micro_batches(
    prompts: list[list[int]], responses: list[Response], form: PromptFormat, size: int, device: torch.device
) -> list[MicroBatch]:
    """Sort by length, so that little is padded, and cut into micro-batches of `size`."""
    texts = [p + r.text_ids + [form.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    batch = []
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        starts = torch.tensor([len(prompts[i]) - 1 for i in rows], device=device)
        lengths = torch.tensor([len(responses[i].ids) for i in rows], device=device)
        steps = torch.arange(int(lengths.max()), device=device)
        response_mask = steps < lengths[:, None]
        batch.append(
            MicroBatch(
                rows=rows,
                input_ids=pad_right([texts[i] for i in rows], form.pad_token_id, device),
                last=torch.tensor([len(texts[i]) - 1 for i in rows], device=device),
                positions=(starts[:, None] + steps) * response_mask,
                actions=pad_right([responses[i].ids for i in rows], form.pad_token_id, device),
                response_mask=response_mask,
                ended=torch.tensor([responses[i].ended_by == "eos" for i in rows], device=device),
            )
        )
    return batch


def mean_kl(batch: list[MicroBatch]) -> float:
    """Nats a response."""
    return torch.cat([(m.logprobs - m.ref_logprobs).sum(1) for m in batch]).mean().item()
