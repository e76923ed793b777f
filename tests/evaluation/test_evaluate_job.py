"""Whole evaluations of small trained runs: what they leave, and what their figures agree with."""

import errno
import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

import evaluation.estimate
import evaluation.extras
from evaluation.extras import extra_lines
from evaluation.flow import ProbabilityFlow
from evaluation.profile import StepMoments
from evaluation.report import steps_record, write_new
from evaluation.rows import Rows
from lightning_modules import LikelihoodModule
from networks import MLPDenoiser
from runs.build import SettingError, build_part
from tests.data_files import pictures, write_folder
from tests.evaluation.evaluations import CPU, QUICK, evaluate_here, record, refuse_constant
from tests.jobs import result, run_here, torchrun

BITS = 1 / (64 * math.log(2))
COSTS = ("reconstruction", "prior", "matching", "elbo")


@pytest.mark.parametrize("name", ["vae", "mhvae", "ddpm"])
def test_an_evaluation_leaves_everything_that_defends_its_figure(name, runs, tmp_path, capsys):
    run = runs.copy(name, tmp_path)
    figure, interrupted = evaluate_here(run, "replicates=3", "iwae_samples=3", "seed=5")
    kept = json.loads((run / "evaluation.json").read_text(), parse_constant=refuse_constant)
    assert not interrupted
    assert not kept["interrupted"]
    assert kept["weights"] == ["ema"]
    own = kept["results"]["ema"]
    for part in (kept, own):
        assert part["bpd"] == figure
    assert set(own["terms"]) == set(COSTS)
    for term in own["terms"].values():
        nats, bits = term["nats"], term["bits_per_dim"]
        assert set(nats) == set(bits) == {"mean", "se", "se_images", "se_noise"}
        assert bits == pytest.approx({key: value * BITS for key, value in nats.items()})
        # by chance, images that hardly differ may vary less than their noise says
        assert nats["se_images"] ** 2 == pytest.approx(max(0, nats["se"] ** 2 - nats["se_noise"] ** 2), rel=1e-6, abs=1e-9)
    for unit in ("nats", "bits_per_dim"):
        means = {term: own["terms"][term][unit]["mean"] for term in COSTS}
        assert sum(means[term] for term in COSTS[:3]) == pytest.approx(means["elbo"], rel=1e-9)
    assert own["terms"]["elbo"]["nats"]["mean"] > 0
    assert figure == own["terms"]["elbo"]["bits_per_dim"]["mean"]
    assert {key: kept[f"bpd_{key}"] for key in ("se", "se_images", "se_noise")} == {
        key: own["terms"]["elbo"]["bits_per_dim"][key] for key in ("se", "se_images", "se_noise")
    }
    assert own["num_images"] == 180
    assert own["replicates"] == 3
    assert own["estimator"]
    assert own["network_calls_per_image"] % 3 == 0
    assert (own["pilot_network_calls"] > 0) == (name == "ddpm")
    assert (kept["seed"], kept["split"], kept["devices"], kept["precision"]) == (5, "test", 1, "32-true")
    assert kept["settings"]["replicates"] == 3
    assert kept["data"]["levels"] == 17
    assert kept["data"]["num_test"] == 180
    assert kept["model"]["image_shape"] == [1, 8, 8]
    assert kept["checkpoint"] == str(run / "checkpoints" / "best.ckpt")
    assert torch.__version__.startswith(kept["versions"]["torch"])
    assert own["iwae"]["samples"] == 3
    assert 1 <= own["iwae"]["effective_samples"] <= 3
    assert own["iwae"]["gap_to_elbo"]["mean"] == pytest.approx(
        own["terms"]["elbo"]["nats"]["mean"] + own["iwae"]["nats"]["mean"], rel=1e-6, abs=1e-6
    )
    pictures = {path.name for path in (run / "plots" / "evaluation").iterdir()}
    printed = capsys.readouterr().out
    assert f"{figure:.4f}" in printed
    assert "noise" in printed
    assert ("matching  Σ ln q/p, z₁..z_{T−1} " in printed) == ("z_1: ln q/p" in printed) == (name == "mhvae")  # in one line
    if name == "ddpm":
        assert pictures == {"kl_per_step.png", "rate_distortion.png", "bits_per_image.png"}
        return
    assert pictures == {"kl_per_unit.png", "bits_per_image.png"}
    levels = own["balance"]["levels"]
    assert len(levels) == (1 if name == "vae" else 2)
    for level in levels:
        assert 0 <= level["active_units"] <= level["units"] == len(level["kl_per_unit"])
        assert sum(level["kl_per_unit"]) == pytest.approx(level["kl"])
    assert ("mutual_information" in own["balance"]) == (name == "vae")


@pytest.mark.parametrize("name", ["vae", "mhvae", "ddpm"])
def test_the_figure_agrees_with_the_runs_own_test(name, runs, tmp_path):
    """One draw for each image there, four here, of one estimator."""
    run = runs.copy(name, tmp_path)
    evaluate_here(run, "replicates=4", *QUICK, *(["evaluation=full"] if name == "ddpm" else []))
    kept, there = record(run), result(run)
    noise = kept["bpd_se_noise"] * math.sqrt(4 + 1)
    assert abs(kept["bpd"] - there["metrics"]["test/bpd"]) < 4 * noise
    assert noise < 0.03
    for term, row in there["costs"].items():
        mine = kept["results"]["ema"]["terms"][term]["bits_per_dim"]
        assert abs(mine["mean"] - row["bits_per_dim"]) < 4 * math.sqrt(5) * mine["se_noise"] + 1e-6, term


def test_both_sets_of_weights_and_every_one_alone(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    figures = {}
    for weights in ("null", "ema", "raw", "both"):
        evaluate_here(run, f"weights={weights}", "replicates=2", *QUICK)
        figures[weights] = {name: part["bpd"] for name, part in record(run)["results"].items()}
    assert list(figures["both"]) == ["ema", "raw"]
    assert figures["both"] == figures["ema"] | figures["raw"]
    assert figures["null"] == figures["ema"]
    assert abs(figures["ema"]["ema"] - figures["raw"]["raw"]) > 1e-3
    assert record(run)["bpd"] == figures["ema"]["ema"]


def test_an_earlier_evaluation_is_kept(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    settings = ("replicates=2", "balance=false", "max_images=20")
    written = []
    for seed in range(3):
        evaluate_here(run, f"seed={seed}", *settings)
        written.append((run / "evaluation.json").read_text())
    assert (run / "evaluation-1.json").read_text() == written[0]
    assert (run / "evaluation-2.json").read_text() == written[1]
    assert [json.loads(text)["seed"] for text in written] == [0, 1, 2]
    assert len({json.loads(text)["bpd"] for text in written}) == 3
    plots = {path.name: len(list(path.iterdir())) for path in (run / "plots").iterdir() if path.is_dir()}
    assert plots == {"evaluation": 1, "evaluation-1": 1, "evaluation-2": 1}
    assert not list(run.glob("*.tmp"))
    assert result(run)["metrics"]["test/bpd"] > 0


def test_the_same_settings_give_the_same_digits_and_batches_change_none_that_count(runs, tmp_path):
    run = runs.copy("ddpm", tmp_path)
    first, _ = evaluate_here(run, *QUICK, "max_images=64")
    torch.manual_seed(99)
    assert evaluate_here(run, *QUICK, "max_images=64")[0] == first
    assert evaluate_here(run, *QUICK, "max_images=64", "batch_size=50", "replicates=2")[0] == pytest.approx(
        evaluate_here(run, *QUICK, "max_images=64", "replicates=2")[0], abs=1e-5
    )
    assert evaluate_here(run, *QUICK, "max_images=64", "seed=1")[0] != first


def test_every_estimator_of_a_ddpm_has_one_mean(runs, tmp_path):
    run, seen = runs.copy("ddpm", tmp_path), {}
    for name, settings in {
        "full": ["evaluation=full", "replicates=4"],
        "stratified": ["evaluation=stratified", "evaluation.calls=8", "replicates=12"],
        "importance": ["evaluation=importance", "evaluation.calls=6", "replicates=12"],
        "importance alone": ["evaluation=importance", "evaluation.calls=6", "replicates=12", "evaluation.control=false"],
        "three_variable": ["evaluation=three_variable", "replicates=4"],
        "default": ["precision=0.01"],
    }.items():
        evaluate_here(run, *settings, f"seed={len(seen)}", *QUICK)  # seeds of their own: shared noise would hide a bias
        seen[name] = record(run)["results"]["ema"]
    calls = {name: part["network_calls_per_image"] for name, part in seen.items()}
    assert calls["full"] == calls["three_variable"] == 4 * 30
    assert calls["stratified"] == 12 * 8
    assert calls["importance"] == calls["importance alone"] == 12 * 6
    assert len({part["estimator"] for part in seen.values()} - {seen["default"]["estimator"]}) == 5
    for name, part in seen.items():
        for term in ("reconstruction", "elbo"):
            one, other = (where["terms"][term]["bits_per_dim"] for where in (part, seen["full"]))
            assert abs(one["mean"] - other["mean"]) < 4 * math.hypot(one["se_noise"], other["se_noise"]) + 1e-9, (name, term)
        assert 0 < part["bpd_se_noise"] < 0.05, name


def test_the_wished_precision_is_reached_and_decides_the_effort(runs, tmp_path):
    run, spent = runs.copy("vae", tmp_path), []
    for precision in (0.02, 0.002):
        evaluate_here(run, f"precision={precision}", *QUICK)
        own = record(run)["results"]["ema"]
        assert own["bpd_se_noise"] < 1.1 * precision
        spent.append(own["replicates"])
    assert 2 <= spent[0] < spent[1]


def test_a_chain_of_few_steps_has_the_wished_precision_too(runs, tmp_path, capsys):
    run, spent = runs.copy("short ddpm", tmp_path), []
    for precision in (0.02, 0.01):
        evaluate_here(run, f"precision={precision}", "evaluation=full", *QUICK)
        assert record(run)["bpd_se_noise"] < 1.1 * precision
        spent.append(record(run)["results"]["ema"]["replicates"])
    assert 2 <= spent[0] < spent[1]
    assert "wished precision" not in capsys.readouterr().out


def test_where_a_pilot_would_cost_too_much_the_table_says_what_the_wished_precision_takes(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation.estimate, "MOST_CALLS", 29)
    run = runs.copy("ddpm", tmp_path)
    evaluate_here(run, "precision=0.004", "evaluation=full", "max_images=60", *QUICK)
    assert record(run)["results"]["ema"]["replicates"] == 2
    (enough,) = re.findall(r"wished\s+precision\s+of\s+the\s+noise:\s+replicates=(\d+)", capsys.readouterr().out)
    noise = record(run)["bpd_se_noise"]
    assert int(enough) == math.ceil(2 * (noise / 0.004) ** 2) > 2
    evaluate_here(run, "precision=1e-9", "evaluation=full", "max_images=8", *QUICK)
    assert re.search(r"wished\s+precision\s+of\s+the\s+noise:\s+more\s+than\s+1,000,000\s+replicates", capsys.readouterr().out)


@pytest.mark.parametrize(("name", "estimator"), [("vae", "default"), ("short ddpm", "full")])
def test_bf16_moves_the_figure_by_less_than_a_thousandth(name, estimator, runs, tmp_path):
    run, common = runs.copy(name, tmp_path), (f"evaluation={estimator}", "replicates=2", *QUICK)
    one, other = (evaluate_here(run, f"fabric.precision={precision}", *common)[0] for precision in ("32-true", "bf16-mixed"))
    assert one != other
    # 1e-3 at the 3.3 bits/dim of a modest model; the chain of 8 barely trained steps reads 12
    assert one == pytest.approx(other, rel=3e-4)
    assert record(run)["precision"] == "bf16-mixed"


@pytest.mark.parametrize("name", ["vae", "ddpm"])
def test_what_is_recorded_as_float64_was_computed_in_it(name, runs, tmp_path, monkeypatch):
    run, seen, to_unit = runs.copy(name, tmp_path), set(), LikelihoodModule.to_unit

    def look(self, x):
        seen.update({to_unit(self, x).dtype, *(parameter.dtype for parameter in self.parameters())})
        return to_unit(self, x)

    monkeypatch.setattr(LikelihoodModule, "to_unit", look)
    figures = [evaluate_here(run, "replicates=2", "max_images=40", "iwae_samples=2", *QUICK)[0]]
    assert seen == {torch.float32}
    seen.clear()
    figures += [evaluate_here(run, "fabric.precision=64-true", "replicates=2", "max_images=40", "iwae_samples=2", *QUICK)[0]]
    assert seen == {torch.float64}
    assert record(run)["precision"] == "64-true"
    assert figures[0] == pytest.approx(figures[1], abs=6 * record(run)["bpd_se_noise"])


def test_products_and_convolutions_are_in_float32_unless_that_is_asked_for(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    try:
        evaluate_here(run, "fabric.float32_matmul_precision=high", "max_images=2", "replicates=2", *QUICK)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        evaluate_here(run, "max_images=2", "replicates=2", *QUICK)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)


def test_an_error_of_one_image_is_not_known(tmp_path, capsys):
    for split, num in {"train": 16, "val": 2, "test": 1}.items():
        write_folder(tmp_path / "pictures" / split, pictures(num, 8, 8, 3))
    data = ("data=image_folder", f"data.root={tmp_path}/pictures", "data.image_size=8", "data.batch_size=8")
    run_here(tmp_path, "model=vae", *data, "logger=csv", "callbacks.pictures=null")
    kept = json.loads((tmp_path / "run/result.json").read_text(), parse_constant=refuse_constant)
    assert kept["metrics"]["test/bpd_se"] is kept["costs"]["elbo"]["nats_se"] is None
    assert kept["metrics"]["test/bpd"] > 0
    assert f"{kept['metrics']['test/bpd']:.4f} ± ?" in capsys.readouterr().out
    with pytest.raises(SettingError, match="split=test holds 1 image:"):
        evaluate_here(tmp_path / "run", *QUICK)
    (tmp_path / "pictures").rename(tmp_path / "moved")
    with pytest.raises(SettingError, match=r"\bdata_root\b"):
        evaluate_here(tmp_path / "run", *QUICK)


def test_one_replicate_two_images_other_splits_and_checkpoints_elsewhere(runs, tmp_path):
    run = runs.copy("mhvae", tmp_path)
    evaluate_here(run, "replicates=1", "max_images=2", "split=val", "pictures=false")
    kept = json.loads((run / "evaluation.json").read_text(), parse_constant=refuse_constant)
    assert kept["bpd_se_noise"] is None
    assert kept["results"]["ema"]["num_images"] == 2
    assert kept["split"] == "val"
    evaluate_here(run, "replicates=1", "split=train", *QUICK)
    assert record(run)["results"]["ema"]["num_images"] == 1437
    elsewhere = (run / "checkpoints" / "last.ckpt").rename(tmp_path / "mine.ckpt")
    evaluate_here(elsewhere, "replicates=1", "max_images=4", *QUICK)
    assert record(tmp_path / "mine-evaluation")["results"]["ema"]["num_images"] == 4


@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_the_shortest_chains_are_evaluated_too(num_steps, runs, tmp_path):
    content = torch.load(runs["ddpm"] / "checkpoints" / "last.ckpt", weights_only=True)
    content["config"]["model"]["num_steps"] = num_steps
    del content["current_model_state"]
    content["state_dict"] = build_part(OmegaConf.create(content["config"]["model"])).state_dict()
    torch.save(content, tmp_path / "short.ckpt")
    kept = {}
    for estimator in ("default", "full", "three_variable"):
        evaluate_here(tmp_path / "short.ckpt", f"evaluation={estimator}", "replicates=3", "max_images=64", f"seed={len(kept)}")
        kept[estimator] = record(tmp_path / "short-evaluation")
        assert list(kept[estimator]["results"]) == ["raw"]
        # other seeds choose other images
        error = math.hypot(kept[estimator]["bpd_se"], kept["default"]["bpd_se"])
        assert abs(kept[estimator]["bpd"] - kept["default"]["bpd"]) < 4 * error
    matching = kept["full"]["results"]["raw"]["terms"]["matching"]["nats"]["mean"]
    assert (matching == 0) == (num_steps == 1)


def test_continuous_data_is_scored_in_nats_and_its_flow_too(tmp_path, capsys):
    run_here(
        tmp_path, "model=ddpm", "data=gaussian", "logger=csv", "callbacks.pictures=null", "trainer.max_epochs=1",
        "model.num_steps=30", "model.network.hidden_dim=32", "data.num_train=512", "data.num_test=64", "data.num_val=64",
    )  # fmt: skip
    run = tmp_path / "run"
    capsys.readouterr()
    figure, _ = evaluate_here(run, "replicates=2", "probability_flow=1", "max_images=8")
    kept = json.loads((run / "evaluation.json").read_text(), parse_constant=refuse_constant)
    own = kept["results"]["ema"]
    assert figure == own["terms"]["elbo"]["nats"]["mean"]
    assert "bpd" not in kept
    assert "bits" not in json.dumps(own)
    assert math.isfinite(own["probability_flow"]["nats"]["mean"])
    assert "not a bound" in own["probability_flow"]["protocol"]
    assert "dequantisation" not in own["probability_flow"]["protocol"]
    printed = capsys.readouterr().out
    assert f"flow: {-own['probability_flow']['nats']['mean']:.4f} ±" in printed  # a cost, as in the table
    assert "log-density" in printed
    assert "bits/dim" not in printed


def test_pixels_have_the_flow_of_a_trained_chain(runs, tmp_path):
    run = runs.copy("ddpm", tmp_path)
    evaluate_here(run, "replicates=2", "probability_flow=2", "max_images=2", *QUICK)
    kept = record(run)["results"]["ema"]["probability_flow"]
    assert kept["dequantisations"] == 2
    assert 0.5 < kept["bits_per_dim"]["mean"] < 30
    assert kept["bits_per_dim"]["mean"] == pytest.approx(-kept["nats"]["mean"] * BITS)
    evaluate_here(run, "replicates=2", "probability_flow=2", "max_images=2", *QUICK)
    assert record(run)["results"]["ema"]["probability_flow"]["nats"] == kept["nats"]
    evaluate_here(run, "replicates=2", "probability_flow=2", "max_images=2", "flow_tolerance=1e-6", *QUICK)
    finer = record(run)["results"]["ema"]["probability_flow"]
    moved = abs(finer["nats"]["mean"] - kept["nats"]["mean"])
    assert 0 < moved < 5 * kept["solver_error_nats"]
    assert finer["solver_error_nats"] < kept["solver_error_nats"] / 2
    assert finer["evaluations"] > kept["evaluations"]
    assert kept["solver_error_images"] == 2  # of each, one dequantisation


def test_ctrl_c_after_the_flow_keeps_it_though_its_error_is_not_known(runs, tmp_path, monkeypatch, capsys):
    run = runs.copy("ddpm", tmp_path)
    usual, calls = ProbabilityFlow.log_likelihood, []

    def interrupted(self, x):
        calls.append(self.tolerance)
        if self.tolerance < 1e-5:
            raise KeyboardInterrupt
        return usual(self, x)

    monkeypatch.setattr(ProbabilityFlow, "log_likelihood", interrupted)
    evaluate_here(run, "replicates=2", "probability_flow=1", "max_images=2", *QUICK)
    kept = record(run)["results"]["ema"]["probability_flow"]
    assert len(calls) == 2
    assert 0.5 < kept["bits_per_dim"]["mean"] < 30
    assert "solver_error_nats" not in kept
    assert "probability flow: " in capsys.readouterr().out


@pytest.mark.parametrize("fails", [1e-5, 1e-6])
def test_a_flow_that_cannot_be_solved_does_not_take_the_bound_with_it(fails, runs, tmp_path, monkeypatch, capsys):
    run = runs.copy("ddpm", tmp_path)
    usual = ProbabilityFlow._drift

    def steep(self, x, log_snr, signs):
        drift, divergence = usual(self, x, log_snr, signs)
        return (1e9 * (1 + x.square()) if self.tolerance == pytest.approx(fails) else drift), divergence

    monkeypatch.setattr(ProbabilityFlow, "_drift", steep)
    figure, interrupted = evaluate_here(run, "replicates=2", "probability_flow=1", "max_images=2", *QUICK)
    kept, printed = record(run)["results"]["ema"], capsys.readouterr().out
    assert not interrupted
    assert kept["bpd"] == figure
    flow = kept["probability_flow"]
    assert ("nats" in flow) == (fails < 1e-5)  # the finer solver only says what the other one may err
    assert "solver_error_nats" not in flow
    assert ("solver failed in batches with 2 of 2 images" in printed) == (fails == 1e-5)


def test_two_ranks_give_the_figures_of_one(runs, tmp_path):
    run = runs.copy("vae", tmp_path)
    settings = ("replicates=3", "iwae_samples=5", "batch_size=100", "weights=both", "pictures=false")
    evaluate_here(run, *settings)
    one = record(run)
    done = torchrun(2, *CPU, f"run={run}", *settings, "fabric.devices=2", cwd=tmp_path, script="evaluate.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test set, ema weights") == 1
    two = record(run)
    assert (one["devices"], two["devices"]) == (1, 2)
    assert json.loads((run / "evaluation-1.json").read_text()) == one
    assert not (run / "evaluation-2.json").exists()
    for weights, part in one["results"].items():
        other = two["results"][weights]
        assert other["bpd"] == pytest.approx(part["bpd"], abs=1e-6)
        assert other["bpd_se_noise"] == pytest.approx(part["bpd_se_noise"], abs=1e-6)
        assert other["iwae"]["nats"] == pytest.approx(part["iwae"]["nats"], abs=1e-4)
        assert other["iwae"]["effective_samples"] == pytest.approx(part["iwae"]["effective_samples"], abs=1e-4)
        assert other["balance"]["mutual_information"] == pytest.approx(part["balance"]["mutual_information"], abs=1e-4)


def test_evaluations_that_end_together_are_all_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_new(tmp_path, {"number": number}, {}), range(40)))
    assert sorted(json.loads(path.read_text())["number"] for path in tmp_path.glob("evaluation*.json")) == list(range(40))
    assert not list(tmp_path.glob("*.tmp"))


def test_the_steps_of_a_record_are_what_was_measured():
    means, errors = torch.arange(1.0, 10.0).double(), torch.arange(9.0, 0.0, -1.0).double() ** 2
    moments = StepMoments(means, means, means, None, errors, prior=0.5, num_images=4, num_rows=4, num_steps=9)
    found = steps_record(moments, SimpleNamespace(num_steps=10, levels=17, num_dims=3))
    assert found["t"] == list(range(2, 11))
    assert found["kl_nats"] == means.tolist()
    above = [0.5 + sum(range(t, 10)) for t in range(2, 11)]  # the KL of step t is t - 1
    assert found["rate_bits_per_dim"] == pytest.approx([nats / (3 * math.log(2)) for nats in above])
    assert found["rmse_levels"] == pytest.approx([8 * root for root in range(9, 0, -1)])


def test_every_network_call_is_accounted_for(runs, tmp_path, monkeypatch):
    run, rows, usual = runs.copy("ddpm", tmp_path), [], MLPDenoiser.forward
    monkeypatch.setattr(MLPDenoiser, "forward", lambda self, x, t: (rows.append(len(x)), usual(self, x, t))[1])
    evaluate_here(run, "max_images=64", "replicates=null", *QUICK)
    own = record(run)["results"]["ema"]
    assert sum(rows) == own["pilot_network_calls"] + own["num_images"] * own["network_calls_per_image"]
    assert record(run)["step"] == torch.load(run / "checkpoints/best.ckpt", weights_only=True)["global_step"]
    assert record(run)["seconds"] > 0


def test_the_histogram_has_each_images_cost_beside_its_image(runs, tmp_path, monkeypatch):
    run, plotted, usual = runs.copy("vae", tmp_path), [], evaluation.extras.plot_images
    monkeypatch.setattr(evaluation.extras, "plot_images", lambda *given: (plotted.append(given), usual(*given))[1])
    evaluate_here(run, "replicates=2", "balance=false", "max_images=30")
    bits, _, places, *_ = plotted[0]
    assert bits.mean().item() == pytest.approx(record(run)["bpd"])
    assert torch.equal(places, Rows.of_split(range(180), 30, 1, 0, "any").order)


def test_replicates_that_one_chose_are_not_called_too_few(runs, tmp_path, capsys):
    evaluate_here(runs.copy("vae", tmp_path), "precision=1e-6", "replicates=2", "max_images=8", *QUICK)
    assert "wished precision" not in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("replicates", "errors"), [(2, ["bpd_se_images", "bpd_se_noise"]), (1, ["bpd_se"])])
def test_the_tables_columns_are_what_their_headings_say(replicates, errors, runs, tmp_path, capsys):
    run = runs.copy("vae", tmp_path)
    capsys.readouterr()  # what training printed
    evaluate_here(run, f"replicates={replicates}", *QUICK)
    printed = capsys.readouterr().out
    (total,) = (line for line in printed.splitlines() if "total" in line)
    cells = [cell.strip() for cell in total.strip("│┃ ").split("│")]
    assert cells[2:] == [f"{record(run)[name]:.4f}" for name in ("bpd", *errors)]
    assert ("± images and noise" in printed) == (replicates == 1) == (record(run)["bpd_se_noise"] is None)


def test_an_importance_weighted_bound_that_few_draws_carry_says_so():
    def line(effective, samples=50):
        figure = {"mean": -20.0, "se": 0.5}
        gap = {"mean": 3.0, "se": 0.25}
        iwae = {"samples": samples, "nats": figure, "gap_to_elbo": gap, "effective_samples": effective}
        (printed,) = extra_lines({"iwae": iwae}, SimpleNamespace(levels=None))
        return printed

    assert "3.000 ± 0.250 nats above the ELBO; 1.5 effective samples: a few draws carry the sum" in line(1.5)
    assert line(30.0).endswith("30.0 effective samples")
    # nearly equal weights miss nothing, however few they are; of two draws, one may carry the sum as well
    assert line(9.5, samples=11).endswith("9.5 effective samples")
    assert "a few draws carry the sum" in line(1.2, samples=2)
    assert line(1.0, samples=1).endswith("1.0 effective samples")


def test_a_record_stays_until_the_new_one_takes_its_place_and_with_its_pictures(tmp_path, monkeypatch):
    def record(name):
        return json.loads((tmp_path / f"{name}.json").read_text())["number"]

    write_new(tmp_path, {"number": 1}, {})
    (tmp_path / "plots" / "evaluation").mkdir(parents=True)
    (tmp_path / "plots" / "evaluation" / "1.png").touch()

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut_off)
        with pytest.raises(KeyboardInterrupt):
            write_new(tmp_path, {"number": 2}, {})
    assert record("evaluation") == 1
    write_new(tmp_path, {"number": 3}, {})
    assert record("evaluation") == 3
    (pictures,) = tmp_path.glob("plots/*/1.png")
    assert record(pictures.parent.name) == 1


def test_data_that_was_moved_is_found_by_data_root(runs, tmp_path):
    write_folder(tmp_path / "pictures", pictures(50, 8, 8, 3))
    data = ("data=image_folder", f"data.root={tmp_path}/pictures", "data.image_size=8", "data.batch_size=8")
    run_here(tmp_path, "model=vae", *data, "logger=csv", "callbacks.pictures=null", "trainer.max_epochs=1")
    (tmp_path / "pictures").rename(tmp_path / "moved")
    evaluate_here(tmp_path / "run", "replicates=2", f"data_root={tmp_path}/moved", *QUICK)
    evaluate_here(runs.copy("vae", tmp_path), f"data_root={tmp_path}", "replicates=2", "max_images=8", *QUICK)  # has none


def test_where_there_is_no_room_for_an_evaluation_the_earlier_one_stays(tmp_path, monkeypatch):
    write_new(tmp_path, {"number": 1}, {})

    def full(path, text, *args, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_new(tmp_path, {"number": 2}, {})
    assert error.value.filename == str(tmp_path / "evaluation.json")
    assert json.loads((tmp_path / "evaluation.json").read_text()) == {"number": 1}
    assert [path.name for path in tmp_path.glob("*.json*")] == ["evaluation.json"]
