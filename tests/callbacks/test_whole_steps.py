"""Ctrl-C waits for the end of a step; nothing else is changed about it."""

import os
import signal
from types import SimpleNamespace

import pytest

from callbacks import WholeSteps

MODULE = SimpleNamespace(on_train_batch_end=lambda *_: None)
ONE, TWO = SimpleNamespace(world_size=1), SimpleNamespace(world_size=2)


@pytest.fixture(autouse=True)
def _usual():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def started(trainer=ONE):
    callback = WholeSteps()
    callback.on_train_start(trainer, None)
    return callback


def step(callback, trainer=ONE, during=lambda: None):
    during()
    callback.on_train_batch_end(trainer, MODULE, None, None, 0)


def test_the_step_is_completed_first():
    reached = []

    def during():
        ctrl_c()
        reached.append(True)

    callback = started()
    with pytest.raises(KeyboardInterrupt):
        step(callback, during=during)
    assert reached
    step(callback)  # asked once, stopped once


def test_the_second_one_does_not_wait():
    reached = []

    def during():
        ctrl_c()
        ctrl_c()
        reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        step(started(), during=during)
    assert not reached


def test_between_steps_it_waits_for_the_next():
    callback = started()
    step(callback)
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        step(callback)


def test_the_row_of_the_step_is_written_first():
    rows = []
    module = SimpleNamespace(on_train_batch_end=lambda outputs, batch, batch_idx: rows.append(batch_idx))
    callback = started()
    callback.on_train_batch_end(ONE, module, None, None, 0)
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_batch_end(ONE, module, None, None, 1)
    assert rows == [1]  # for Lightning to ask for where it goes on


def test_a_validation_is_cut_off_but_for_one_it_came_just_before():
    callback = started()
    callback.on_validation_start(ONE, None)
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    callback = started()
    ctrl_c()
    callback.on_validation_start(ONE, None)
    with pytest.raises(KeyboardInterrupt):
        callback.on_validation_end(ONE, None)


def test_after_the_last_step_it_stops_what_would_follow():
    callback = started()
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_end(ONE, None)


def test_after_training_after_errors_and_on_several_devices_it_is_given_back():
    for end in (
        lambda callback: callback.on_train_end(ONE, None),
        lambda callback: callback.on_exception(ONE, None, ValueError()),
    ):
        callback = started()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        end(callback)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    started(TWO)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_others_have_set_since_stays():
    callback = started()
    others = signal.signal(signal.SIGINT, signal.SIG_DFL)
    assert others != signal.SIG_DFL
    callback.on_train_end(ONE, None)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_where_it_is_ignored_it_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    step(started(), during=ctrl_c)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
