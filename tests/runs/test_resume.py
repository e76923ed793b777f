"""A run that stops in the middle of an epoch goes on with the next batch, and ends as if it had not stopped."""

import csv
import itertools
import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from callbacks import SeededBatches, Vitals
from callbacks.checkpoints import WholeFiles
from lightning_modules import VAELightningModule
from runs.build import SettingError
from runs.resuming import find_checkpoint, same_images
from tests.data_files import pictures, write_folder
from tests.evaluation.evaluations import evaluate_here
from tests.jobs import result, run_here

COMMON = (
    "model=vae", "logger=csv", "callbacks.pictures=null", "trainer.max_epochs=3", "trainer.val_check_interval=4",
)  # fmt: skip


def last(directory):
    return torch.load(directory / "run/checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    run_here(directory, *COMMON)
    return directory


def rows(directory):
    """Returns what was logged, but for how fast it went."""
    with (directory / "run/metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if "per_second" not in name} for row in csv.DictReader(file)]


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def interrupted_at_once():
    raise KeyboardInterrupt


def killed():
    raise RuntimeError


@pytest.fixture(autouse=True)
def _heed_ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning ignores it after the first


@pytest.mark.parametrize(
    ("stop", "batch", "goes_on_at"),
    [
        (ctrl_c, 3, 4),  # digits have 11 batches an epoch, and here a validation after 4 and 8 of them
        (ctrl_c, 14, 15),  # after a step that is logged
        (ctrl_c, 16, 17),
        (ctrl_c, 21, 22),
        (interrupted_at_once, 16, 16),
        (interrupted_at_once, 11, 11),
        (killed, 18, 15),  # what the last validation saved is all there is
        (killed, 29, 26),  # and not the row of step 28
    ],
)
def test_mid_epoch_is_exact(stop, batch, goes_on_at, uninterrupted, tmp_path, monkeypatch):
    usual, count = VAELightningModule.training_step, itertools.count()

    def stops(self, *args):
        if next(count) == batch:
            stop()
        return usual(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "training_step", stops)
        with pytest.raises((SystemExit, KeyboardInterrupt, RuntimeError)):
            run_here(tmp_path, *COMMON)
    assert last(tmp_path)["global_step"] == goes_on_at
    run_here(tmp_path, *COMMON, "ckpt=last")
    here, there = last(uninterrupted), last(tmp_path)
    assert here["global_step"] == there["global_step"] == 33
    for key in ("state_dict", "optimizer_states"):
        assert same(here[key], there[key])
    assert rows(tmp_path) == rows(uninterrupted)


SHORT = (
    "model=vae",
    "logger=csv",
    "callbacks.pictures=null",
    "trainer.max_epochs=6",
    "trainer.check_val_every_n_epoch=2",
)


@pytest.fixture(scope="module")
def six_epochs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("six")
    run_here(directory, *SHORT)
    return directory


def interrupt(directory, settings, hook, places, monkeypatch):
    """Runs and goes on, each time until Ctrl-C comes in ``hook`` at the next of these steps; then to the end."""
    for place in places:
        usual, sent = getattr(SeededBatches, hook), itertools.count()

        def stops(self, trainer, *args, usual=usual, place=place, sent=sent, **kwargs):
            if trainer.global_step == place and not next(sent):
                ctrl_c()
            return usual(self, trainer, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(SeededBatches, hook, stops)
            with pytest.raises((SystemExit, KeyboardInterrupt)):
                run_here(directory, *settings, "ckpt=auto")
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run_here(directory, *settings, "ckpt=auto")


@pytest.mark.parametrize("places", [(10, 30), (21, 43, 54), (9, 10, 11)])
def test_a_run_is_stopped_again_and_again_also_after_the_last_batch_of_an_epoch(places, six_epochs, tmp_path, monkeypatch):
    interrupt(tmp_path, SHORT, "on_train_batch_start", places, monkeypatch)
    assert last(tmp_path)["global_step"] == 66
    assert rows(tmp_path) == rows(six_epochs)
    assert same(last(tmp_path)["state_dict"], last(six_epochs)["state_dict"])


@pytest.mark.parametrize("places", [(22, 44), (22, 22), (66,)])
def test_a_validation_that_is_cut_off_is_done_again_and_no_step_is_lost(places, six_epochs, tmp_path, monkeypatch, capsys):
    interrupt(tmp_path, SHORT, "on_validation_batch_start", places, monkeypatch)
    assert rows(tmp_path) == rows(six_epochs)
    assert same(last(tmp_path)["state_dict"], last(six_epochs)["state_dict"])
    printed = capsys.readouterr().out
    assert all(f"interrupted at step {place}; to go on:" in printed for place in places)


def test_the_last_validation_that_is_cut_off_is_done_again_though_no_step_is_left(tmp_path, monkeypatch):
    settings = (*SHORT, "trainer.max_steps=30")
    run_here(tmp_path / "whole", *settings)
    interrupt(tmp_path / "parts", settings, "on_validation_batch_start", (22, 30), monkeypatch)
    # Lightning counts up the epoch that max_steps end, but for one that it finds ended
    parts, whole = ([row | {"epoch": ""} for row in rows(tmp_path / name)] for name in ("parts", "whole"))
    assert parts == whole
    figures = [result(tmp_path / name / "run") for name in ("parts", "whole")]
    assert figures[0]["objective"] == figures[1]["objective"]
    assert figures[0]["metrics"] == figures[1]["metrics"]
    for last_step in (30, 40):  # it has been done: neither a start without a step left, nor one that trains on, adds to it
        for name in ("parts", "whole"):
            run_here(tmp_path / name, *settings, f"trainer.max_steps={last_step}", "ckpt=last")
        parts, whole = ([row | {"epoch": ""} for row in rows(tmp_path / name)] for name in ("parts", "whole"))
        assert parts == whole


def test_a_sigterm_in_the_last_batch_of_a_validation_that_is_done_again_ends_the_run_before_its_test(tmp_path, monkeypatch):
    usual = SeededBatches.on_validation_batch_start
    for number, kind in ((signal.SIGINT, (SystemExit, KeyboardInterrupt)), (signal.SIGTERM, SIGTERMException)):

        def sends(self, trainer, module, batch, batch_idx, *rest, number=number):
            if batch_idx == 1:  # of two
                os.kill(os.getpid(), number)
            return usual(self, trainer, module, batch, batch_idx, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(SeededBatches, "on_validation_batch_start", sends)
            with pytest.raises(kind):
                run_here(tmp_path, *SHORT, "trainer.max_steps=22", "ckpt=auto")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        assert last(tmp_path)["global_step"] == 22
        assert not (tmp_path / "run" / "result.json").exists()


def test_what_validation_draws_from_is_resumed_too(tmp_path, monkeypatch):
    """The proposal over steps, which a DDPM learns while it trains, decides val/bpd and so what a sweep minimises."""
    settings = (*SHORT[1:], "model=ddpm", "model.num_steps=50", "model.network.hidden_dim=16")
    run_here(tmp_path / "whole", *settings)
    interrupt(tmp_path / "parts", settings, "on_train_batch_start", (15, 36), monkeypatch)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert result(tmp_path / "parts/run")["objective"] == result(tmp_path / "whole/run")["objective"]


def test_a_run_directory_that_was_moved_keeps_its_best(tmp_path):
    run_here(tmp_path, *SHORT)
    best = result(tmp_path / "run")
    (tmp_path / "moved").mkdir()
    (tmp_path / "run").rename(tmp_path / "moved" / "run")
    run_here(tmp_path / "moved", *SHORT, "ckpt=last")  # nothing is left to do but to test
    assert result(tmp_path / "moved/run")["metrics"] == best["metrics"]
    worse = ("model.beta=500", "model.optimizer.lr=0.03")
    run_here(tmp_path / "moved", *SHORT, *worse, "trainer.max_epochs=8", "ckpt=last")
    assert result(tmp_path / "moved/run")["metrics"] == best["metrics"]
    assert result(tmp_path / "moved/run")["objective"] == best["objective"]
    # another run that begins with these weights has a best of its own
    run_here(tmp_path / "other", *SHORT, *worse, "trainer.max_epochs=10", f"ckpt={tmp_path}/moved/run")
    assert result(tmp_path / "other/run")["objective"] > best["objective"]
    assert (tmp_path / "other/run/checkpoints/best.ckpt").exists()


@pytest.mark.parametrize("scheduler", ["constant", "warmup_cosine"])
def test_the_optimisers_settings_are_those_of_the_run_that_goes_on(scheduler, tmp_path):
    settings = (*SHORT, f"model/lr_scheduler={scheduler}", "trainer.log_every_n_steps=1")
    run_here(tmp_path / "one", *settings, "model.optimizer.lr=1e-3", "trainer.max_epochs=2")
    other = ("model.optimizer.lr=5e-4", "model.optimizer.weight_decay=0.3", "trainer.max_epochs=4")
    run_here(tmp_path / "one", *settings, *other, "ckpt=last")
    run_here(tmp_path / "two", *settings, *other)
    rates = [[float(row["train/lr"]) for row in rows(tmp_path / name) if row["train/lr"]] for name in ("one", "two")]
    assert rates[0][22:] == pytest.approx(rates[1][22:], rel=1e-6)
    assert last(tmp_path / "one")["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.3
    with pytest.raises(SettingError, match=r"trained by torch\.optim\.AdamW, here .*SGD"):
        run_here(tmp_path / "one", *settings, "model.optimizer._target_=torch.optim.SGD", "~model.optimizer.betas", "ckpt=last")


def test_without_the_average_the_weights_that_were_trained_go_on(tmp_path):
    run_here(tmp_path, *SHORT, "trainer.max_epochs=2", "callbacks.ema.decay=0.99")
    trained = last(tmp_path)["current_model_state"]
    run_here(tmp_path, *SHORT, "trainer.max_epochs=4", "ckpt=last", "~callbacks.ema", "model.optimizer.lr=1e-12")
    assert all(torch.allclose(value, trained[name], atol=1e-6) for name, value in last(tmp_path)["state_dict"].items())


@pytest.mark.parametrize("setting", ["data.split_seed=7", "~data.split_seed", "data=gaussian"])
def test_a_checkpoint_does_not_go_on_on_images_it_was_not_trained_on(setting, tmp_path):
    run_here(tmp_path, *SHORT, "trainer.max_epochs=2")
    with pytest.raises(SettingError, match=r"other data|another model"):
        run_here(tmp_path, *SHORT, "ckpt=last", setting)


def test_fewer_epochs_than_were_trained_are_refused(tmp_path):
    run_here(tmp_path, *SHORT, "trainer.max_epochs=4")
    with pytest.raises(SettingError, match=r"trainer\.max_epochs=2: ckpt=.* has trained 4 epochs"):
        run_here(tmp_path, *SHORT, "trainer.max_epochs=2", "ckpt=last")


def test_what_is_begun_anew_where_nothing_was_saved_has_its_own_rows_alone(uninterrupted, tmp_path, monkeypatch):
    def stops(self, trainer, *args):
        if trainer.global_step == 21:
            raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(Vitals, "on_train_batch_end", stops, raising=False)
        with pytest.raises(RuntimeError):
            run_here(tmp_path, *COMMON, "+trainer.enable_checkpointing=false")
    run_here(tmp_path, *COMMON, "ckpt=auto")
    assert rows(tmp_path) == rows(uninterrupted)


def test_what_deals_the_batches_otherwise_is_refused_within_an_epoch_and_fewer_steps_are_too(tmp_path):
    run_here(tmp_path, *COMMON, "trainer.max_steps=15")
    with pytest.raises(SettingError, match=r"data\.batch_size=128, not 64"):
        run_here(tmp_path, *COMMON, "data.batch_size=64", "ckpt=last")
    with pytest.raises(SettingError, match=r"data\.seed=0, not 5"):
        run_here(tmp_path, *COMMON, "seed=5", "ckpt=last")
    with pytest.raises(SettingError, match=r"trainer\.max_steps=14: .* has trained 15 steps"):
        run_here(tmp_path, *COMMON, "trainer.max_steps=14", "ckpt=last")
    with pytest.raises(SettingError, match=r"model\.beta=2: .* was trained with 1\.0, and nothing is left to train"):
        run_here(tmp_path, *COMMON, "trainer.max_steps=15", "model.beta=2", "ckpt=last")
    run_here(tmp_path, *COMMON, "trainer.max_steps=18", "model.beta=2", "ckpt=last")
    assert result(tmp_path / "run")["step"] == 18


def test_a_picture_that_joins_the_folder_deals_its_splits_anew_and_is_refused(tmp_path):
    write_folder(tmp_path / "pictures", pictures(50, 8, 8, 3))
    data = ("data=image_folder", "data.image_size=8", f"data.root={tmp_path}/pictures", "data.batch_size=16")
    settings = ("model=vae", "logger=csv", "callbacks.pictures=null", *data)
    run_here(tmp_path, *settings, "trainer.max_epochs=1")
    moved = (tmp_path / "pictures").rename(tmp_path / "moved")
    run_here(tmp_path, *settings, f"data.root={moved}", "trainer.max_epochs=2", "ckpt=last")
    assert evaluate_here(tmp_path / "run", "replicates=1", "pictures=false", "balance=false")[0] > 0
    (moved / "000.png").rename(moved / "another.png")  # as many as before
    with pytest.raises(SettingError, match=r"ckpt=.* was trained on other images: there files_sha256="):
        run_here(tmp_path, *settings, f"data.root={moved}", "trainer.max_epochs=3", "ckpt=last")
    with pytest.raises(SettingError, match=r"run=.* was trained on other images"):
        evaluate_here(tmp_path / "run")


@pytest.mark.parametrize("length", [("trainer.max_epochs=3",), ("trainer.max_epochs=9", "trainer.max_steps=55")])
@pytest.mark.parametrize("every", [1, 5])
def test_an_epoch_that_ended_is_not_gone_on_with_in_other_batches(every, length, tmp_path):
    settings = ("model=vae", "logger=csv", f"trainer.check_val_every_n_epoch={every}", "trainer.log_every_n_steps=1")
    run_here(tmp_path, *settings, "trainer.max_epochs=1")
    run_here(tmp_path, *settings, *length, "data.batch_size=64", "ckpt=last")
    assert last(tmp_path)["global_step"] == 11 + 2 * 22
    epochs = [int(row["epoch"]) for row in rows(tmp_path) if row["train/loss"]]
    assert epochs == [0] * 11 + [1] * 22 + [2] * 22
    assert [int(row["step"]) for row in rows(tmp_path) if row["train/loss"]] == list(range(55))


def test_another_batch_size_is_refused_after_the_first_batch_too(tmp_path, monkeypatch):
    usual, count = VAELightningModule.training_step, itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "training_step", lambda *args: (next(count) == 11 and ctrl_c(), usual(*args))[1])
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run_here(tmp_path, *COMMON)
    assert last(tmp_path)["global_step"] == 12
    with pytest.raises(SettingError, match="in the middle of an epoch"):
        run_here(tmp_path, *COMMON, "data.batch_size=64", "ckpt=last")


def raise_in_batch(number, monkeypatch, directory, *settings):
    """Runs a job that an error ends in this batch, which is counted from 0."""
    usual, count = VAELightningModule.training_step, itertools.count()

    def stops(self, *args):
        if next(count) == number:
            raise RuntimeError
        return usual(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "training_step", stops)
        with pytest.raises(RuntimeError):
            run_here(directory, *settings)


def test_where_gradients_are_accumulated_each_step_has_one_row_and_validations_within_one_stay(tmp_path, monkeypatch):
    accumulate = (
        *COMMON[:-1],
        "trainer.val_check_interval=6",
        "trainer.accumulate_grad_batches=4",
        "trainer.log_every_n_steps=1",
    )
    run_here(tmp_path / "whole", *accumulate)
    steps = [(int(row["step"]), row["train/loss"] != "") for row in rows(tmp_path / "whole") if not row["test/elbo"]]
    assert steps[:6] == [(0, True), (1, False), (1, True), (2, True), (3, True), (4, False)]
    raise_in_batch(8, monkeypatch, tmp_path / "parts", *accumulate)
    run_here(tmp_path / "parts", *accumulate, "ckpt=last")
    assert [row["step"] for row in rows(tmp_path / "parts")] == [row["step"] for row in rows(tmp_path / "whole")]


def test_gradients_of_a_step_that_a_validation_came_within_are_kept(tmp_path, monkeypatch):
    """Steps of three batches, a validation after each fourth: the second step has one batch behind it then."""
    accumulate = (*COMMON, "trainer.accumulate_grad_batches=3", "trainer.log_every_n_steps=1")
    run_here(tmp_path / "whole", *accumulate)
    raise_in_batch(5, monkeypatch, tmp_path / "parts", *accumulate)
    kept = last(tmp_path / "parts")
    assert (kept["global_step"], kept["begun_step"]["together"]) == (1, 3)
    run_here(tmp_path / "parts", *accumulate, "ckpt=last")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    there, here = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert same(here["current_model_state"], there["current_model_state"])
    assert "begun_step" not in here


def test_a_row_written_where_training_ended_without_a_validation_is_not_in_the_next_one_too(tmp_path):
    settings = (
        "model=vae", "logger=csv", "trainer.limit_val_batches=0", "trainer.max_epochs=-1", "trainer.log_every_n_steps=7",
    )  # fmt: skip
    run_here(tmp_path / "whole", *settings, "trainer.max_steps=21")
    run_here(tmp_path / "parts", *settings, "trainer.max_steps=14")
    run_here(tmp_path / "parts", *settings, "trainer.max_steps=21", "ckpt=last")
    there, here = ([row for row in rows(tmp_path / name) if row["train/loss"]] for name in ("whole", "parts"))
    assert [row["step"] for row in here] == ["6", "13", "20"]
    assert here == there


def test_a_finished_run_that_goes_on_has_no_result_until_it_has_ended_again(tmp_path, monkeypatch):
    settings = ("model=vae", "logger=csv", "callbacks.pictures=null")
    run_here(tmp_path, *settings)
    first = result(tmp_path / "run")
    run_here(tmp_path, *settings, "ckpt=last")
    assert {path.name for path in (tmp_path / "run").glob("result*")} == {"result.json"}  # nothing was left to train
    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "on_train_batch_start", lambda *_: interrupted_at_once())
        with pytest.raises(KeyboardInterrupt):
            run_here(tmp_path, *settings, "ckpt=last", "trainer.max_epochs=3")
    assert {path.name for path in (tmp_path / "run").glob("result*")} == {"result-1.json"}
    run_here(tmp_path, *settings, "ckpt=last", "trainer.max_epochs=3")
    assert result(tmp_path / "run")["step"] == 33
    kept = json.loads((tmp_path / "run" / "result-1.json").read_text())
    assert (kept["step"], kept["metrics"]) == (22, first["metrics"])


def test_a_finished_run_that_is_started_again_has_one_row_of_its_test(tmp_path):
    run_here(tmp_path, *COMMON, "trainer.max_epochs=1")
    before = rows(tmp_path)
    run_here(tmp_path, *COMMON, "trainer.max_epochs=1", "ckpt=auto")
    assert rows(tmp_path) == before


@pytest.mark.parametrize("name", ["best.ckpt", "last.ckpt"])
def test_ctrl_c_while_a_checkpoint_is_written_loses_neither_it_nor_its_figure(name, six_epochs, tmp_path, monkeypatch):
    usual, count = WholeFiles._write, itertools.count()

    def write(how, path):
        if str(path).endswith(name) and next(count) == 2:  # of the last validation
            ctrl_c()
        usual(how, path)

    with monkeypatch.context() as patch:
        patch.setattr(WholeFiles, "_write", staticmethod(write))
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run_here(tmp_path, *SHORT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_here(tmp_path, *SHORT, "ckpt=auto")
    assert rows(tmp_path) == rows(six_epochs)
    assert result(tmp_path / "run")["metrics"] == result(six_epochs / "run")["metrics"]
    best = [torch.load(path / "run/checkpoints/best.ckpt", weights_only=True) for path in (tmp_path, six_epochs)]
    assert best[0]["global_step"] == best[1]["global_step"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_accumulated_gradients_waits_for_their_step(number, tmp_path, monkeypatch):
    settings = (*SHORT, "trainer.accumulate_grad_batches=3", "trainer.max_epochs=4")
    run_here(tmp_path / "whole", *settings)
    usual, count = VAELightningModule.training_step, itertools.count()

    def stops(self, *args):
        if next(count) == 12:
            os.kill(os.getpid(), number)
        return usual(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(VAELightningModule, "training_step", stops)
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            run_here(tmp_path / "parts", *settings)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert last(tmp_path / "parts")["global_step"] == 5  # four of the first epoch, and one of three batches
    run_here(tmp_path / "parts", *settings, "ckpt=auto")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


class Counting(torch.optim.SGD):
    """Keeps a count of its own in its parameter group, as optimisers without schedules do."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.param_groups[0]["k"] = 0

    def step(self, closure=None):
        loss = super().step(closure)
        self.param_groups[0]["k"] += 1
        return loss


def test_an_optimisers_own_state_is_not_set_back(tmp_path):
    settings = (*SHORT, "~model.optimizer.betas", "~model.optimizer.fused", "model.optimizer.lr=1e-3",
                "model.optimizer._target_=tests.runs.test_resume.Counting")  # fmt: skip
    run_here(tmp_path, *settings, "trainer.max_epochs=2")
    run_here(tmp_path, *settings, "trainer.max_epochs=4", "ckpt=last")
    assert last(tmp_path)["optimizer_states"][0]["param_groups"][0]["k"] == 44


def test_a_run_without_settings_of_an_optimiser_goes_on(tmp_path):
    run_here(tmp_path, *SHORT, "~model.optimizer", "trainer.max_epochs=2")
    run_here(tmp_path, *SHORT, "~model.optimizer", "trainer.max_epochs=4", "ckpt=last")
    assert last(tmp_path)["global_step"] == 44


def test_the_last_run_of_a_kind_is_the_newest(tmp_path):
    for age, day in enumerate(("2026-01-02", "2026-01-03", "2026-01-01")):
        path = tmp_path / day / "10-00-00-vae-digits/checkpoints/last.ckpt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    found = find_checkpoint("last", tmp_path / "none", f"{tmp_path}/*/*-vae-digits")
    assert found == tmp_path / "2026-01-02/10-00-00-vae-digits/checkpoints/last.ckpt"


def test_a_directory_that_is_named_is_the_one_that_is_meant(tmp_path):
    with pytest.raises(SettingError, match=r"hydra\.run\.dir=.*typo ckpt=last: there is no"):
        find_checkpoint("last", tmp_path / "typo", None)


def test_images_of_which_an_earlier_version_said_less_may_be_gone_on_with():
    data = SimpleNamespace(fingerprint=lambda: {"num_train": 3, "files_sha256": "ab"})
    same_images(None, data, "ckpt=x")
    same_images({"num_train": 3}, data, "ckpt=x")
    with pytest.raises(SettingError, match=r"ckpt=x was trained on other images: there num_train=4, here 3"):
        same_images({"num_train": 4}, data, "ckpt=x")


def test_activations_may_be_kept_or_not_where_a_run_goes_on(tmp_path):
    unet = ("model=ddpm", "model/network=unet_8x8", "model.network.base_channels=8", "model.num_steps=3", "logger=csv")
    unet += ("callbacks.pictures=null", "trainer.limit_train_batches=2")
    run_here(tmp_path, *unet, "trainer.max_epochs=1")
    run_here(tmp_path, *unet, "trainer.max_epochs=2", "model.network.checkpoint_activations=true", "ckpt=last")
    assert result(tmp_path / "run")["step"] == 4
