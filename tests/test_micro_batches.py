"""Cutting by tokens, and what happens when memory runs out."""

import pytest
import torch

from rlhf.engine.micro_batches import MicroBatchSize, cut_by_tokens


def test_cutting_by_hand():
    assert cut_by_tokens([3, 9, 2, 3, 4], 8) == [
        [2, 0],
        [3, 4],
        [1],
    ]  # 2 x 3; 2 x 4; 9 is more than 8, and alone
    assert cut_by_tokens([5, 5, 5], 15) == [[0, 1, 2]]
    assert cut_by_tokens([5, 5, 5], 14) == [[0, 1], [2]]
    assert cut_by_tokens([], 8) == []


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
