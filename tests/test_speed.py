"""What a run says of its speed."""

from types import SimpleNamespace

import pytest
import torch

from rlhf.engine.speed import Stopwatch, Work, memory_gib, mfu, peak_flops
from rlhf.ppo.log import whole_speed
from rlhf.runs.trial import describe

CPU = torch.device("cpu")


def test_operations_of_a_token_by_hand():
    """Two layers of a 2 x 3 and a 3 x 4 map, roles on the upper one, and an LM head of 5 x 2."""
    linears = [
        SimpleNamespace(in_features=2, out_features=3),
        SimpleNamespace(in_features=3, out_features=4),
    ]
    layer = SimpleNamespace(maps=[SimpleNamespace(bases=linears)])
    decoder = SimpleNamespace(layers=[layer, layer])
    assert Work.of(decoder, 1, torch.zeros(5, 2)) == Work(lower=36, upper=36, head=20)
    assert Work.of(decoder, 0, None) == Work(lower=0, upper=72, head=0)


def test_operations_of_a_step_by_hand():
    """SFT: adapters on all layers, an LM head. Reward: forward-only layers below, no LM head."""
    assert Work(lower=0, upper=100, head=1000).training(7, 3) == 7 * 200 + 3 * 2000
    assert Work(lower=10, upper=100, head=0).training(7, 2) == 7 * 210


def test_mfu_is_of_all_processes_cards(monkeypatch):
    monkeypatch.setattr("rlhf.engine.speed.peak_flops", lambda *_: 100.0)
    monkeypatch.setattr("rlhf.engine.speed.num_processes", lambda: 2)
    assert mfu(300.0, 3.0, CPU, torch.bfloat16) == {"speed/mfu": 0.5}
    monkeypatch.setattr("rlhf.engine.speed.peak_flops", lambda *_: None)
    assert mfu(300.0, 3.0, CPU, torch.bfloat16) == {}


def test_operations_of_an_update_by_hand():
    work = Work(lower=10, upper=100, head=1000)
    rollout = 7 * 110 + 3 * 1000
    measure = 7 * 410 + 3 * 2000
    assert work.ppo_update(7, 3, 0, 0) == rollout + measure
    assert work.ppo_update(7, 3, 0, 2) == rollout + measure + 2 * 2 * 700
    assert work.ppo_update(7, 3, 2, 2) == rollout + measure + 2 * 2 * 700 + 2 * 2 * (700 + 3000)


def test_laps_add_up(monkeypatch):
    times = iter([10.0, 12.0, 12.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch(CPU)
    watch.lap("rollout")
    watch.lap("measure")
    assert watch.seconds == {"rollout": 2.0, "measure": 0.5}


def test_a_pause_belongs_to_no_lap(monkeypatch):
    times = iter([10.0, 11.0, 61.0, 61.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch(CPU)
    with watch.paused():
        pass
    watch.lap("time/step")
    assert watch.seconds == {"time/step": 1.5}


def test_the_peak_is_that_of_a_card_of_exactly_this_name(monkeypatch):
    card = torch.device("cuda")
    for name, peak in (
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(card, torch.bfloat16) == (peak and pytest.approx(peak))
        assert peak_flops(card, torch.float32) is None
    assert peak_flops(CPU, torch.bfloat16) is None and memory_gib(CPU) == {}


def test_the_speed_of_a_whole_run():
    rows = [
        {"update": 0, "eval/scores": 1.0},
        {"episode": 4, "time/rollout": 1.0, "time/measure": 1.0, "speed/tokens_per_second": 100.0},
        {"episode": 8, "time/rollout": 2.0, "time/measure": 4.0, "speed/tokens_per_second": 50.0},
    ]
    assert whole_speed(rows) == {
        "speed/tokens_per_second": 62.5,
        "time/rollout": 3.0,
        "time/measure": 5.0,
    }


def test_what_a_few_steps_say_of_a_whole_run():
    step = {"step": 2, "loss": 1.0, "time/step": 2.0, "speed/tokens_per_second": 1500.0}
    said = describe([step, step | {"time/step": 4.0}, step | {"time/step": 3.0}], 1024, 2400)
    assert "3 steps: 1,500 tokens/s, 3.0 s a step, micro-batches of 1,024 tokens" in said
    assert "2,400 steps would take 2.0 hours" in said
    ppo = {
        "time/rollout": 2.0,
        "time/measure": 0.5,
        "time/optimise": 1.5,
        "speed/tokens_per_second": 10.0,
        "speed/mfu": 0.25,
    }
    said = describe([ppo], 1024, 30)
    assert "4.0 s a step (rollout 2.0, measure 0.5, optimise 1.5), MFU 25%" in said
    assert "30 steps would take 2 minutes" in said
