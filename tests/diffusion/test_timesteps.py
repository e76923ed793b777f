import math
from types import SimpleNamespace

import pytest
import torch

from diffusion import low_discrepancy, uniform
from diffusion.step_profile import StepProfile, draw_steps, proposal_from
from losses.draws import Rows, rows_of_global_batch
from tests.lightning_modules.test_ddpm import OneRank

CPU = torch.device("cpu")


@pytest.mark.parametrize("sampler", [uniform, low_discrepancy])
@pytest.mark.parametrize("num_steps", [1, 7, 1000])
def test_every_step_is_equally_likely(sampler, num_steps):
    t = torch.cat([sampler(64, num_steps, CPU) for _ in range(500)])
    assert t.dtype == torch.int64
    assert t.min() >= 1
    assert t.max() <= num_steps
    half = (t <= num_steps // 2 + num_steps % 2).double().mean().item()
    assert half == pytest.approx((num_steps // 2 + num_steps % 2) / num_steps, abs=0.02)


def test_low_discrepancy_covers_the_steps():
    assert torch.equal(low_discrepancy(100, 100, CPU).sort().values, torch.arange(1, 101))
    counts = torch.bincount(low_discrepancy(70, 20, CPU), minlength=21)[1:]
    assert counts.min() >= 3
    assert counts.max() <= 4


@pytest.mark.parametrize("large", [math.inf, math.nan, 1e30])
def test_one_draw_without_bounds_is_forgotten(large):
    profile, usual = StepProfile(5), StepProfile(5)
    t, kls = torch.tensor([2, 3, 4, 5]), torch.tensor([100.0, 1.0, 1.0, 1.0])
    profile.record(t, torch.tensor([large, 1.0, 1.0, 1.0]))
    for each in (profile, usual):
        for _ in range(50):
            each.record(t, kls)
            each.refresh(OneRank())
    torch.testing.assert_close(profile.proposal, usual.proposal)


def test_proposal_follows_the_recorded_moments_and_inverts_unbiased():
    profile = StepProfile(50)
    truth = 10.0 / torch.arange(51).clamp(min=1) ** 2
    for _ in range(20):
        t = low_discrepancy(200, 50, CPU)
        profile.record(t, truth[t])
    profile.refresh(OneRank())
    assert profile.proposal.sum().item() == pytest.approx(1)
    assert (profile.proposal[:2] == 0).all()
    assert (profile.proposal[2:].diff() < 0).all()
    t, p = draw_steps(profile.proposal, torch.rand(200_000, 1, dtype=torch.float64))
    assert t.min() == 2
    observed = torch.bincount(t.flatten(), minlength=51) / len(t)
    torch.testing.assert_close(observed, profile.proposal, atol=0.005, rtol=0)
    estimate = truth[t] / p
    assert estimate.mean().item() == pytest.approx(truth[2:].sum().item(), abs=4 * estimate.std().item() / 200_000**0.5)
    plain = truth[torch.randint(2, 51, (200_000,))] * 49
    assert estimate.std() < plain.std() / 3  # what importance is for


def test_what_ranks_have_seen_before_a_stop_is_in_the_checkpoint_of_the_first():
    """Two ranks, stopped half-way: the proposal is the one of ranks that were not."""
    halves = [[(low_discrepancy(40, 9, CPU), torch.rand(40)) for _ in range(2)] for _ in range(2)]
    whole = [StepProfile(9), StepProfile(9)]
    for profile, seen in zip(whole, halves, strict=True):
        for t, kl in seen:
            profile.record(t, kl)
    first, second = StepProfile(9), StepProfile(9)
    for profile, seen in zip((first, second), halves, strict=True):
        profile.record(*seen[0])
    together(first, second, "share")
    kept = first.recorded()
    first, second = StepProfile(9), StepProfile(9)
    for rank, (profile, seen) in enumerate(zip((first, second), halves, strict=True)):
        profile.restore(kept, SimpleNamespace(is_global_zero=rank == 0))
        profile.record(*seen[1])
    together(*whole, "refresh")
    together(first, second, "refresh")
    torch.testing.assert_close(first.proposal, whole[0].proposal)
    torch.testing.assert_close(second.proposal, whole[0].proposal)
    assert whole[0].proposal.std() > 0


def together(first, second, method):
    """Calls a method of two ranks' profiles, whose sums are added up."""
    total = first.recorded()["sums"] + second.recorded()["sums"]
    for rank, profile in enumerate((first, second)):
        strategy = SimpleNamespace(is_global_zero=rank == 0, reduce=lambda mine, reduce_op: total.clone())
        getattr(profile, method)(strategy)


def test_proposal_is_uniform_before_anything_was_seen_and_survives_nans():
    profile = StepProfile(11)
    profile.refresh(OneRank())
    torch.testing.assert_close(profile.proposal[2:], torch.full((10,), 0.1))
    profile.record(torch.tensor([2, 3]), torch.tensor([float("nan"), 1.0]))
    profile.refresh(OneRank())
    assert profile.proposal.isfinite().all()


@pytest.mark.parametrize("sampler", [uniform, low_discrepancy])
def test_ranks_together_draw_the_steps_of_one_device(sampler):
    device, parts = torch.device("cpu"), []
    torch.manual_seed(1)
    whole = sampler(10, 50, device)
    for start, stop in ((0, 3), (3, 10)):
        torch.manual_seed(1)
        with rows_of_global_batch(Rows(start, stop, 10)):
            parts.append(sampler(stop - start, 50, device))
    assert torch.equal(torch.cat(parts), whole)


def test_each_refresh_halves_what_was_seen_before_also_where_a_run_goes_on():
    t, first, resumed = torch.tensor([2, 3, 4]), StepProfile(4), StepProfile(4)
    first.record(t, torch.tensor([4.0, 1.0, 1.0]))
    first.refresh(OneRank())
    resumed.restore(first.recorded(), OneRank())
    for profile in (first, resumed):
        for _ in range(2):
            profile.record(t, torch.tensor([1.0, 1.0, 4.0]))
        profile.refresh(OneRank())
        squares = torch.tensor([0.5 * 16 + 2, 2.5, 0.5 + 32]) / 2.5
        torch.testing.assert_close(profile.proposal, proposal_from(squares.sqrt()))


def test_steps_that_were_not_seen_count_as_the_mean_of_those_that_were():
    profile = StepProfile(5)
    profile.record(torch.tensor([2, 3]), torch.tensor([1.0, 3.0]))
    profile.refresh(OneRank())
    torch.testing.assert_close(profile.proposal, proposal_from(torch.tensor([1.0, 3.0, 2.0, 2.0])))


def test_nothing_finite_and_nothing_to_pay_leave_the_proposal_uniform():
    profile = StepProfile(11)
    profile.record(torch.tensor([2, 3]), torch.tensor([math.nan, math.inf]))
    profile.refresh(OneRank())
    for proposal in (profile.proposal, proposal_from(torch.zeros(10))):
        torch.testing.assert_close(proposal[2:], torch.full((10,), 0.1))


def test_a_cell_on_an_edge_belongs_to_the_step_above():
    """Step t has the cells from Σ_{s<t} p_s, inclusive, up to Σ_{s≤t} p_s, so steps with no share are never drawn."""
    proposal = torch.tensor([0, 0, 0, 0.25, 0.25, 0, 0.5])
    t, p = draw_steps(proposal, torch.tensor([[0, 0.25, 0.5, 0.75]], dtype=torch.float64))
    assert t.tolist() == [[3, 4, 6, 6]]
    assert p.tolist() == [[0.25, 0.25, 0.5, 0.5]]
