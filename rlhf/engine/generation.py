"""Sampling responses from the shared base: whole ones, stopped and cut.

A token is drawn in decoding.py. The loop is our own because PPO needs three things from it: a draw
that depends only on (seed, episode, token) and not on the rest of the batch; each token's
log-probability; and for a response that runs on into the next `\\n\\nHuman:`, the token with which
that began.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rlhf.data.format import PromptFormat
from rlhf.engine.decoding import LAG, Decoding
from rlhf.engine.layers import LeanLayer
from rlhf.engine.micro_batches import free_memory, trim_heap
from rlhf.engine.roles import SharedBase
from rlhf.engine.speed import Stopwatch
from rlhf.runs.stop import check_stop
from rlhf.runs.terminal import console

ENDINGS = {
    "eos": "ended by EOS",
    "stop_text": "ended by the next Human: turn",
    "length": "cut at the length limit",
}
Seed = int | tuple[int, ...]

TAIL = 12  # last tokens to look for the stop text in; it is shorter


@dataclass(frozen=True)
class Response:
    """A sampled response.

    `ids` are all sampled tokens. The last one is EOS, or the first token of the next turn's
    `\\n\\nHuman:`, unless the response was cut at the limit. `text_ids` are the tokens before it,
    and the part of it that is text, such as "!" of "!\\n\\n".
    """

    ids: list[int]
    text_ids: list[int]
    ended_by: str  # "eos", "stop_text" or "length"
    # nats, one for each of `ids` as sampled; none at temperature 0
    logprobs: tuple[float, ...] = ()


@torch.no_grad()
def generate(
    shared: SharedBase,
    role: str,
    prompt_format: PromptFormat,
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
        seeds: one per prompt. The same prompt and seed give the same response in any batch, up to
            rounding.
        batch_size: prompts that run together; they have similar lengths.
    Returns:
        One `Response` per prompt, in the prompts' order.
    """
    responses: list[Response | None] = [None] * len(prompts)
    settings = max_new_tokens, temperature
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    trim_heap()
    while order:
        rows = order[: min(batch_size, shared.rollout_rows or batch_size)]
        ours = [prompts[row] for row in rows], [seeds[row] for row in rows]
        try:
            for row, response in zip(
                rows, _sample(shared, role, prompt_format, *ours, *settings), strict=True
            ):
                responses[row] = response
            order = order[len(rows) :]
            continue
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        # Outside of `except`, which would keep the cache that did not fit.
        shared.decoding = None
        shared.graphs.clear()
        shared.rollout_rows = (len(rows) + 1) // 2
        console.print(
            f"out of memory: {shared.rollout_rows} responses at a time from now on, not {len(rows)}"
        )
        free_memory()
    trim_heap()
    return responses


def _sample(
    shared: SharedBase,
    role: str,
    prompt_format: PromptFormat,
    prompts: list[list[int]],
    seeds: list[Seed],
    max_new_tokens: int,
    temperature: float,
) -> list[Response]:
    """The responses to prompts that run together."""
    decoding = start(shared, role, prompts, seeds, max_new_tokens, temperature)
    try:
        ended = {row: response for row, _, response in stream(decoding, prompt_format) if response}
    finally:
        if decoding is not shared.decoding:
            shared.graphs.clear()
    responses = [ended[row] for row in range(len(prompts))]
    if temperature == 0:
        return responses
    logprobs = decoding.logprobs.tolist()
    return [
        replace(response, logprobs=tuple(of_row[: len(response.ids)]))
        for response, of_row in zip(responses, logprobs, strict=False)
    ]


@torch.no_grad()
def start(
    shared: SharedBase,
    role: str,
    prompts: list[list[int]],
    seeds: list[Seed],
    max_new_tokens: int,
    temperature: float,
) -> Decoding:
    """Read prompts, the shortest first, and sample the first token of each response.

    Uses what `prepare` made before, if it fits.
    """
    draws = torch.stack([_uniforms(seed, max_new_tokens) for seed in seeds])
    lengths = list(map(len, prompts))
    decoding = shared.decoding
    if not decoding or not decoding.serves(
        role, shared.layers_of(role), lengths, max_new_tokens, temperature
    ):
        decoding = prepare(shared, role, len(prompts), max(lengths), max_new_tokens, temperature)
    decoding.read(prompts, draws, shared.micro_batch.tokens)
    return decoding


def prepare(
    shared: SharedBase, role: str, texts: int, longest: int, max_new_tokens: int, temperature: float
) -> Decoding:
    """Make room for this many texts, with prompts of up to `longest` tokens."""
    lag = LAG if shared.device.type == "cuda" else 0
    sizes = texts, longest, max_new_tokens
    return Decoding(
        shared.decoder, role, shared.layers_of(role), *sizes, temperature, shared.graphs, lag
    )


@torch.no_grad()
def step_seconds(
    shared: SharedBase, role: str, layers: list[LeanLayer], rows: int, prompt_length: int
) -> float:
    """Seconds of a step on this card with meaningless texts, from a graph if one can be captured.

    Infinity if it does not fit.
    """
    try:
        decoding = Decoding(
            shared.decoder, role, layers, rows, prompt_length, 12, 1.0, shared.graphs, LAG
        )
        decoding.lengths.fill_(prompt_length)
        for _ in range(2):  # once eagerly, once to capture
            decoding.step()
        clock = Stopwatch(shared.device)
        for _ in range(8):
            decoding.step()
        clock.lap("steps")
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        shared.graphs.clear()
    return clock.seconds["steps"] / 8


@torch.no_grad()
def stream(
    decoding: Decoding, prompt_format: PromptFormat
) -> Iterator[tuple[int, int, Response | None]]:
    """Yield tokens as they come: row, token, and with a row's last token its whole response."""
    count = decoding.count
    new = decoding.new
    texts: list[int | None] = list(range(count))  # of each row, until it ends
    written: list[list[int]] = [[] for _ in range(count)]
    for step in range(new + decoding.lag):
        check_stop()
        if 0 < step < new:
            decoding.step()
        if step < new:
            decoding.send()
        if step < decoding.lag:
            continue
        for row, token in enumerate(decoding.receive()[: len(texts)]):
            text = texts[row]
            if text is None:
                continue
            written[text].append(token)
            response = _ended(written[text], prompt_format, new)
            texts[row] = None if response else text
            yield text, token, response
        alive = [row for row, text in enumerate(texts) if text is not None]
        if not alive:
            return
        if not decoding.lag and decoding.shrink(alive):
            texts = [texts[row] for row in alive]


def _uniforms(seed: Seed, count: int) -> Tensor:
    # numpy mixes all numbers of a seed; torch's CPU generator uses only the lowest 32 bits.
    return torch.from_numpy(np.random.default_rng(seed).random(count))


def _ended(ids: list[int], prompt_format: PromptFormat, max_new_tokens: int) -> Response | None:
    if ids[-1] == prompt_format.eos_token_id:
        return Response(ids, ids[:-1], "eos")
    if prompt_format.stop_text and prompt_format.stop_text in prompt_format.tokenizer.decode(
        ids[-TAIL:]
    ):
        decode = prompt_format.tokenizer.decode
        text = decode(ids).split(prompt_format.stop_text)[0]
        # So many tokens are text alone. What is text of the next one is encoded by itself.
        whole = next(n for n in reversed(range(len(ids))) if len(decode(ids[:n])) <= len(text))
        rest = text[len(decode(ids[:whole])) :]
        return Response(ids[: whole + 1], ids[:whole] + prompt_format.encode(rest), "stop_text")
    if len(ids) == max_new_tokens:
        return Response(ids, ids, "length")
    return None
