"""The unit that goes through the model: a few rollouts of like length, and what each role says of them.

Shapes: b rows, N tokens of their texts, R sampled tokens of the longest response, H hidden size.
"""

from dataclasses import dataclass

from rlhf.data import PromptFormat
from rlhf.decoder import Texts, lay_out
from rlhf.generation import Response
from rlhf.modeling import by_length, pad_right

import torch
from torch import Tensor


@dataclass
class MicroBatch:
    """Responses of like length that go through the model together, in every pass of an update.

    Texts are prompt + response + EOS: a response that was cut is scored as if it had ended there. `actions` are the
    tokens that were sampled, with the one that ended the text; `positions` is where the model stood when it chose them.
    """

    rows: list[int]  # which of the update's responses
    texts: Texts  # the score is read at EOS, their last token
    positions: Tensor  # [b, R] of N
    actions: Tensor  # [b, R]
    response_mask: Tensor  # [b, R] True at sampled tokens
    ended: Tensor  # [b] True where the policy itself wrote EOS
    # Filled in by measure():
    lower: Tensor = None  # [N, H] hidden states below the role adapters
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
    """Sort by length, so that attention pads little, and cut into micro-batches of `size`."""
    texts = [p + r.text_ids + [form.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    batch = []
    for rows in by_length(list(map(len, texts)), size):
        laid_out = lay_out([texts[i] for i in rows], device)
        ends = laid_out.last.tolist()
        starts = torch.tensor(
            [end - len(texts[i]) + len(prompts[i]) for i, end in zip(rows, ends, strict=True)], device=device
        )  # [b] the last token of each prompt
        lengths = torch.tensor([len(responses[i].ids) for i in rows], device=device)
        steps = torch.arange(int(lengths.max()), device=device)
        response_mask = steps < lengths[:, None]
        batch.append(
            MicroBatch(
                rows=rows,
                texts=laid_out,
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
