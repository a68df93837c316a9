"""How far a run is, its curves, numbers with their intervals, and how varied texts are."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from test_ppo_eval import evaluation

import reward_train
import sft_train
from rlhf.data.style import distinct_2, repeated_3grams
from rlhf.engine.callbacks import TrainerLog, describe_evaluation
from rlhf.ppo.log import PANELS, Log
from rlhf.runs.curves import Curves, Panel, plot_curves, running_mean
from rlhf.runs.errors import UserError
from rlhf.runs.metrics import JsonLines, read_jsonl
from rlhf.runs.statistics import at_equal_length, mean_interval, wilson_interval
from rlhf.runs.terminal import Progress, console, duration, plain


def test_what_is_written_is_read_again(tmp_path):
    rows = [{"text": "a\u2028b\x85c\n\td"}, {"score": 1.5}]
    lines = JsonLines(tmp_path / "rows.jsonl")
    for row in rows:
        lines.write(row)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


def test_what_json_cannot_hold_is_left_out(tmp_path):
    JsonLines(tmp_path / "rows.jsonl").write(
        {"step": 1, "grad_norm": float("inf"), "loss": float("nan"), "lr": 0.5}
    )
    assert (tmp_path / "rows.jsonl").read_text() == '{"step": 1, "lr": 0.5}\n'


def test_a_position_is_that_of_bytes_on_the_disk(tmp_path, monkeypatch):
    lines = JsonLines(tmp_path / "rows.jsonl")
    flushed = []
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
    for odd in (
        "\x1b",
        "\x00",
        "\x9b",
        "\r",
        "\ud800",
        "\u202e",
        "\u202a",
        "\u2066",
        "\u2069",
        "\ufeff",
    ):
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
        (
            "我不知道我不知道",
            2 / 6,
        ),  # 我不知 不知道 知道我 道我不, and the first two again: no spaces, so characters
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


# ---------------------------------------------------------------- how far a run is


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is what the time is, in seconds."""
    now = [1000.0]
    monkeypatch.setattr("rlhf.runs.terminal.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def pipe(monkeypatch):
    """Standard output is a pipe, as under nohup or Docker; `pipe()` is what has come since."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(console, "_file", stdout)

        def read() -> list[str]:
            try:
                return os.read(reading, 1 << 16).decode().splitlines()
            except BlockingIOError:
                return []

        yield read
    os.close(reading)


def test_into_a_pipe_goes_a_line_every_half_minute_and_at_both_ends(clock, pipe):
    """At once, not when a buffer is full. Its numbers are means since the last one."""
    run = Progress("SFT", "step", 9)
    said = {}
    clock[0] += 500  # of an evaluation before the first step
    run.begin(0)
    for step in range(1, 10):
        clock[0] += 10
        run.update(step, loss=float(step), speed=1000.0 * step)
        said[step] = pipe()
    run.stop()
    assert {step: lines for step, lines in said.items() if lines} == {
        1: ["SFT: step 1 of 9, loss 1.000, 1,000 tokens/s, 80 s left"],
        4: ["SFT: step 4 of 9, loss 3.000, 3,000 tokens/s, 50 s left"],
        7: ["SFT: step 7 of 9, loss 6.000, 6,000 tokens/s, 20 s left"],
        9: ["SFT: step 9 of 9, loss 8.500, 8,500 tokens/s"],
    }


def test_a_run_that_goes_on_reckons_from_where_it_began(clock, pipe):
    run = Progress("PPO", "update", 1006)
    run.begin(1000)
    clock[0] += 60
    run.update(1001, score=0.5, kl=1.25)
    assert pipe() == ["PPO: update 1,001 of 1,006, score 0.50, KL 1.25, 5 min left"]


@pytest.mark.parametrize("phase", ["trainer", "ppo"])
def test_the_first_look_at_held_out_rows_does_not_count_as_a_step(phase, clock, capsys, tmp_path):
    """200 s of it, then a step of 10 s: 30 s are left for three more."""
    if phase == "ppo":
        with Log(tmp_path, total=4) as log:
            log.rewind(0, 0)
            clock[0] += 200
            log.evaluation(0, evaluation([0.0, 1.0]), [[1]] * 2, SimpleNamespace(decode=str))
            clock[0] += 10
            row = {"update": 1, "objective/scores": 0.5, "objective/kl": 1.0}
            log.update(row | {"policy/sampler_kl": 0.0, "speed/tokens_per_second": 100.0})
    else:
        state = SimpleNamespace(is_world_process_zero=True)
        log = TrainerLog(tmp_path, "SFT", sft_train.Trainer.panels)
        state.max_steps = 4
        state.global_step = 0
        log.on_train_begin(None, state, None)
        clock[0] += 200
        log.on_log(None, state, None, {"eval_loss": 2.5})
        log.on_step_begin(None, state, None)
        clock[0] += 10
        state.global_step = 1
        log.on_log(None, state, None, {"loss": 2.0, "speed/tokens_per_second": 100.0})
        log.stop()
    last = capsys.readouterr().out.splitlines()[-1]
    numbers = (
        "PPO: update 1 of 4, score 0.50, KL 1.00"
        if phase == "ppo"
        else "SFT: step 1 of 4, loss 2.000"
    )
    assert last == f"{numbers}, 100 tokens/s, 30 s left"


def test_on_a_terminal_there_is_a_bar_and_no_such_line(clock, pipe, monkeypatch):
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    run = Progress("SFT", "step", 2)
    run.update(1, loss=0.5, speed=10.0)
    assert run.bar.live.is_started
    run.update(2, loss=0.25, speed=10.0)
    run.stop()
    assert not run.bar.live.is_started
    shown = "".join(pipe())
    assert "2/2" in shown and "loss 0.250 10 tokens/s" in shown and "step" not in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (5399, "1 h 30 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration(seconds) == text


def test_an_evaluation_says_where_the_loss_was_lower():
    rows = [
        {"step": 0, "eval_loss": 2.5},
        {"step": 1, "loss": 1.0},
        {"step": 10, "eval_loss": 2.25},
    ]
    assert describe_evaluation(0, {"eval_loss": 2.5}, []) == "step 0, test rows: loss 2.5000"
    assert describe_evaluation(20, {"eval_loss": 2.0}, rows) == "step 20, test rows: loss 2.0000"
    numbers = {"eval_loss": 2.375, "eval_accuracy": 0.75, "eval_margin": 0.5}
    line = "step 20, test rows: loss 2.3750, accuracy 0.750, margin 0.500"
    assert (
        describe_evaluation(20, numbers, rows) == line + "; the loss was lowest at step 10, 2.2500"
    )


# ---------------------------------------------------------------- curves


def write_rows(folder, count):
    rows = [
        {"step": n, "loss": n % 2} | ({"eval_loss": n} if n % 10 == 0 else {}) for n in range(count)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


LOSS = (
    Panel("Loss", "nats", {"loss": "training", "eval_loss": "test"}),
    Panel("Other", "nats", {"x": "none"}),
)


def test_a_long_curve_is_faint_behind_its_mean(tmp_path):
    loss, other = plot_curves(write_rows(tmp_path, 40), "step", LOSS).axes
    raw, mean, test = loss.lines
    assert raw.get_ydata().tolist() == [0, 1] * 20 and raw.get_alpha() < 0.5
    assert mean.get_alpha() is None and mean.get_color() == raw.get_color() != test.get_color()
    assert set(mean.get_ydata()[2:-2]) == {2 / 5, 3 / 5}
    assert (
        test.get_xydata().tolist() == [[0, 0], [10, 10], [20, 20], [30, 30]]
        and test.get_marker() == "o"
    )
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training", "test"]
    assert (loss.get_title(), loss.get_ylabel(), loss.get_xlabel()) == (
        "Loss",
        "nats",
        "optimizer step",
    )
    assert not other.lines


def test_a_running_mean_by_hand():
    values = np.array([10.0, 0.0, 0.0, 5.0, 0.0, 0.0])
    assert running_mean(values) == pytest.approx([10 / 3, 15 / 4, 3, 1, 5 / 4, 5 / 3])
    many = np.arange(200.0)
    assert running_mean(many)[5:-5] == pytest.approx(many[5:-5])  # no lag
    assert running_mean(many)[0] == 2.5  # of 0 to 5


@pytest.mark.parametrize("panels", [sft_train.Trainer.panels, reward_train.Trainer.panels, PANELS])
def test_pictures_have_words_and_no_names_of_metrics(panels):
    words = [word for panel in panels for word in (panel.title, panel.unit, *panel.lines.values())]
    names = {name for panel in panels for name in panel.lines}
    assert not names & {*words} and not any("_" in word or "/" in word for word in words)


def test_curves_are_drawn_once_a_minute_and_put_in_place_whole(tmp_path, clock, monkeypatch):
    write_rows(tmp_path, 3)
    curves = Curves(tmp_path, "step", LOSS)
    places = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: places.append(paths) or replace(*paths))
    drawn = []
    for _ in range(10):
        clock[0] += 25
        curves.draw_when_due()
        drawn.append(len(places))
    assert drawn == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert set(places) == {(tmp_path / "curves.png.partial", tmp_path / "curves.png")}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, clock, monkeypatch, capsys):
    """A warning says so, once on the way; at the end it is tried again."""
    write_rows(tmp_path, 3)
    curves = Curves(tmp_path, "step", LOSS)
    (tmp_path / "curves.png").write_bytes(b"an earlier one")

    def broken(figure, path, **_):
        path.write_bytes(b"half of it")
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", broken)
        for _ in range(5):
            clock[0] += 100
            curves.draw_when_due()
    line = "warning: curves.png could not be drawn (no room); the run continues without it\n"
    assert capsys.readouterr().out == line
    assert (tmp_path / "curves.png").read_bytes() == b"an earlier one"
    assert not (tmp_path / "curves.png.partial").exists()
    curves.draw()
    assert (
        capsys.readouterr().out == ""
        and (tmp_path / "curves.png").read_bytes() != b"an earlier one"
    )
