"""Numbers with their intervals, and how varied texts are."""

from rlhf.cli import UserError
from rlhf.reporting import (
    JsonLines,
    at_equal_length,
    console,
    distinct_2,
    mean_interval,
    plain,
    read_jsonl,
    repeated_3grams,
    wilson_interval,
)

import numpy as np
import pytest


def test_what_is_written_is_read_again(tmp_path):
    rows = [{"text": "a\u2028b\x85c\n\td"}, {"score": 1.5}]
    lines = JsonLines(tmp_path / "rows.jsonl")
    for row in rows:
        lines.write(row)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_what_json_cannot_hold_is_left_out(tmp_path):
    JsonLines(tmp_path / "rows.jsonl").write({"step": 1, "grad_norm": float("inf"), "loss": float("nan"), "lr": 0.5})
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1, "lr": 0.5}\n'


def test_a_position_is_that_of_bytes_on_the_disk(tmp_path, monkeypatch):
    lines, flushed = JsonLines(tmp_path / "rows.jsonl"), []
    monkeypatch.setattr("os.fsync", flushed.append)
    lines.write({"step": 1})
    assert (lines.position(), flushed) == (12, [lines.file.fileno()])
    with pytest.raises(UserError, match="rows.jsonl has lost its end"):
        lines.cut(13)  # it would be filled up with NULs
    lines.cut(0)
    assert (tmp_path / "rows.jsonl").read_text() == ""


def test_plain_text_keeps_what_people_wrote_but_for_what_turns_lines_round_or_drives_a_terminal():
    kept = "می\u200cخواهم 👩\u200d🚀 co\u00adoperate \u200eab\u200f\n\tx"
    assert plain(kept) == kept
    for odd in ("\x1b", "\x00", "\x9b", "\r", "\ud800", "\u202e", "\u202a", "\u2066", "\u2069", "\ufeff"):
        assert plain(f"a{odd}b") == "a\ufffdb"


@pytest.mark.parametrize("text", ["Saved runs/[v2]/x.", "data[/old]/x", "I am glad :smile:"])
def test_a_text_is_shown_as_it_is(text, capsys):
    console.print(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("a b", 0.0),
        ("a b c", 0.0),
        ("a b c a b c", 0.25),  # abc bca cab abc
        ("no no no no no", 2 / 3),  # three times the same
        ("a b c\nd a  b c", 0.2),  # abc bcd cda dab abc: white space does not count
        ("我不知道我不知道", 2 / 6),  # 我不知 不知道 知道我 道我不, and the first two again: no spaces, so characters
        ("ไปไปไป", 2 / 4),
        ("ok 我们 ok 我们", 1 / 4),  # a word, two characters
        ("=" * 60, 57 / 58),  # no word is so long
    ],
)
def test_repeated_3grams(text, share):
    assert repeated_3grams(text) == pytest.approx(share)


def test_distinct_2_counts_over_all_texts():
    assert distinct_2(["a b c", "a b", "x"]) == pytest.approx(2 / 3)  # ab bc ab
    assert distinct_2(["", "x"]) == 0.0


def test_wilson_interval_by_hand():
    # 2.5 of 4: centre (0.625 + 3.8415 / 8) / 1.96036 = 0.5638,
    # half width 1.96 * sqrt(0.625 * 0.375 / 4 + 3.8415 / 64) / 1.96036 = 0.3443
    assert wilson_interval(2.5, 4) == pytest.approx((0.2194, 0.9081), abs=1e-3)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(1)


def test_mean_interval_is_that_of_the_normal_law_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = mean_interval(values)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.02)


def test_at_equal_length_reads_the_line_at_zero():
    assert at_equal_length([1, 2, 3], [0, 1, 2])[0] == pytest.approx(1)  # outcome = 1 + difference
    assert at_equal_length([4, 6], [5, 5]) == pytest.approx((5, 4, 6))  # one length only: the mean
    random = np.random.default_rng(0)
    longer = random.normal(10, 5, 1000)
    value, low, high = at_equal_length(0.3 + 0.1 * longer + random.normal(0, 1, 1000), longer)
    assert low < 0.3 < high and value == pytest.approx(0.3, abs=0.15) and high - low < 0.4
