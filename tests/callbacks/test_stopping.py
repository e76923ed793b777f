"""A rank that is asked to stop waits for the others, but not for ever."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from callbacks import StopTogether, stopping

RANKS = SimpleNamespace(
    world_size=2,
    global_step=20,
    log_every_n_steps=10,
    strategy=SimpleNamespace(reduce=lambda value, reduce_op: value),
    fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()),
    _signal_connector=SimpleNamespace(received_sigterm=False),
)
MODULE = torch.nn.Linear(1, 1)
MODULE.device = torch.device("cpu")
MODULE.told = 0


def before_stop():
    assert not RANKS._signal_connector.received_sigterm
    MODULE.told += 1


MODULE.before_stop = before_stop


@pytest.fixture
def callback():
    before = signal.getsignal(signal.SIGTERM)
    callback = StopTogether()
    callback.on_train_start(RANKS, MODULE)
    yield callback
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_is_sent_twice_is_one_request(callback):
    terminate()
    terminate()
    callback.on_train_batch_end(RANKS, MODULE, None, None, 0)
    assert callback.stopped_by == signal.SIGTERM
    assert RANKS._signal_connector.received_sigterm
    assert MODULE.told == 1  # before anything is saved


def test_the_next_training_is_not_stopped_by_it(callback):
    RANKS._signal_connector.received_sigterm = False
    terminate()
    callback.on_train_batch_end(RANKS, MODULE, None, None, 0)
    assert callback.stopped_by == signal.SIGTERM
    RANKS._signal_connector.received_sigterm = False
    callback.on_train_start(RANKS, MODULE)
    callback.on_train_batch_end(RANKS, MODULE, None, None, 0)
    callback.on_validation_end(RANKS, MODULE)
    callback.on_train_end(RANKS, MODULE)
    assert not RANKS._signal_connector.received_sigterm
    assert not callback.stopped_by


def test_a_thread_that_cannot_listen_does_not():
    before = signal.getsignal(signal.SIGTERM)
    with ThreadPoolExecutor() as pool:
        pool.submit(StopTogether().on_train_start, RANKS, MODULE).result()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("begin", ["on_test_start", "on_validation_start"])
def test_where_ranks_do_not_agree_one_ends_by_itself_and_tells_those_that_it_has_begun(begin):
    told = []
    control = SimpleNamespace(received_sigterm=False)
    strategy = SimpleNamespace(launcher=SimpleNamespace(kill=told.append))
    ranks = SimpleNamespace(world_size=2, strategy=strategy, _signal_connector=control, received_sigterm=False)
    before = signal.getsignal(signal.SIGTERM)
    try:
        getattr(StopTogether(), begin)(ranks, MODULE)
        terminate()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert control.received_sigterm  # looked at after this batch
    assert told == [signal.SIGTERM]


def test_a_validation_in_training_leaves_the_decision_to_all_ranks(callback):
    callback.on_validation_start(RANKS, MODULE)
    RANKS._signal_connector.received_sigterm = False
    terminate()
    assert not RANKS._signal_connector.received_sigterm
    callback.on_train_batch_end(RANKS, MODULE, None, None, 0)
    assert callback.stopped_by == signal.SIGTERM


def test_a_rank_that_hangs_is_ended_by_a_later_one(monkeypatch):
    child = os.fork()
    if not child:
        monkeypatch.setattr(stopping, "PATIENCE", -1.0)
        callback = StopTogether()
        callback.on_train_start(RANKS, MODULE)
        terminate()
        terminate()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM


@pytest.mark.parametrize(("array", "job"), [({}, "12"), ({"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5"}, "7_5")])
def test_a_task_of_an_array_is_requeued_by_its_own_name(array, job, monkeypatch):
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_JOB_ID": "12", **array}.items():
        monkeypatch.setenv(name, value)
    asked, callback = [], StopTogether(requeue=True)
    monkeypatch.setattr(stopping.subprocess, "run", lambda command, check: asked.append(command))
    callback.stopped_by = signal.SIGUSR1
    callback.on_exception(SimpleNamespace(callbacks=[], is_global_zero=True, global_step=3), torch.nn.Linear(1, 1), None)
    assert asked == [["scontrol", "requeue", job]]
