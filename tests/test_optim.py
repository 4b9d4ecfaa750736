"""Optimizer, schedule and log: nothing is changed by what is not finite, and no rate jumps."""

import itertools
import math
import sys

import pytest
import torch
from training_runs import losses, store_fixture, train_small  # noqa: F401

from minecraft_jepa.training import optim


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_no_weight(value):
    layer = torch.nn.Linear(2, 2)
    optimizer = optim.make_optimizer({layer: 1.0}, 0.1, 0.1)
    before = [p.detach().clone() for p in layer.parameters()]
    layer(torch.ones(1, 2)).sum().backward()
    layer.weight.grad[0, 0] = value
    assert not math.isfinite(optim.optimizer_step(0.5, optimizer, 0.1, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))
    assert not optimizer.state
    assert layer.weight.grad is None


def test_the_learning_rate_does_not_jump_when_the_end_is_moved():
    schedule, rates = optim.Schedule(1000, 1000), []
    ends = {50: 200, 60: 150, 70: 5000, 400: 420}
    for step in range(10_000):
        if step >= schedule.end_step:
            break
        rates.append(optim.cosine_lr(schedule.position(step), schedule.schedule_length, 1.0, 0.05))
        if step + 1 in ends:
            schedule.move(step + 1, ends[step + 1])
    assert len(rates) == 420
    assert rates[-1] < 0.02
    # Each is the next of the one before.
    assert all(0.9 * a < b < 1.1 * a + 0.02 for a, b in itertools.pairwise(rates[:-15]))


def test_a_run_without_a_time_limit_has_its_own_steps():
    schedule = optim.Schedule(7, 7)
    assert [schedule.position(step) for step in range(7)] == list(range(7))


def test_a_schedule_of_an_older_checkpoint_is_read():
    stored = {"steps": 70, "plan": 100, "since": 40, "at": 40.0}
    schedule = optim.Schedule.from_metadata(stored)
    assert (schedule.position(55), schedule.to_metadata()) == (70, stored)


@pytest.mark.parametrize("broken", ["import", "made", "used"])
def test_a_broken_tensorboard_does_not_end_a_training(store, tmp_path, monkeypatch, capsys, broken):
    def fail(*_, **__):
        raise RuntimeError("of another build")

    class Writer:
        add_scalar = add_image = close = fail

    class Module:
        def __getattr__(self, name):
            if broken == "import" or name != "SummaryWriter":
                fail()
            return fail if broken == "made" else lambda *_, **__: Writer()

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Module())
    train_small(store, tmp_path, steps=2, evaluate_every=2)
    message = "TensorBoard does not work here (RuntimeError: of another build); the log goes on"
    assert capsys.readouterr().out.count(message) == 1
    assert len(losses(tmp_path)) == 2
