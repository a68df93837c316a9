"""Sampling responses from the shared base.

A loop of our own, because PPO needs three things of it: a draw that depends on (seed, episode,
token) alone and not on what else is in the batch; each token's log-probability; and, for a response
that runs on into the next `\\n\\nHuman:`, the token with which it did so.
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
from rlhf.engine.micro_batches import free_memory
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

TAIL = 12  # tokens decoded to look for the stop text, which is shorter than that


@dataclass(frozen=True)
class Response:
    """A sampled response.

    `ids` are all sampled tokens. Unless it was cut at the limit, the last one is EOS or the first
    token of the next turn's `\\n\\nHuman:`. `text_ids` are the tokens before it, and the part of it
    that is text, such as "!" of "!\\n\\n".
    """

    ids: list[int]
    text_ids: list[int]
    ended_by: str  # "eos", "stop_text" or "length"
    # nats, of each of `ids` as they were sampled; none at temperature 0
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
        seeds: one a prompt; the same prompt and seed give the same response in any batch, up to
            rounding.
        batch_size: prompts of like length run together, this many at a time.
    Returns:
        One `Response` a prompt, in the prompts' order.
    """
    responses: list[Response | None] = [None] * len(prompts)
    settings = max_new_tokens, temperature
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
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
        # Outside `except`, which would hold the cache that did not fit.
        shared.decoding = None
        shared.graphs.clear()
        shared.rollout_rows = (len(rows) + 1) // 2
        console.print(
            f"out of memory: {shared.rollout_rows} responses at a time from now on, not {len(rows)}"
        )
        free_memory()
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
    """Read prompts, from the shortest on, and sample the first token of each response.

    What `prepare` has kept is used if it serves.
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
    """Room for this many texts, with prompts of up to `longest` tokens."""
    lag = LAG if shared.device.type == "cuda" else 0
    sizes = texts, longest, max_new_tokens
    return Decoding(
        shared.decoder, role, shared.layers_of(role), *sizes, temperature, shared.graphs, lag
    )


@torch.no_grad()
def step_seconds(
    shared: SharedBase, role: str, layers: list[LeanLayer], rows: int, prompt_length: int
) -> float:
    """Seconds of a step on this card, from a graph if it can be captured, on texts without meaning.

    Infinitely long if it does not fit.
    """
    try:
        decoding = Decoding(
            shared.decoder, role, layers, rows, prompt_length, 12, 1.0, shared.graphs, LAG
        )
        decoding.lengths.fill_(prompt_length)
        for _ in range(2):  # as it is; captured
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
    """All responses' tokens as they come: row, token, and the whole response with its last one."""
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
    # numpy mixes all numbers of a seed; torch's generator on the CPU looks at the lowest 32 bits
    # only.
    return torch.from_numpy(np.random.default_rng(seed).random(count))


def _ended(ids: list[int], prompt_format: PromptFormat, max_new_tokens: int) -> Response | None:
    if ids[-1] == prompt_format.eos_token_id:
        return Response(ids, ids[:-1], "eos")
    if prompt_format.stop_text and prompt_format.stop_text in prompt_format.tokenizer.decode(
        ids[-TAIL:]
    ):
        decode = prompt_format.tokenizer.decode
        text = decode(ids).split(prompt_format.stop_text)[0]
        # How many tokens are of the text alone; of the next one, what is text comes as tokens of
        # its own.
        whole = next(n for n in reversed(range(len(ids))) if len(decode(ids[:n])) <= len(text))
        rest = text[len(decode(ids[:whole])) :]
        return Response(ids[: whole + 1], ids[:whole] + prompt_format.encode(rest), "stop_text")
    if len(ids) == max_new_tokens:
        return Response(ids, ids, "length")
    return None
