"""Ctrl-C waits for the end of a step; nothing else is changed about it."""

import os
import signal
from types import SimpleNamespace

import pytest

from callbacks import WholeSteps


def trainer_of(devices=1):
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False))
    return SimpleNamespace(world_size=devices, _signal_connector=SimpleNamespace(received_sigterm=False), fit_loop=loop)


@pytest.fixture(autouse=True)
def _usual():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def started(devices=1):
    trainer, callback = trainer_of(devices), WholeSteps()
    callback.on_train_start(trainer, None)
    return trainer, callback


def step(trainer, callback, during=lambda: None):
    """Whether training stops after the step."""
    during()
    callback.on_train_batch_end(trainer, None, None, None, 0)
    return trainer._signal_connector.received_sigterm


def test_the_step_is_completed_first():
    reached = []

    def during():
        ctrl_c()
        reached.append(True)

    trainer, callback = started()
    assert step(trainer, callback, during)
    assert reached
    assert callback.stopped_by == signal.SIGINT


def test_the_next_training_is_not_stopped_by_it():
    trainer, callback = started()
    assert step(trainer, callback, ctrl_c)
    trainer = trainer_of()
    callback.on_train_start(trainer, None)
    callback.on_validation_start(trainer, None)
    callback.on_validation_epoch_end(trainer, None)
    callback.on_validation_end(trainer, None)
    assert not step(trainer, callback)
    assert not callback.stopped_by


def test_the_second_one_does_not_wait():
    reached = []

    def during():
        ctrl_c()
        ctrl_c()
        reached.append(True)

    with pytest.raises(KeyboardInterrupt):
        step(*started(), during)
    assert not reached


def test_between_steps_it_waits_for_the_next():
    trainer, callback = started()
    assert not step(trainer, callback)
    ctrl_c()
    assert step(trainer, callback)


def test_a_validation_is_cut_off_but_for_one_it_came_just_before():
    trainer, callback = started()
    callback.on_validation_start(trainer, None)
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    for before in (lambda trainer, callback: ctrl_c(), lambda trainer, callback: step(trainer, callback, ctrl_c)):
        trainer, callback = started()
        before(trainer, callback)
        callback.on_validation_start(trainer, None)
        assert not trainer._signal_connector.received_sigterm
        callback.on_validation_end(trainer, None)
        assert trainer._signal_connector.received_sigterm


def test_the_saving_after_a_validation_is_not_cut():
    trainer, callback = started()
    callback.on_validation_start(trainer, None)
    callback.on_validation_epoch_end(trainer, None)
    ctrl_c()
    callback.on_validation_end(trainer, None)
    assert trainer._signal_connector.received_sigterm


def test_gradients_that_are_being_accumulated_become_a_step_first():
    trainer, callback = started()
    trainer.fit_loop.epoch_loop._should_accumulate = lambda: True
    assert not step(trainer, callback, ctrl_c)
    trainer.fit_loop.epoch_loop._should_accumulate = lambda: False
    assert step(trainer, callback)


def test_sigterm_waits_for_that_step_too():
    trainer, callback = started()
    trainer.fit_loop.epoch_loop._should_accumulate = lambda: True
    trainer._signal_connector.received_sigterm = True
    assert not step(trainer, callback)
    assert not step(trainer, callback)
    trainer.fit_loop.epoch_loop._should_accumulate = lambda: False
    assert step(trainer, callback)
    assert not callback.stopped_by


def test_after_the_last_step_it_stops_what_would_follow():
    trainer, callback = started()
    ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        callback.on_train_end(trainer, None)


def test_after_training_after_errors_and_on_several_devices_it_is_given_back():
    for end in (
        lambda trainer, callback: callback.on_train_end(trainer, None),
        lambda trainer, callback: callback.on_exception(trainer, None, ValueError()),
    ):
        trainer, callback = started()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        end(trainer, callback)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    started(2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_others_have_set_since_stays():
    trainer, callback = started()
    others = signal.signal(signal.SIGINT, signal.SIG_DFL)
    assert others != signal.SIG_DFL
    callback.on_train_end(trainer, None)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_where_it_is_ignored_it_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert not step(*started(), ctrl_c)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
