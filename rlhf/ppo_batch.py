"""The unit that goes through the model: a few rollouts of like length, and what each role says of them.

Shapes: b rows, N tokens of their texts, R sampled tokens of the longest response, H hidden size.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from rlhf.cli import UserError
from rlhf.data import PromptFormat
from rlhf.decoder import Texts, lay_out
from rlhf.generation import Response
from rlhf.modeling import SharedBase, by_length, pad_right
from rlhf.processes import moments, num_processes, share, totals

import torch
from torch import Tensor

T = TypeVar("T")
BY_ROW = ("rows", "positions", "actions", "response_mask", "ended", "scores", "logprobs", "ref_logprobs", "entropy")
BY_ROW += ("values", "advantages", "returns")
MEASURED = ("scores", "values", "logprobs", "ref_logprobs")


class NotFinite(UserError):
    """A number that PPO cannot go on with. Whoever knows the update adds it."""


@dataclass
class MicroBatch:
    """Responses of like length that go through the model together, in every pass of an update.

    Texts are prompt + response + EOS: a response that was cut is scored as if it had ended there. `actions` are the
    tokens that were sampled, with the one that ended the text; `positions` is where the model stood when it chose them.
    """

    number: int  # of the micro-batch in the update; the parts of one that did not fit in memory have the same
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
    """Sort by length, so that attention pads little, and cut into micro-batches of `size` rows for this process.

    The n-th micro-batches of all processes belong together: they are one of n times `size` rows in a run of one process.
    """
    texts = [p + r.text_ids + [form.eos_token_id] for p, r in zip(prompts, responses, strict=True)]
    batch = []
    for number, together in enumerate(by_length(list(map(len, texts)), size * num_processes())):
        rows = share(together)
        if not rows:
            continue
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
                number=number,
                rows=rows,
                texts=laid_out,
                positions=(starts[:, None] + steps) * response_mask,
                actions=pad_right([responses[i].ids for i in rows], form.pad_token_id, device),
                response_mask=response_mask,
                ended=torch.tensor([responses[i].ended_by == "eos" for i in rows], device=device),
            )
        )
    return batch


def num_tokens(batch: list[MicroBatch]) -> float:
    """Sampled tokens, of all processes."""
    return totals({"tokens": sum(micro.response_mask.sum().item() for micro in batch)})["tokens"]


def mean_kl(batch: list[MicroBatch]) -> float:
    """Nats a response, over all processes."""
    return moments(torch.cat([(m.logprobs - m.ref_logprobs).sum(1) for m in batch]))[0].item()


def pick(batch: list[MicroBatch], numbers: Iterable[int]) -> list[MicroBatch]:
    """The micro-batches of these numbers, in their order."""
    return [micro for number in numbers for micro in batch if micro.number == number]


def check_finite(micro: MicroBatch) -> None:
    """Raise NotFinite unless all that was measured is."""
    count = len(micro.rows)
    fine = torch.stack([getattr(micro, name).reshape(count, -1).isfinite().all(1) for name in MEASURED]).tolist()
    for name, rows in zip(MEASURED, fine, strict=True):
        odd = ", ".join(str(row) for row, ok in zip(micro.rows, rows, strict=True) if not ok)
        if odd:
            raise NotFinite(
                f"{name} not finite at texts {odd} of the batch; lower the learning rates, or try --dtype fp32"
            )


# ---------------------------------------------------------------- memory


def fit(work: Callable[..., T], shared: SharedBase, batch: list[MicroBatch], *more: Any) -> T:
    """`work(shared, batch, *more)`. When memory runs out, again, with each micro-batch in two of half the rows, in `batch` too.

    Gradients of what did not fit are dropped first. Later batches are cut as small from the start.
    """
    while True:
        largest = max(len(micro.rows) for micro in batch)
        if largest > shared.rows_that_fit.get("micro-batch", largest):
            batch[:] = [half for micro in batch for half in halves(micro)]
            continue
        try:
            return work(shared, batch, *more)
        except torch.OutOfMemoryError:
            if largest == 1 or num_processes() > 1:
                raise
        shared.ran_out("micro-batch", largest, (largest + 1) // 2)


def halves(micro: MicroBatch) -> list[MicroBatch]:
    """The first and the last rows of a micro-batch, with all that was measured; one of a single row stays as it is."""
    count = (len(micro.rows) + 1) // 2
    if count == len(micro.rows):
        return [micro]
    lengths = micro.texts.last.diff(prepend=micro.texts.last.new_tensor([-1])).tolist()  # tokens of each text
    border = sum(lengths[:count])
    parts = []
    for rows, tokens in ((slice(0, count), slice(0, border)), (slice(count, None), slice(border, None))):
        texts = list(micro.texts.ids[tokens].split(lengths[rows]))
        cut = {name: value[rows] for name, value in vars(micro).items() if value is not None and name in BY_ROW}
        cut["positions"] = (cut["positions"] - tokens.start) * cut["response_mask"]
        lower = None if micro.lower is None else micro.lower[tokens]
        laid_out = lay_out([ids.tolist() for ids in texts], micro.texts.ids.device)
        parts.append(replace(micro, texts=laid_out, lower=lower, **cut))
    return parts
