"""Sampling responses from the shared base.

A loop of our own, because PPO needs three things of it: a draw that depends on (seed, episode, token) alone and not
on what else is in the batch; rows that leave the batch when they end; and, for a response that runs on into the
next `\\n\\nHuman:`, the token with which it did so.
"""

from dataclasses import dataclass

from rlhf.data import PromptFormat
from rlhf.modeling import SharedBase

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

Seed = int | tuple[int, ...]

TAIL = 12  # tokens decoded to look for the stop text, which is shorter than that


@dataclass(frozen=True)
class Response:
    """A sampled response.

    `ids` are all the tokens that were chosen; the text is the first `text_length` of them. The one token after the text,
    if any, is the one that ended it: EOS, or the first token of the next turn's `\\n\\nHuman:`.
    """

    ids: list[int]
    text_length: int
    ended_by: str  # "eos", "stop_text" or "length"

    @property
    def text_ids(self) -> list[int]:
        return self.ids[: self.text_length]


@torch.no_grad()
def generate(
    shared: SharedBase,
    form: PromptFormat,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seeds: list[Seed],
    batch_size: int,
) -> list[Response]:
    """Sample one response to each prompt from the active adapters.

    Args:
        prompts: token ids, of any lengths.
        temperature: logits are divided by it; 0 is greedy.
        seeds: one a prompt; the same prompt and seed give the same response in any batch, up to rounding.
        batch_size: prompts of like length run together, this many at a time.
    Returns:
        One `Response` a prompt, in the prompts' order.
    """
    responses: list[Response | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        for row, response in _generate_batch(shared, form, prompts, rows, max_new_tokens, temperature, seeds):
            responses[row] = response
    return responses


def _generate_batch(shared, form, prompts, rows, max_new_tokens, temperature, seeds):
    """Yield (row, Response) for each of `rows`, as they end."""
    device, width = shared.device, max(len(prompts[row]) for row in rows)
    # Padding on the left here: the next token then stands at the same place in every row.
    step_ids = torch.tensor([[form.pad_token_id] * (width - len(prompts[r])) + prompts[r] for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(prompts[r])) + [1] * len(prompts[r]) for r in rows], device=device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    draws = torch.stack([_uniforms(seeds[row], max_new_tokens) for row in rows]).to(device)  # [B, max_new_tokens]
    cache = DynamicCache(config=shared.peft.base_model.model.config)
    chosen: list[list[int]] = [[] for _ in rows]

    for step in range(max_new_tokens):
        hidden = shared.decoder(
            input_ids=step_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]  # [B, H], and not [B, 1, H]: of that a matmul would copy the weight for each row
        tokens = pick(F.linear(hidden, shared.lm_head_weight()), temperature, draws[:, step])
        keep = []
        for i, token in enumerate(tokens.tolist()):
            chosen[i].append(token)
            response = _ended(chosen[i], form, max_new_tokens)
            if response:
                yield rows[i], response
            else:
                keep.append(i)
        if not keep:
            return
        if len(keep) < len(rows):  # rows that ended leave the batch
            index = torch.tensor(keep, device=device)
            cache.batch_select_indices(index)
            tokens, mask, positions, draws = tokens[index], mask[index], positions[index], draws[index]
            rows, chosen = [rows[i] for i in keep], [chosen[i] for i in keep]
        step_ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1


def pick(logits: Tensor, temperature: float, draw: Tensor) -> Tensor:
    """One token a row: the largest logit at temperature 0, else the inverse of the softmax's CDF at `draw` in [0, 1).

    Args:
        logits: [B, V]; draw: [B], float64.
    Returns:
        [B]
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = torch.softmax(logits.float() / temperature, dim=-1).double().cumsum(-1)
    tokens = torch.searchsorted(cdf, draw[:, None] * cdf[:, -1:], right=True).squeeze(-1)
    return tokens.clamp(max=logits.shape[-1] - 1)


def _uniforms(seed: Seed, count: int) -> Tensor:
    # numpy mixes all numbers of a seed; torch's generator on the CPU looks at the lowest 32 bits only.
    return torch.from_numpy(np.random.default_rng(seed).random(count))


def _ended(ids: list[int], form: PromptFormat, max_new_tokens: int) -> Response | None:
    if ids[-1] == form.eos_token_id:
        return Response(ids, len(ids) - 1, "eos")
    if form.stop_text and form.stop_text in form.tokenizer.decode(ids[-TAIL:]):
        # The text ends with the last token that lies wholly before the stop text.
        end = form.tokenizer.decode(ids).index(form.stop_text)
        text_length = next(n for n in range(len(ids) - 1, -1, -1) if len(form.tokenizer.decode(ids[:n])) <= end)
        return Response(ids[: text_length + 1], text_length, "stop_text")
    if len(ids) == max_new_tokens:
        return Response(ids, len(ids), "length")
    return None
