import math
import tracemalloc

import pytest
import torch
from scipy.stats import kstest

from diffusion import Epsilon, Lattice
from diffusion.step_profile import proposal_from
from evaluation.rows import LARGEST_GROUP, Rows, over_batches
from lightning_modules import MarkovPosterior, TopDownPosterior
from tests.evaluation.models import LEVELS, cpu, gathered, odd_images, rows_of, small_ddpm, small_mhvae, small_vae

PROPOSAL = proposal_from(torch.arange(11.0, 0.0, -1.0))


def bound(model, *settings):
    return lambda x: model.elbo(x, *settings).value


def functions():
    ddpm, noisy, vae = small_ddpm(), small_ddpm(parameterization=Epsilon()), small_vae()
    markov, ladder = small_mhvae(), small_mhvae(TopDownPosterior)
    return {
        "ddpm few calls": bound(ddpm, 4, PROPOSAL),
        "ddpm every step": bound(ddpm),
        "ddpm epsilon": bound(noisy, 4, PROPOSAL),
        "ddpm chain": lambda x: ddpm.three_variable_elbo(x).value,
        "ddpm weight": ddpm.log_weight,
        "vae": bound(vae),
        "vae weight": vae.log_weight,
        "mhvae": bound(markov),
        "mhvae top down": bound(ladder),
        "mhvae weight": markov.log_weight,
    }


FUNCTIONS = functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_figures_come_back_and_do_not_depend_on_batches(name):
    images, function = odd_images(20), FUNCTIONS[name]
    values = gathered(rows_of(images, 3), function, batch_size=256)
    torch.manual_seed(99)
    assert torch.equal(gathered(rows_of(images, 3), function, batch_size=256), values)
    for batch_size in (1, 7):
        other = gathered(rows_of(images, 3), function, batch_size=batch_size)
        torch.testing.assert_close(other, values, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_replicates_seeds_and_purposes_draw_apart(name):
    images, function = odd_images(20), FUNCTIONS[name]
    everything = [
        gathered(rows_of(images, 3, seed, purpose), function)[rows_of(images, 1, seed).order.argsort()]
        for seed, purpose in ((0, "bound"), (1, "bound"), (0, "pilot"))
    ]
    draws = torch.cat(everything, 1).squeeze(2)
    assert draws.shape == (20, 9)
    assert all(len(row.unique()) == 9 for row in draws)


def test_every_image_is_there_once_in_one_order_and_a_first_part_is_a_sample():
    images = odd_images(100)
    whole = Rows.of_split(images, 100, 2, 5, "bound")
    assert whole.order.sort().values.tolist() == list(range(100))
    assert whole.order.tolist() != list(range(100))
    part = Rows.of_split(images, 30, 4, 5, "other")
    assert torch.equal(part.order, whole.order[:30])
    x, own = whole.batch(range(7, 12))
    assert torch.equal(x, images[whole.order[[3, 4, 4, 5, 5]]])
    assert len(own.generators) == len(own.cells()) == 5
    alone = gathered(Rows.of_split(images, 100, 1, 5, "bound"), lambda x: x.double().mean((1, 2, 3)))
    assert torch.equal(alone.flatten(), images[whole.order].double().mean((1, 2, 3)))


class Asked:
    """Images that note which of them are asked for, as those that are decoded each time."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def index_select(self, dim, index):
        self.asked += index.tolist()
        return self.images.index_select(dim, index)


@pytest.mark.parametrize("numbers", [range(7, 31), [29, 4, 5, 0, 12, 28], [8, 0, 15]])
def test_a_batch_asks_for_each_of_its_images_once(numbers):
    images = Asked(odd_images(20))
    rows = rows_of(images, 5)
    x, _ = rows.batch(numbers)
    meant = rows.order[[number // 5 for number in numbers]]
    assert torch.equal(x, images.images[meant])
    assert sorted(images.asked) == meant.unique().tolist()


@pytest.mark.parametrize(("num", "size"), [(2, 1), (33, 1), (100, 3), (256, 8), (1000, 8)])
def test_groups_share_cells_that_are_evenly_spread(num, size):
    rows = rows_of(torch.zeros(num, 1, 1, 1, dtype=torch.uint8), 3)
    _, own = rows.batch(range(len(rows)))
    cells = own.cells().view(num, 3)
    counts = torch.bincount(rows.groups)
    assert counts.max() == size <= LARGEST_GROUP
    assert (cells >= 0).all()
    assert (cells < 1).all()
    shifts = []
    for group, count in enumerate(counts.tolist()):
        mine = cells[rows.groups == group]
        torch.testing.assert_close((mine * count % 1).std(0, correction=0), torch.zeros(3).double(), atol=1e-9, rtol=0)
        spread = (mine * count).floor().long()
        assert all(sorted(column.tolist()) == list(range(count)) for column in spread.T)
        shifts.append(mine[0])
    assert len(torch.stack(shifts).unique()) == 3 * len(counts)  # groups and replicates are shifted each on its own


def test_every_image_sees_all_of_the_interval_evenly_over_replicates():
    rows = rows_of(torch.zeros(256, 1, 1, 1, dtype=torch.uint8), 400)
    for place in (0, 3, 7, 130, 255):
        _, own = rows.batch(range(place * 400, (place + 1) * 400))
        assert kstest(own.cells().numpy(), "uniform").pvalue > 1e-3


def test_memory_does_not_grow_with_the_rows_to_come():
    rows = rows_of(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), 10**6)
    tracemalloc.start()
    try:
        numbers, _ = next(over_batches(rows, lambda x: x.flatten(1), cpu(), 4, lambda _: None))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert numbers.tolist() == [0, 1, 2, 3]
    assert peak < 2**20


def apart(one, other):
    """(difference of per-image means, its variance), of estimates (N, R) each."""
    return one.mean(1) - other.mean(1), one.var(1) / one.shape[1] + other.var(1) / other.shape[1]


def test_few_calls_are_unbiased_for_every_single_image():
    """With very different images in one group, a cell tied to an image's place would show at once."""
    model, images = small_ddpm(), odd_images(256)
    few = gathered(rows_of(images, 60), bound(model, 3, PROPOSAL), batch_size=512).squeeze(2)
    every = gathered(rows_of(images, 30, purpose="full"), bound(model), batch_size=512).squeeze(2)
    assert every.mean(1).std() > 5  # nats
    difference, variance = apart(few, every)
    z = difference / variance.sqrt()
    assert z.abs().max() < 4.5
    assert z.square().mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / 256))
    # and within a group the draws cancel: the noise of a group's sum is far below that of its images apart
    groups = few.view(32, 8, 60)
    assert groups.sum(1).var(1).mean() < 0.8 * groups.var(2).sum(1).mean()


@pytest.mark.parametrize("parameterization", [Lattice(LEVELS), Epsilon()])
def test_every_form_of_the_bound_has_one_mean_for_every_image(parameterization):
    model, images = small_ddpm(6, parameterization), odd_images(64)
    proposal = proposal_from(torch.arange(5.0, 0.0, -1.0))
    forms = {
        "few calls": bound(model, 3, proposal),
        "chain": lambda x: model.three_variable_elbo(x).value,
        "weight": model.log_weight,
    }
    every = gathered(rows_of(images, 100, purpose="full"), bound(model), batch_size=512).squeeze(2)
    for name, form in forms.items():
        difference, variance = apart(gathered(rows_of(images, 100, purpose=name), form, batch_size=512).squeeze(2), every)
        assert (difference / variance.sqrt()).abs().max() < 4.5, name
        assert abs(difference.mean()) < 4 * variance.sum().sqrt() / 64, name


@pytest.mark.parametrize("model", [small_vae(), small_mhvae(MarkovPosterior), small_mhvae(TopDownPosterior)])
def test_log_weights_average_to_the_bound_of_the_latent_models(model):
    images = odd_images(32)
    weights = gathered(rows_of(images, 200, purpose="weights"), model.log_weight, batch_size=512).squeeze(2)
    difference, variance = apart(weights, gathered(rows_of(images, 200), bound(model), batch_size=512).squeeze(2))
    assert (difference / variance.sqrt()).abs().max() < 4.5
    assert abs(difference.mean()) < 4 * variance.sum().sqrt() / 32
