import math

import numpy as np
import pytest
import torch

from diffusion.step_profile import proposal_from
from evaluation.statistics import figure
from losses.draws import randn_like, stratified
from tests.evaluation.models import gathered, odd_images, rows_of, small_ddpm


def test_figures_are_numpys():
    values = torch.randn(50, 6, dtype=torch.float64) * torch.rand(50, 1) + torch.randn(50, 1) + 3
    alone = figure(values, torch.arange(50))
    table = values.numpy()
    assert alone.num == 50
    assert alone.mean == pytest.approx(table.mean())
    assert alone.se == pytest.approx(table.mean(1).std(ddof=1) / math.sqrt(50))
    assert alone.se_noise == pytest.approx(math.sqrt((table.var(1, ddof=1) / 6).sum()) / 50)
    assert alone.se**2 == pytest.approx(alone.se_images**2 + alone.se_noise**2)
    grouped = figure(values, torch.arange(50) // 7)
    sums = np.add.reduceat(table, range(0, 50, 7))
    assert grouped.se_noise == pytest.approx(math.sqrt((sums.var(1, ddof=1) / 6).sum()) / 50)
    assert grouped.mean == alone.mean
    # the names of groups mean nothing
    assert figure(values, torch.arange(50) // 7 * 10 + 3).se_noise == pytest.approx(grouped.se_noise)
    assert figure(values.flip(0), (torch.arange(50) // 7).flip(0)).se_noise == pytest.approx(grouped.se_noise)


def test_noise_that_a_group_shares_counts_in_full_and_noise_that_cancels_not_at_all():
    images, noise = torch.arange(40.0).double().view(40, 1), torch.randn(10, 5, dtype=torch.float64).repeat_interleave(4, 0)
    groups = torch.arange(40) // 4
    shared = figure(images + noise, groups)
    assert shared.se_noise == pytest.approx(2 * figure(images + noise, torch.arange(40)).se_noise)
    sign = torch.tensor([1.0, -1.0]).double().repeat(20).view(40, 1)
    assert figure(images + sign * noise, groups).se_noise == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("size", "pull"), [(8, -1.0), (8, 1.0), (64, -1.0), (1, 1.0)])
def test_noise_within_groups_is_not_taken_for_a_difference_between_images(size, pull):
    """``pull`` -1: a group's noise sums to zero, as errors of evenly spread steps nearly do; 1: one noise for all of it."""
    spread, noise, num, trials = 2.0, 8.0, 256, 400
    generator = torch.Generator().manual_seed(1)
    images = spread * torch.randn(trials, num, 1, dtype=torch.float64, generator=generator)
    draws = torch.randn(trials, num // size, size, 2, dtype=torch.float64, generator=generator)
    of_group = draws.mean(2, keepdim=True)
    draws = draws - of_group if pull < 0 else of_group.expand_as(draws) * math.sqrt(size)
    values = images + noise * draws.reshape(trials, num, 2)
    figures = [figure(one, torch.arange(num) // size) for one in values]
    truth = values.mean((1, 2)).std().item()  # over other images and other noise
    of_all, of_images = (math.sqrt(np.mean([getattr(one, name) ** 2 for one in figures])) for name in ("se", "se_images"))
    assert of_all == pytest.approx(truth, rel=0.12)
    assert of_images == pytest.approx(spread / math.sqrt(num), rel=0.12 if size == 1 or pull < 0 else 0.4)
    if pull < 0:  # the images' means taken for independent ones
        assert math.sqrt(values.mean(2).var(1).mean().item() / num) > 2.5 * truth


def test_what_one_replicate_cannot_tell_is_not_claimed():
    values = torch.randn(30, 1, dtype=torch.float64)
    one = figure(values, torch.arange(30))
    assert one.se == pytest.approx(values.std().item() / math.sqrt(30))
    assert one.as_dict()["se_noise"] is one.as_dict()["se_images"] is None
    assert set(one.as_dict()) == {"mean", "se", "se_images", "se_noise"}


def test_one_image_says_nothing_about_images():
    single = figure(torch.tensor([[1.0, 3.0]]).double(), torch.zeros(1, dtype=torch.int64))
    assert math.isnan(single.se)
    assert single.se_noise == pytest.approx(1)
    assert math.isnan(single.se_images)


def test_scaling_and_noise_beyond_the_spread_of_images():
    values = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]).double()
    summary = figure(values, torch.arange(4))
    assert summary.se_images == 0
    assert summary.se == summary.se_noise == pytest.approx(0.5)
    scaled = summary.as_dict(3.0)
    assert (scaled["mean"], scaled["se_noise"]) == (pytest.approx(3), pytest.approx(1.5))


def coverage(images, function, seeds, replicates=2):
    """The share of seeds whose mean ± 1.96 se_noise holds the mean over all seeds, and the share of that mean's spread."""
    figures = []
    for seed in range(seeds):
        rows = rows_of(images, replicates, seed)
        figures.append(figure(gathered(rows, function, batch_size=1024).squeeze(2), rows.groups))
    means, errors = (torch.tensor([getattr(one, name) for one in figures]) for name in ("mean", "se_noise"))
    inside = ((means - means.mean()).abs() < 1.96 * errors).double().mean().item()
    return inside, (errors.square().mean().sqrt() / means.std()).item()


def wave(x):
    """An estimate whose noise comes in part from the shared cells: of one sign in some images, of the other elsewhere."""
    cost = x.double().mean((1, 2, 3))
    return cost * (1 + torch.sin(2 * math.pi * stratified(len(x), x.device))) + 2 * randn_like(cost.view(-1, 1)).squeeze(1)


@pytest.mark.parametrize("num", [40, 96])
def test_the_noise_error_covers_what_another_seed_gives(num):
    inside, ratio = coverage(odd_images(num), wave, seeds=600)
    assert 0.91 < inside < 0.98
    assert ratio == pytest.approx(1, abs=0.15)


def test_the_noise_error_covers_for_a_ddpm_with_few_calls():
    model, proposal = small_ddpm(), proposal_from(torch.arange(11.0, 0.0, -1.0))
    inside, ratio = coverage(odd_images(96), lambda x: model.elbo(x, 4, proposal).value, seeds=300)
    assert 0.91 < inside < 0.98
    assert ratio == pytest.approx(1, abs=0.15)


def test_the_whole_error_covers_the_population_when_images_are_drawn_anew():
    inside, trials = 0, 400
    for trial in range(trials):
        images = torch.randint(0, 17, (48, 1, 2, 2)).to(torch.uint8)
        rows = rows_of(images, 2, trial)
        summary = figure(gathered(rows, wave, batch_size=1024).squeeze(2), rows.groups)
        inside += abs(summary.mean - 8) < 1.96 * summary.se
    assert 0.91 < inside / trials < 0.98
