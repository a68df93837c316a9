"""Cutting by tokens, and what happens when memory runs out or a signal comes."""

import signal
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.engine.micro_batches import MicroBatchSize, cut_by_tokens
from rlhf.ppo.batch import restarts_in_smaller_parts
from rlhf.runs.errors import Stopped
from rlhf.runs.stop import stop_when_asked, until_stopped


def test_cutting_by_hand():
    assert cut_by_tokens([3, 9, 2, 3, 4], 8) == [
        [2, 0],
        [3, 4],
        [1],
    ]  # 2 x 3; 2 x 4; 9 is more than 8, and alone
    assert cut_by_tokens([5, 5, 5], 15) == [[0, 1, 2]]
    assert cut_by_tokens([5, 5, 5], 14) == [[0, 1], [2]]
    assert cut_by_tokens([], 8) == []
    # Of two micro-batches, the first would fill up: 3 x 5 and 1 x 5, where 2 x 5 will do.
    assert cut_by_tokens([5, 5, 5, 5], 15) == [[0, 1], [2, 3]]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 60))
def test_as_few_as_can_be_and_as_even_as_so_many_can_be(lengths, tokens):
    cut = cut_by_tokens(lengths, tokens)
    assert sorted(index for part in cut for index in part) == list(range(len(lengths)))

    def size(part: list[int]) -> int:
        return len(part) * max(part)

    # Each way to cut the texts in order of length, that keeps to the limit where one text does.
    ordered = sorted(lengths)
    ways = []
    for ends in product((False, True), repeat=len(ordered) - 1):
        borders = [0, *(i + 1 for i, end in enumerate(ends) if end), len(ordered)]
        parts = [ordered[a:b] for a, b in pairwise(borders)]
        if all(size(part) <= tokens or len(part) == 1 for part in parts):
            ways.append((len(parts), max(size(part) for part in parts)))
    assert (len(cut), max(size([lengths[i] for i in part]) for part in cut)) == min(ways)


def test_half_the_tokens_until_it_fits():
    size = MicroBatchSize(1000)
    tried = []
    undone = []

    def work() -> str:
        tried.append(size.tokens)
        if size.tokens > 300:
            raise torch.OutOfMemoryError
        return "done"

    assert size.retry(work, longest=200, undo=lambda: undone.append(size.tokens)) == "done"
    assert (tried, undone, size.halved) == ([1000, 500, 250], [500, 250], True)
    size.agree()
    assert (size.tokens, size.halved) == (250, False)


def test_one_text_that_does_not_fit_ends_the_run():
    size = MicroBatchSize(1000)
    tried = []

    def work():
        tried.append(size.tokens)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        size.retry(work, longest=300)
    assert tried == [1000, 500, 250]


def test_a_step_begins_again_in_smaller_parts():
    shared = SimpleNamespace(micro_batch=MicroBatchSize(400))
    batch = SimpleNamespace(longest=90)
    tried = []

    @restarts_in_smaller_parts
    def step(shared, batch, *names, power):
        tried.append((shared.micro_batch.tokens, names, power))
        if shared.micro_batch.tokens > 100:
            raise torch.OutOfMemoryError
        return "done"

    assert step(shared, batch, "policy", power=2) == "done"
    assert tried == [(400, ("policy",), 2), (200, ("policy",), 2), (100, ("policy",), 2)]
    assert step.__name__ == "step"


def test_a_loop_ends_where_a_signal_asks_it_to():
    done = []
    with stop_when_asked(), pytest.raises(Stopped) as stopped:
        for number in until_stopped(range(5)):
            done.append(number)
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
    assert done == [0, 1, 2] and stopped.value.args == (signal.SIGTERM,)
    assert list(until_stopped(range(2))) == [0, 1]  # what comes later was not asked to
