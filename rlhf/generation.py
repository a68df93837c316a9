"""Sampling responses from the shared base.

A loop of our own, because PPO needs three things of it: a draw that depends on (seed, episode, token) alone and not
on what else is in the batch; rows that leave the batch when they end; and, for a response that runs on into the
next `\\n\\nHuman:`, the token with which it did so.
"""

from dataclasses import dataclass

from rlhf.data import PromptFormat
from rlhf.decoder import KVCache, lay_out, next_tokens
from rlhf.logprobs import matmul
from rlhf.micro_batches import free_memory
from rlhf.modeling import SharedBase
from rlhf.reporting import console
from rlhf.resume import check_stop

import numpy as np
import torch
from torch import Tensor

Seed = int | tuple[int, ...]

PREFILL = 8  # prompts read at a time
TAIL = 12  # tokens decoded to look for the stop text, which is shorter than that


@dataclass(frozen=True)
class Response:
    """A sampled response.

    `ids` are all the tokens that were chosen. The last one, unless the length ended it, is EOS or the first token of the
    next turn's `\\n\\nHuman:`. `text_ids` are those before it, and what it says itself of the text, as "!" of "!\\n\\n".
    """

    ids: list[int]
    text_ids: list[int]
    ended_by: str  # "eos", "stop_text" or "length"


@torch.no_grad()
def generate(
    shared: SharedBase,
    role: str,
    form: PromptFormat,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seeds: list[Seed],
    batch_size: int,
) -> list[Response]:
    """Sample one response of `role` to each prompt.

    Args:
        prompts: token ids, of any lengths.
        temperature: logits are divided by it; 0 is greedy.
        seeds: one a prompt; the same prompt and seed give the same response in any batch, up to rounding.
        batch_size: prompts of like length run together, this many at a time.
    Returns:
        One `Response` a prompt, in the prompts' order.
    """
    responses: list[Response | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    while order:
        rows = order[: min(batch_size, shared.rollout_rows or batch_size)]
        try:
            for row, response in _generate_batch(shared, role, form, prompts, rows, max_new_tokens, temperature, seeds):
                responses[row] = response
            order = order[len(rows) :]
            continue
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        # Outside `except`, which would hold the cache that did not fit.
        shared.rollout_rows = (len(rows) + 1) // 2
        console.print(f"out of memory: {shared.rollout_rows} responses at a time from now on, not {len(rows)}")
        free_memory()
    return responses


def _generate_batch(shared, role, form, prompts, rows, max_new_tokens, temperature, seeds):
    """Yield (row, Response) for each of `rows`, as they end."""
    lengths = [len(prompts[row]) for row in rows]
    draws = torch.stack([_uniforms(seeds[row], max_new_tokens) for row in rows])  # [B, max_new_tokens]
    draws = draws.to(shared.device)
    cache = KVCache(shared.decoder.model, len(rows), max(lengths) + max_new_tokens)
    hidden = torch.cat(
        [_read(shared, role, prompts, rows, part, cache) for part in range(0, len(rows), PREFILL)]
    )  # [B, H]
    cache.start(lengths)
    chosen: list[list[int]] = [[] for _ in rows]

    for step in range(max_new_tokens):
        check_stop()
        tokens = pick(matmul(hidden, shared.lm_head_weight().T), temperature, draws[:, step])
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
            index = torch.tensor(keep, device=shared.device)
            cache.keep(index)
            tokens, draws = tokens[index], draws[index]
            rows, chosen = [rows[i] for i in keep], [chosen[i] for i in keep]
        texts = next_tokens(tokens, cache.lengths, cache.longest)
        hidden = shared.decoder.norm(shared.read(texts, role, cache))
        cache.grow()


def _read(shared, role, prompts, rows, start, cache) -> Tensor:
    """Read some of the prompts into the cache: the final hidden state [b, H] of each one's last token."""
    cache.reading = slice(start, start + PREFILL)
    texts = lay_out([prompts[row] for row in rows[cache.reading]], shared.device)
    return shared.decoder.norm(shared.read(texts, role, cache)[texts.last])


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
        return Response(ids, ids[:-1], "eos")
    if form.stop_text and form.stop_text in form.tokenizer.decode(ids[-TAIL:]):
        decode = form.tokenizer.decode
        text = decode(ids).split(form.stop_text)[0]
        # How many tokens are of the text alone; of the next one, what is text comes as tokens of its own.
        whole = next(n for n in reversed(range(len(ids))) if len(decode(ids[:n])) <= len(text))
        rest = text[len(decode(ids[:whole])) :]
        return Response(ids[: whole + 1], ids[:whole] + form.encode(rest), "stop_text")
    if len(ids) == max_new_tokens:
        return Response(ids, ids, "length")
    return None
