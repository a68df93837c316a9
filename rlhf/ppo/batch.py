"""An update's episodes as they go through the model, and what each role says of them.

Texts and sampled tokens lie end to end, so passes know no padding. `by_response` pads for the
formulas.

Shapes: b episodes, N tokens of their texts, n sampled tokens of all of them, R of the longest
response, H hidden size.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlhf.data.format import PromptFormat
from rlhf.engine.decoder import Padded, Texts, lay_out
from rlhf.engine.generation import Response
from rlhf.engine.micro_batches import cut_by_tokens
from rlhf.engine.roles import SharedBase
from rlhf.runs.errors import UserError
from rlhf.runs.processes import moments, share, sum_numbers

T = TypeVar("T")
MEASURED = ("logprobs", "ref_logprobs", "values", "scores")


class NotFinite(UserError):
    """A number that is not finite, which ends PPO. `State` adds the update to the message."""


@dataclass(frozen=True)
class MicroBatch:
    """Neighbours in a `Batch`, laid out to go through the model together."""

    texts: Texts  # the score is read at the last token of each, EOS
    positions: Tensor  # [n] of N, the token before each sampled one
    actions: Tensor  # [n] the sampled tokens
    tokens: slice  # its part of the batch's n
    text_tokens: slice  # its part of the batch's N


@dataclass(frozen=True)
class Batch:
    """This process's episodes of an update, in the order in which every pass reads them.

    The order is by minibatch, and within one by length. Texts are prompt + response + EOS: a
    response that was cut is scored as if it had ended there. The sampled tokens include the one
    that ended the response.
    """

    rows: list[int]  # which of the update's episodes they are
    minibatches: list[slice]  # of `rows`
    prompts: list[list[int]]
    texts: list[list[int]]
    responses: list[Response]
    device: torch.device
    # by tokens of a micro-batch, so that each is made once
    laid_out: dict[int, list[list[MicroBatch]]] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.texts), default=0)

    @property
    def ended(self) -> Tensor:
        """[b] True where the policy itself wrote EOS."""
        return torch.tensor([response.ended_by == "eos" for response in self.responses])

    @property
    def response_lengths(self) -> list[int]:
        """[b] the number of sampled tokens."""
        return [len(response.ids) for response in self.responses]

    @property
    def response_mask(self) -> Tensor:
        """[b, R] True at sampled tokens."""
        return self.by_response(torch.ones(sum(self.response_lengths), dtype=torch.bool))

    def by_response(self, tokens: Tensor) -> Tensor:
        """One number per sampled token [n] as [b, R], with 0 at padding; on the CPU."""
        return Padded(self.response_lengths, tokens.device).spread(tokens)

    def end_to_end(self, by_response: Tensor) -> Tensor:
        """[b, R] as one number per sampled token [n]."""
        return Padded(self.response_lengths, by_response.device).gather(by_response)

    def micro_batches(self, tokens: int) -> list[list[MicroBatch]]:
        """Each minibatch's micro-batches of up to `tokens` tokens, padding included."""
        if tokens not in self.laid_out:
            self.laid_out[tokens] = [self.cut(rows, tokens) for rows in self.minibatches]
        return self.laid_out[tokens]

    def cut(self, rows: slice, tokens: int) -> list[MicroBatch]:
        # The parts are in order, as the texts are sorted already.
        parts = cut_by_tokens([len(text) for text in self.texts[rows]], tokens)
        return [
            self.lay_out(slice(rows.start + part[0], rows.start + part[-1] + 1)) for part in parts
        ]

    def lay_out(self, rows: slice) -> MicroBatch:
        positions: list[int] = []
        start = 0
        for prompt, text, response in zip(
            self.prompts[rows], self.texts[rows], self.responses[rows], strict=True
        ):
            first = start + len(prompt) - 1  # the last token of the prompt
            positions += range(first, first + len(response.ids))
            start += len(text)
        actions = [token for response in self.responses[rows] for token in response.ids]
        first = sum(self.response_lengths[: rows.start])
        first_text = sum(map(len, self.texts[: rows.start]))
        return MicroBatch(
            texts=lay_out(self.texts[rows], self.device),
            positions=torch.tensor(positions, device=self.device),
            actions=torch.tensor(actions, device=self.device),
            tokens=slice(first, first + len(actions)),
            text_tokens=slice(first_text, first_text + start),
        )


def restarts_in_smaller_parts(step: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function of (shared, batch, ...) to begin again when memory runs out.

    It then goes through the batch in micro-batches of half the tokens (`MicroBatchSize.retry`). So
    it must read their size itself, and drop whatever an earlier attempt left.
    """

    @functools.wraps(step)
    def restarted(shared: SharedBase, batch: Batch, *args: Any, **kwargs: Any) -> T:
        attempt = functools.partial(step, shared, batch, *args, **kwargs)
        return shared.micro_batch.retry(attempt, batch.longest)

    return restarted


def make_batch(
    prompts: list[list[int]],
    responses: list[Response],
    minibatches: list[list[int]],
    prompt_format: PromptFormat,
    device: torch.device,
) -> Batch:
    """This process's share of each minibatch.

    Args:
        prompts, responses: of all processes.
        minibatches: the episodes in each, of all processes.
    """
    texts = [
        p + r.text_ids + [prompt_format.eos_token_id]
        for p, r in zip(prompts, responses, strict=True)
    ]
    rows: list[int] = []
    slices = []
    for minibatch in minibatches:
        ours = share(sorted(minibatch, key=lambda row: len(texts[row])))
        slices.append(slice(len(rows), len(rows) + len(ours)))
        rows += ours
    prompts, texts, responses = (
        [column[row] for row in rows] for column in (prompts, texts, responses)
    )
    return Batch(rows, slices, prompts, texts, responses, device)


@dataclass(frozen=True)
class Measured:
    """What each role says of a batch: float32 on the CPU, except `lower`, on the device."""

    lower: Tensor  # [N, H] hidden states below the role adapters
    logprobs: Tensor  # [n] under the policy that sampled
    ref_logprobs: Tensor  # [n]
    entropy: Tensor  # [n] nats, of the policy
    values: Tensor  # [n] expected centred score from here on
    scores: Tensor  # [b] what the reward model says

    def check_finite(self, batch: Batch) -> None:
        """Raise NotFinite unless all numbers are finite."""
        for name in MEASURED:
            fine = getattr(self, name).isfinite()
            fine = fine if name == "scores" else batch.by_response(fine) | ~batch.response_mask
            odd = [
                str(row)
                for row, ok in zip(
                    batch.rows, fine.view(len(fine), -1).all(1).tolist(), strict=True
                )
                if not ok
            ]
            if odd:
                raise NotFinite(
                    f"{name} not finite at texts {', '.join(odd)} of the batch; lower the "
                    "learning rates, or try --dtype fp32"
                )

    def mean_kl(self, batch: Batch) -> float:
        """Nats a response, over all processes."""
        return moments(batch.by_response(self.logprobs - self.ref_logprobs).sum(1))[0].item()


@dataclass(frozen=True)
class Old:
    """What the losses compare policy and values with, for all sampled tokens [n], on the device."""

    lower: Tensor  # [N, H] as measured
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(
        cls, measured: Measured, advantages: Tensor, returns: Tensor, device: torch.device
    ) -> "Old":
        # In one transfer.
        numbers = torch.stack([measured.logprobs, measured.values, advantages, returns])
        return cls(measured.lower, *numbers.to(device))


def count_tokens(batch: Batch) -> list[float]:
    """The number of sampled tokens in each minibatch, over all processes."""
    lengths = batch.response_lengths
    return list(
        sum_numbers(
            {i: float(sum(lengths[rows])) for i, rows in enumerate(batch.minibatches)}
        ).values()
    )
