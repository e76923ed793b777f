"""The fit finds what was put in, the count is a sum by formula, and the pages say what they should."""

import json
import re
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import activations, projection, ranks, scaling
from benchmarks.counting import count, saved_bytes
from benchmarks.power_law import fit, fit_above
from benchmarks.ranks import WARM_UP, StepTimes
from benchmarks.roofline import FAST, GPUS, SLOW, Assumed, Counted, evaluate, project, traffic
from benchmarks.scaling_cases import TrainingStep, all_series
from benchmarks.scaling_page import cells
from networks import UNet
from networks.unet import SelfAttention, Upsample

SMALL = ("experiment=ddpm_cifar10", "model.network.base_channels=8", "data.batch_size=16")


@pytest.fixture(scope="module")
def recipe():
    return Counted.of("CIFAR-10", *SMALL)


def test_the_fit_recovers_an_exact_exponent_and_its_error_covers_a_noisy_one():
    law = fit([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert (law.scale, law.exponent, law(16)) == pytest.approx((3, 1.5, 192))
    assert law.error < 1e-7
    generator = torch.Generator().manual_seed(0)
    x = [2.0**k for k in range(8)]
    misses = []
    for _ in range(200):
        noise = 0.1 * torch.randn(8, generator=generator, dtype=torch.float64)
        law = fit(x, [v**0.7 * e for v, e in zip(x, noise.exp().tolist(), strict=True)])
        misses.append((law.exponent - 0.7) / law.error)
    assert torch.tensor(misses).square().mean().sqrt() == pytest.approx(1.22, abs=0.3)  # of Student's t with 6 degrees
    with pytest.raises(ValueError, match="two or more positive points"):
        fit([1, 2], [0, 1])


def test_a_fixed_cost_is_told_from_what_grows():
    x = [1, 2, 4, 8, 16, 32, 64]
    law = fit_above(x, [5 + 0.5 * v**1.2 for v in x])
    assert (law.fixed, law.scale, law.exponent) == pytest.approx((5, 0.5, 1.2), rel=1e-4)
    law = fit_above(x, [2 * v**0.9 for v in x])
    assert law.exponent == pytest.approx(0.9, abs=1e-3)
    assert law.fixed < 0.01
    assert fit_above(x, [3.0] * 7) is None  # nothing grows
    assert fit_above(x[:4], x[:4]) is None


def by_formula(network, side, transposed):
    """FLOPs of one image through a U-Net: 2 · outputs · inputs for each output number of each layer."""
    total, size = 0, {}

    def see(module, args, out):
        nonlocal total
        if isinstance(module, Upsample):  # 16 products a pixel of the input, or 9 a pixel of the output
            pixels = out.shape[-1] ** 2
            total += 2 * pixels * module.in_channels * module.out_channels * (4 if transposed else 9)
        elif isinstance(module, nn.Conv2d):
            total += 2 * out.shape[-1] ** 2 * module.in_channels * module.out_channels * module.kernel_size[0] ** 2
        elif isinstance(module, nn.Linear):
            total += 2 * module.in_features * module.out_features
        elif isinstance(module, SelfAttention):
            size[module] = 2 * 2 * out.shape[-1] ** 4 * out.shape[1]  # q k^T, and its product with v

    hooks = [module.register_forward_hook(see) for module in network.modules()]
    network(torch.zeros(1, 3, side, side, device="meta"), torch.ones(1, dtype=torch.int64, device="meta"))
    for hook in hooks:
        hook.remove()
    return total, sum(size.values())


@pytest.mark.parametrize("width", [8, 128])
def test_flops_of_a_network_call_are_the_layers_by_formula(width):
    network = UNet((3, 32, 32), base_channels=width, dropout=0.1).to("meta")
    x, t = torch.zeros(2, 3, 32, 32, device="meta"), torch.ones(2, dtype=torch.int64, device="meta")
    layers, attention = by_formula(network, 32, transposed=True)
    assert count(partial(network, x, t)).flops == 2 * (layers + attention)
    if width == 128:  # Fang et al. (2023) count 6.1 G multiply-adds of this network's layers as they are written
        written, _ = by_formula(network, 32, transposed=False)
        assert written / 2 == pytest.approx(6.1e9, rel=0.01)


def test_of_one_convolution_everything_is_counted_by_hand():
    layer = nn.Conv2d(4, 8, 3, padding=1).to("meta")
    x = torch.zeros(2, 4, 16, 16, device="meta", requires_grad=True)
    once = 2 * 2 * 16 * 16 * 4 * 8 * 9
    assert count(lambda: layer(x)).flops == once
    work = count(lambda: torch.relu(layer(x)).view(-1))  # the view costs nothing
    assert (work.launches, work.operands, work.bytes_moved) == (2, 3, 2 * 4 * 2 * 8 * 16 * 16)
    assert count(lambda: layer(x).sum().backward()).flops == 3 * once
    assert saved_bytes(lambda: torch.relu(layer(x)), layer.parameters()) == 4 * (x.numel() + 2 * 8 * 16 * 16)


def test_a_step_is_three_calls_and_grows_with_its_rows(recipe):
    stem = 2 * 32 * 32 * 3 * 8 * 9  # whose input needs no gradient
    time = 2 * 8 * 32  # nor does the first layer of the time's
    assert recipe.step(2, 2).flops == 2 * (3 * recipe.call(1).flops - stem - time)
    assert recipe.step(4, 4).flops == 2 * recipe.step(2, 2).flops
    assert recipe.step(4, 4).launches == recipe.step(2, 2).launches
    assert recipe.step(2, 16).flops == recipe.step(2, 2).flops
    assert recipe.step(2, 16).bytes_moved > recipe.step(2, 2).bytes_moved  # random numbers are drawn for the whole batch
    parameters = sum(parameter.numel() for parameter in UNet((3, 32, 32), base_channels=8).parameters())
    assert (recipe.parameters, recipe.batch, recipe.num_steps, recipe.calls) == (parameters, 16, 1000, 32)


def test_the_projection_is_what_the_page_says_it_is(recipe):
    gpu, work = GPUS[0], recipe.step(8, 16)
    times = project(recipe, gpu, 2, FAST)
    assert times.flops == pytest.approx(work.flops / (0.4 * 312e12))
    moved = work.bytes_moved / 2 + 13 * 4 * recipe.parameters
    assert times.bandwidth == pytest.approx(moved / (0.8 * 2.039e12))
    assert times.all_reduce == pytest.approx(4 * recipe.parameters / (0.8 * 300e9))
    assert times.step == times.launches == pytest.approx(5e-6 * work.launches)
    assert times.limit == "launches"
    no_launches = Assumed(1e-6, 1, 0, 1, 1, 0.0, 1e9)
    assert project(recipe, gpu, 1, no_launches).limit == "FLOPs"
    assert project(recipe, gpu, 1, Assumed(1, 1, 0, 1, 1, 0.0, 1.0)).limit == "data"
    assert traffic(100, 1) == 0
    assert evaluate(recipe, gpu, 1, SLOW, 1000, 64, 64) == pytest.approx(31.25 * evaluate(recipe, gpu, 1, SLOW, 32, 64, 64))


def test_the_page_of_projections(recipe):
    text = projection.document([recipe])
    for part in ("None of this has been run on a GPU", "A100 80GB SXM", "8 × H100 SXM", "exact sum, 10,000 test images",
                 "1,000 × 10,000", "32 × 10,000", "launches", "data sheets"):  # fmt: skip
        assert part in text
    assert all(len(line) <= 128 for line in text.splitlines() if not line.startswith("|"))


def test_the_committed_projection_is_what_the_script_writes(request):
    page, fresh = (request.config.rootpath / "docs" / "projection.md").read_text(), projection.page()
    if f"PyTorch {projection.release()}:" not in page:  # FLOPs are the same in any release, launches are not
        page, fresh = (re.findall(r"^\| TFLOP.*|^- One call.*|^One network.*", text, re.M) for text in (page, fresh))
        assert page
    assert page == fresh


def test_the_speeds_of_data_are_those_that_were_measured(request):
    root = request.config.rootpath
    measured = json.loads((root / "benchmarks" / "results" / "streaming.json").read_text())["rows"]
    speeds = [round(row["images_per_second"], -3) for row in measured]
    _, table = (root / "docs" / "data.md").read_text().split("**Speed**")
    written = [float(number.replace(",", "")) for number in re.findall(r"\b[\d,]+,000\b", table.split("\n\n")[1])]
    assert sorted(written) == sorted(speeds)
    ours = [speed for row, speed in zip(measured, speeds, strict=True) if row["from"] == "page cache" and not row["flip"]]
    assert [FAST.fetch, SLOW.fetch] == ours


def of_this_torch(page):
    """Whether what is counted should be the page's: what autograd keeps is up to PyTorch's kernels."""
    return f"torch {torch.__version__} " in page


def counted(series):
    """How the memory of a series grows, as the page's row has it; nothing is timed."""
    steps = {value: series.build(value) for value in series.values}
    memory = [step.memory() / 2**20 for step in steps.values() if isinstance(step, TrainingStep)]
    x = [series.abscissa(step, value) for value, step in steps.items()]
    return f"| {series.name}: {series.label} | {x[0]:,.0f} | {x[-1]:,.0f} | ", f" | {cells(x, memory)} | {series.what} |"


def test_the_committed_page_of_scaling_has_every_series_and_the_memory_that_is_counted(request):
    docs = request.config.rootpath / "docs"
    page = (docs / "scaling.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    expected = [counted(series) for series in all_series(False)]
    memory = [ranks.memory(devices) / 2**20 for devices in (1, 2)]
    expected.append(("| ranks: processes (DDP, gloo) | 1 | 2 | ", f" | {cells([1, 2], memory)} | digits' U-Net"))
    for start, end in expected:
        assert any(row.startswith(start) and (end in row or not of_this_torch(page)) for row in rows), f"{start}... {end}"
    assert "(scaling.md)" in (docs / "scale.md").read_text()


def test_what_checkpointed_activations_keep_is_what_the_page_of_devices_says(request):
    docs = request.config.rootpath / "docs"
    again, whole = (activations.step(setting).kept() / 2**20 for setting in (True, False))
    assert again < 0.2 * whole
    text = f"keeps {again:.0f} MiB instead of {whole:.0f} MiB at batch {activations.BATCH}"
    assert text in " ".join((docs / "scale.md").read_text().split()) or not of_this_torch((docs / "scaling.md").read_text())


def test_quick_runs_and_writes_page_plot_and_raw_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--quick", "--out", str(tmp_path)])
    scaling.main()
    text = (tmp_path / "scaling.md").read_text()
    assert text in capsys.readouterr().out
    assert "| MHVAE depth: T | 1 | 2 |" in text
    assert (tmp_path / "images" / "scaling.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert {"date", "machine", "rounds"} < set(record)
    depth = next(series for series in record["series"] if series["name"] == "MHVAE depth")
    assert (depth["x"], len(depth["seconds"]), len(depth["memory"])) == ([1, 2], 2, 2)
    assert set(depth["fits"]) == {"seconds", "memory"}
    again = record["checkpointed_activations"]
    assert again["again"] < 0.2 * again["whole"]
    assert len(again["pairs"]["ours"]) == len(again["pairs"]["theirs"]) == 1
    assert "a step takes" in " ".join(text.split())


def test_quick_writes_nothing_unless_it_is_told_where(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scaling", "--quick"])
    monkeypatch.setattr(scaling, "all_series", lambda quick: all_series(quick)[5:6])  # which the page speaks of
    scaling.main()
    assert not list(tmp_path.iterdir())


def test_a_rank_writes_the_median_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times = StepTimes()
    times.starts = [100.0 * k for k in range(WARM_UP)] + [1000.0, 1001.0, 1003.0, 1010.0]
    times.on_train_end(SimpleNamespace(is_global_zero=True), None)
    assert json.loads((tmp_path / "step_seconds.json").read_text()) == 2.0
