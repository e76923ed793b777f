"""What varies is found, and means, deviations and paired differences are those of numpy and scipy."""

import csv
import json
import math

import numpy as np
import pytest
from scipy import stats

from comparison.collect import collect
from comparison.groups import group, other_images, other_matching, shown, varied_settings
from comparison.tables import as_csv
from runs.build import SettingError
from tests.comparison.directories import DDPM, DDPM_SETTINGS, NATS, write_run, write_sweep


def runs_of(*patterns):
    return collect([str(pattern) for pattern in patterns])[0]


def varied(root):
    return varied_settings(runs_of(root))


def test_means_deviations_and_paired_differences_by_hand(tmp_path):
    figures = write_sweep(tmp_path)
    groups = group(runs_of(tmp_path), None, "test/bpd")
    assert list(groups[0].values) == ["model/schedule", "model/weighting"]
    assert len(groups) == 6
    assert [one.mean for one in groups] == sorted(one.mean for one in groups)
    best = np.array([figures[(*groups[0].values.values(), seed)] for seed in range(3)])
    assert (groups[0].difference, groups[0].common_seeds) == ((0.0, 0.0), 0)
    for one in groups:
        own = np.array([figures[(*one.values.values(), seed)] for seed in range(3)])
        assert one.figures == own.tolist()
        assert one.mean == pytest.approx(own.mean())
        assert one.deviation == pytest.approx(own.std(ddof=1))
        if one is not groups[0]:
            interval = stats.ttest_rel(own, best).confidence_interval(0.95)
            mean, half = one.difference
            assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
            assert one.common_seeds == 3


def test_unequal_seeds_are_paired_over_the_common_ones(tmp_path):
    seeds = {1.0: {0: 1.0, 1: 1.1, 2: 1.3, 9: 1.0}, 2.0: {2: 2.0, 0: 1.9, 5: 3.0}, 3.0: {1: 4.0}, 4.0: {7: 5.0}}
    for beta, figures in seeds.items():
        for seed, figure in figures.items():
            write_run(tmp_path / f"{beta}-{seed}", figure, seed, settings={"model.beta": beta})
    groups = group(runs_of(tmp_path), None, "test/bpd")
    assert [one.values["model.beta"] for one in groups] == [1.0, 2.0, 3.0, 4.0]
    assert [one.common_seeds for one in groups] == [0, 2, 1, 0]
    pairs = np.array([1.9 - 1.0, 2.0 - 1.3])
    half = stats.t.ppf(0.975, 1) * pairs.std(ddof=1) / math.sqrt(2)
    assert groups[1].difference == pytest.approx((pairs.mean(), half))
    assert groups[2].difference == pytest.approx((2.9, math.nan), nan_ok=True)
    assert all(map(math.isnan, groups[3].difference))
    assert math.isnan(groups[3].deviation)


def test_groups_that_pool_settings_are_paired_by_the_mean_of_each_seed(tmp_path):
    figures = write_sweep(tmp_path)
    groups = group(runs_of(tmp_path), ["model/weighting"], "test/bpd")
    assert [one.values for one in groups] == [{"model/weighting": "elbo"}, {"model/weighting": "simple"}]
    assert [len(one.runs) for one in groups] == [9, 9]
    means = {
        weighting: np.array(
            [np.mean([v for (_, w, s), v in figures.items() if (w, s) == (weighting, seed)]) for seed in range(3)]
        )
        for weighting in ("elbo", "simple")
    }
    interval = stats.ttest_rel(means["simple"], means["elbo"]).confidence_interval(0.95)
    mean, half = groups[1].difference
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert groups[1].common_seeds == 3


@pytest.mark.parametrize("metric", ["test/elbo", "test/reconstruction"])
def test_a_higher_bound_is_better(metric, tmp_path):
    for beta, figure in ((1.0, 2.5), (2.0, 2.0), (3.0, 3.0)):
        write_run(tmp_path / str(beta), figure, settings={"model.beta": beta})
    groups = group(runs_of(tmp_path), None, metric)
    assert [one.values["model.beta"] for one in groups] == [2.0, 1.0, 3.0]
    assert groups[1].difference[0] < 0
    if metric == "test/elbo":
        assert groups[0].mean == pytest.approx(-2.0 * NATS)


def test_the_metric_decides_the_order_and_val_bpd_is_the_objective(tmp_path):
    write_run(tmp_path / "a", 2.0)
    groups = group(runs_of(tmp_path), None, "val/bpd")
    assert groups[0].mean == pytest.approx(1.99)
    assert groups[0].label == "a"


def test_seeds_and_paths_never_tell_groups_apart(tmp_path):
    for seed in range(3):
        incidental = {
            "data.root": f"data{seed}", "data.download": bool(seed), "trainer.enable_progress_bar": bool(seed),
            "callbacks.pictures.num": seed, "paths.output_dir": f"out{seed}",
        }  # fmt: skip
        write_run(tmp_path / f"{seed}", 2.0, seed, {"logger": ("csv", "wandb", "tensorboard")[seed]}, incidental)
    assert varied(tmp_path) == []
    assert len(group(runs_of(tmp_path), None, "test/bpd")) == 1


def test_where_a_run_was_computed_tells_groups_apart_only_if_asked_for(tmp_path):
    for devices in (1, 2):
        where = {
            "trainer.devices": devices, "trainer.accelerator": ("cpu", "gpu")[devices - 1], "trainer.num_nodes": devices,
            "trainer.strategy": {"_target_": "DDP", "broadcast_buffers": False} if devices == 2 else "auto",
            "trainer.log_every_n_steps": devices,
        }  # fmt: skip
        write_run(tmp_path / f"{devices}", 1.0 + devices, devices, {"trainer": ("default", "ddp")[devices - 1]}, where)
    assert varied(tmp_path) == []
    assert [one.mean for one in group(runs_of(tmp_path), None, "test/bpd")] == [2.5]
    apart = group(runs_of(tmp_path), ["trainer.devices"], "test/bpd")
    assert [(one.values["trainer.devices"], one.mean) for one in apart] == [(1, 2.0), (2, 3.0)]
    write_run(tmp_path / "bf16", settings={"trainer.precision": "bf16-mixed"})  # moves figures a little: it counts
    assert varied(tmp_path) == ["trainer.precision"]


def test_how_pictures_are_drawn_tells_no_groups_apart(tmp_path):
    for seed, sampler in enumerate(("ancestral", "ddim")):
        settings = {**DDPM_SETTINGS, "model.sampler": {"_target_": f"diffusion.{sampler}"}}
        write_run(tmp_path / sampler, 2.0 + seed, seed, {**DDPM, "model/sampler": sampler}, settings)
    (pooled,) = group(runs_of(tmp_path), None, "test/bpd")
    assert pooled.mean == 2.5
    assert len(group(runs_of(tmp_path), ["model/sampler"], "test/bpd")) == 2


def test_what_varies_is_of_the_runs_that_have_the_figure(tmp_path):
    for beta in (1.0, 2.0):
        write_run(tmp_path / f"{beta}", beta, settings={"model.beta": beta})
    write_run(tmp_path / "continuous", 90.0, choices={"data": "gaussian"}, continuous=True)
    assert [list(one.values) for one in group(runs_of(tmp_path), None, "test/bpd")] == 2 * [["model.beta"]]


def test_log_ratios_of_drawn_chains_beside_kls_are_said(tmp_path):
    runs = [write_run(tmp_path / f"{beta}", beta, settings={"model.beta": beta}) for beta in (1.0, 2.0)]
    found = []
    for kinds in ((False, False), (True, True), (False, True)):
        for run, kind in zip(runs, kinds, strict=True):
            is_tested_on(run, consistency=kind)
        found.append(other_matching(group(runs_of(tmp_path / "*"), None, "test/bpd")))
    assert found[:2] == [None, None]
    assert found[2].endswith("compares with no sum of KLs, of: beta=2.0")


def test_a_label_leaves_out_what_its_runs_do_not_have(tmp_path):
    write_run(tmp_path / "vae", 2.0)
    write_run(tmp_path / "ddpm", 1.0, choices=DDPM, settings=DDPM_SETTINGS)
    groups = group(runs_of(tmp_path / "*"), ["model", "model/schedule", "model.latent_dim"], "test/bpd")
    assert [one.label for one in groups] == ["model=ddpm, schedule=linear", "model=vae, latent_dim=14"]


def test_so_does_where_the_data_lies(tmp_path):
    for place, figure in (("a", 2.0), ("b", 3.0)):
        write_run(tmp_path / place, figure, settings={"data.root": f"/{place}"})
    (pooled,) = group(runs_of(tmp_path), None, "test/bpd")
    assert pooled.mean == 2.5
    apart = group(runs_of(tmp_path), ["data.root"], "test/bpd")
    assert [(one.values["data.root"], one.mean) for one in apart] == [("/a", 2.0), ("/b", 3.0)]


def test_names_that_only_begin_like_incidental_ones_count(tmp_path):
    for number in range(2):
        write_run(tmp_path / f"{number}", settings={"data.seeds_of_plants": number})
    assert varied(tmp_path) == ["data.seeds_of_plants"]


def test_what_a_choice_brings_along_is_not_repeated(tmp_path):
    write_run(tmp_path / "vae")
    write_run(tmp_path / "ddpm", choices=DDPM, settings=DDPM_SETTINGS)
    assert varied(tmp_path) == ["model"]


def test_what_varies_within_a_choice_is_found(tmp_path):
    """model=vae,mhvae model.beta=1,4: groups that pooled beta would be means of different things."""
    for model in ("vae", "mhvae"):
        for beta in (1.0, 4.0):
            own = {"model._target_": model, "model.beta": beta, "model.depth": 2 if model == "mhvae" else None}
            write_run(tmp_path / f"{model}{beta}", 2.0 + beta, choices={"model": model}, settings=own)
    assert varied(tmp_path) == ["model", "model.beta"]
    assert len(group(runs_of(tmp_path), None, "test/bpd")) == 4


def test_a_sweep_of_one_model_beside_another_model(tmp_path):
    write_run(tmp_path / "vae")
    write_sweep(tmp_path / "sweep", seeds=(0,))
    assert varied(tmp_path) == ["model", "model/schedule", "model/weighting"]
    groups = group(runs_of(tmp_path), None, "test/bpd")
    assert len(groups) == 7
    vae = next(one for one in groups if one.values["model"] == "vae")
    assert vae.label == "model=vae"


def test_what_the_data_decides_in_the_model_is_not_repeated(tmp_path):
    for data, levels, network in (("digits", 17, "mlp"), ("mnist", 256, "unet_28x28")):
        for seed in range(2):
            write_run(
                tmp_path / f"{data}{seed}", 2.0, seed,
                {**DDPM, "data": data, "recipe/ddpm@model": data, "model/network": network},
                {
                    **DDPM_SETTINGS, "data.levels": levels, "model.levels": levels, "model.image_shape": [1, levels, levels],
                    "data.image_shape": [1, levels, levels], "data.batch_size": levels, "model.network._target_": network,
                    "model.optimizer.lr": 1 / levels,
                },
            )  # fmt: skip
    assert varied(tmp_path) == ["data"]


def test_binarization_alone_decides_the_levels(tmp_path):
    for name, levels in (("none", 256), ("static", 2)):
        own = {
            "data.binarization.levels": levels,
            "data.levels": levels,
            "model.levels": levels,
            "model.likelihood.levels": levels,
        }
        write_run(tmp_path / name, choices={"data/binarization": name}, settings=own)
    assert varied(tmp_path) == ["data/binarization"]


def test_a_number_set_in_the_data_is_not_repeated_by_the_model(tmp_path):
    for levels in (4, 17):
        own = {"data.levels": levels, "model.levels": levels, "model.likelihood.levels": levels}
        write_run(tmp_path / f"{levels}", settings=own)
    assert varied(tmp_path) == ["data.levels"]


def test_an_experiment_says_all_that_it_sets(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", choices={"experiment": "big", "model/encoder": "conv"}, settings={"model.latent_dim": 64})
    assert varied(tmp_path) == ["experiment"]


def test_lists_and_equal_numbers(tmp_path):
    for number, (beta, betas) in enumerate([(1, [0.9, 0.99]), (1.0, [0.9, 0.99]), (1.0, [0.9, 0.999])]):
        write_run(tmp_path / f"{number}", settings={"model.beta": beta, "model.optimizer.betas": betas})
    assert varied(tmp_path) == ["model.optimizer.betas"]
    groups = group(runs_of(tmp_path), None, "test/bpd")
    assert sorted(len(one.runs) for one in groups) == [1, 2]
    assert [len(one.runs) for one in group(runs_of(tmp_path), ["model.beta"], "test/bpd")] == [3]


def test_labels_tell_settings_of_one_name_apart(tmp_path):
    for dropout in (0.1, 0.2):
        write_run(tmp_path / f"{dropout}", settings={"model.encoder.dropout": dropout, "model.decoder.dropout": 2 * dropout})
    labels = [one.label for one in group(runs_of(tmp_path), None, "test/bpd")]
    assert labels == [
        "model.decoder.dropout=0.2, model.encoder.dropout=0.1",
        "model.decoder.dropout=0.4, model.encoder.dropout=0.2",
    ]
    assert (shown(None), shown(0), shown("x")) == ("–", "0", "x")


def test_a_setting_that_is_null_is_told_from_one_that_is_not_there(tmp_path):
    for name, calls in (("all", "null"), ("some", 8)):
        write_run(tmp_path / name, choices=DDPM, settings={**DDPM_SETTINGS, "model.test_calls": 8})
        path = tmp_path / name / "config.yaml"
        path.write_text(path.read_text().replace("test_calls: 8", f"test_calls: {calls}"))
    write_run(tmp_path / "vae")
    groups = group(runs_of(tmp_path), ["model.test_calls"], "test/bpd")
    assert sorted(shown(one.values["model.test_calls"]) for one in groups) == ["8", "null", "–"]
    assert "test_calls=null" in [one.label for one in groups]
    (alone,) = group(runs_of(tmp_path / "all"), ["model.test_calls"], "test/bpd")
    assert alone.label == "test_calls=null"


def test_by_and_metric_that_name_nothing_are_refused_in_one_sentence(tmp_path):
    write_sweep(tmp_path, seeds=(0,))
    with pytest.raises(SettingError, match=r"by=model/nope is no setting.*model/schedule, model/weighting") as error:
        group(runs_of(tmp_path), ["model/nope"], "test/bpd")
    assert "\n" not in str(error.value)
    with pytest.raises(SettingError, match=r"metric=test/nope is in none.*val/bpd, .*test/elbo"):
        group(runs_of(tmp_path), None, "test/nope")
    assert len(group(runs_of(tmp_path), ["model/schedule", "seed"], "test/bpd")) == 3


PROTOCOL = {"dataset": "digits", "image_shape": [1, 8, 8], "levels": 17, "num_test": 180}


def is_tested_on(run, **protocol):
    record = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**record, "protocol": {**PROTOCOL, **protocol}}))


def test_figures_on_other_images_are_said_to_rank_nothing(tmp_path):
    runs = [write_run(tmp_path / str(number), 2.0 + number, number) for number in range(3)]

    def found(*others):
        for run, other in zip(runs, others, strict=True):
            is_tested_on(run, estimator=str(run), **other)
        return other_images(group(runs_of(tmp_path / "*"), None, "test/bpd"))

    assert found({}, {}, {"num_tested": 180}) is None  # how they were estimated may differ, and all were tested
    few = found({}, {}, {"num_tested": 128})
    assert few.endswith("rank no models: digits (128 of 180 images, 1x8x8); digits (180 images, 1x8x8)")
    assert "mnist (180 images, 1x28x28)" in found({}, {"dataset": "mnist", "image_shape": [1, 28, 28]}, {})
    assert found({}, {}, {"split_seed": 1}).endswith("of one name, but other files, splits, levels or binarisation")
    assert found({"files_sha256": "a"}, {"files_sha256": "a"}, {"files_sha256": "b"}) is not None


def test_models_are_ranked_among_those_on_the_same_images(tmp_path):
    for seed in range(3):
        for size, cost in ((14, 2.0), (7, 2.5), (3, 3.0)):
            sizes = {"model.latent_dim": size}
            is_tested_on(write_run(tmp_path / f"digits{size}{seed}", cost + seed / 10, seed, settings=sizes))
            mnist = write_run(tmp_path / f"mnist{size}{seed}", 1 / cost + seed / 10, seed, {"data": "mnist"}, sizes)
            is_tested_on(mnist, dataset="mnist")
    groups = group(runs_of(tmp_path / "*"), None, "test/bpd")
    rows = [(*one.values.values(), one.is_best) for one in groups]
    assert rows == [
        ("digits", 14, True), ("digits", 7, False), ("digits", 3, False),
        ("mnist", 3, True), ("mnist", 7, False), ("mnist", 14, False),
    ]  # fmt: skip
    differences = [0, 0.5, 1, 0, 1 / 2.5 - 1 / 3, 1 / 2 - 1 / 3]
    assert [one.difference[0] for one in groups] == pytest.approx(differences)
    assert "each ranked by itself: digits (180 images, 1x8x8); mnist" in other_images(groups)
    assert [row["difference"] == "" for row in csv.DictReader(as_csv(groups, "test/bpd").splitlines())] == [
        row[2] for row in rows
    ]
    pooled = group(runs_of(tmp_path / "*"), ["model.latent_dim"], "test/bpd")
    assert [one.is_best for one in pooled] == [True, False, False]  # means over both data sets, as was asked for
    assert "rank no models" in other_images(pooled)


def test_a_run_by_the_config_of_another_is_of_its_group(tmp_path):
    write_run(tmp_path / "first", 2.0, seed=0, settings={"model.beta": 1.0})
    write_run(tmp_path / "other", 2.2, seed=0, settings={"model.beta": 2.0})
    write_run(tmp_path / "again", 2.1, seed=1, settings={"model.beta": 1.0})
    record = json.loads((tmp_path / "again" / "result.json").read_text())
    (tmp_path / "again" / "result.json").write_text(json.dumps({**record, "choices": {"hydra": None}}))
    groups = group(runs_of(tmp_path), None, "test/bpd")
    assert [(one.values, one.figures) for one in groups] == [({"model.beta": 1.0}, [2.0, 2.1]), ({"model.beta": 2.0}, [2.2])]
