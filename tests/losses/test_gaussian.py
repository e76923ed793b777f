import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from losses import DiagGaussian, Elbo, from_unit, kl, log_ratio, sum_except_batch, to_unit


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_and_kl_equal_torch_distributions(shape, dtype):
    mq, sq, mp, sp, z = (torch.randn(shape, dtype=dtype) for _ in range(5))
    q, p = DiagGaussian(mq, sq), DiagGaussian(mp, sp)
    tq, tp = Normal(mq, sq.exp()), Normal(mp, sp.exp())
    torch.testing.assert_close(q.log_prob(z), sum_except_batch(tq.log_prob(z)))
    torch.testing.assert_close(kl(q, p), sum_except_batch(kl_divergence(tq, tp)))
    torch.testing.assert_close(log_ratio(q, p, z), sum_except_batch(tq.log_prob(z) - tp.log_prob(z)))


def test_kl_to_standard_is_the_textbook_formula_and_never_negative():
    mean, log_std = torch.randn(64, 9, dtype=torch.float64), torch.randn(64, 9, dtype=torch.float64)
    q = DiagGaussian(mean, log_std)
    expected = 0.5 * (mean**2 + (2 * log_std).exp() - 1 - 2 * log_std).sum(1)
    torch.testing.assert_close(kl(q, DiagGaussian.standard(mean)), expected)
    assert (kl(q, DiagGaussian.standard(mean)) > 0).all()
    assert torch.equal(kl(q, q), torch.zeros(64, dtype=torch.float64))


def test_a_shared_log_std_broadcasts_over_every_dimension():
    mean = torch.randn(4, 3, 2)
    shared, full = DiagGaussian(mean, torch.tensor(0.3)), DiagGaussian(mean, torch.full((4, 3, 2), 0.3))
    z = torch.randn(4, 3, 2)
    torch.testing.assert_close(shared.log_prob(z), full.log_prob(z))
    torch.testing.assert_close(kl(shared, DiagGaussian.standard(mean)), kl(full, DiagGaussian.standard(mean)))


def test_kl_is_the_mean_of_the_log_ratio_and_samples_are_reparameterised():
    mean = torch.tensor([[0.5, -1.0]]).requires_grad_()
    q = DiagGaussian(mean.expand(200_000, 2), torch.tensor([[0.2, -0.7]]))
    p = DiagGaussian(torch.zeros(200_000, 2), torch.tensor(0.4))
    ratio = log_ratio(q, p, q.sample())
    assert abs(ratio.mean() - kl(q, p)[0]) < 4 * ratio.std() / 200_000**0.5
    (gradient,) = torch.autograd.grad(q.sample().sum(), mean)
    torch.testing.assert_close(gradient, torch.full((1, 2), 200_000.0))


def test_narrow_parameters_are_widened_and_float64_is_kept():
    narrow = DiagGaussian(torch.randn(3, 4).bfloat16(), torch.zeros(()).bfloat16())
    assert narrow.sample().dtype == narrow.log_prob(torch.zeros(3, 4)).dtype == torch.float32
    assert DiagGaussian.standard(torch.zeros(2, 2, dtype=torch.float64)).sample().dtype == torch.float64


def test_elbo_is_one_decomposition_in_two_units():
    elbo = Elbo(torch.tensor([-10.0, -20.0]), torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0]))
    assert elbo.value.tolist() == [-11.5, -22.0]
    torch.testing.assert_close(elbo.bits_per_dim(4), torch.tensor([11.5, 22.0]) / (4 * torch.log(torch.tensor(2.0))))
    with pytest.raises(ValueError, match="per example"):
        Elbo(torch.zeros(2), torch.zeros(2), torch.zeros(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_narrowest_gaussians_have_a_divergence_where_their_means_agree(dtype):
    log_std = torch.tensor([[-89.0, -200.0, -800.0]], dtype=dtype).requires_grad_()
    narrow = DiagGaussian(torch.zeros(1, 3, dtype=dtype), log_std)
    assert kl(narrow, narrow).item() == 0
    assert narrow.log_prob(narrow.mean).item() == pytest.approx(1089 - 1.5 * math.log(2 * math.pi))
    (gradient,) = torch.autograd.grad(narrow.log_prob(narrow.mean).sum(), log_std)
    assert gradient.tolist() == [[-1.0, -1.0, -1.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_parameters_and_levels_are_widened(dtype):
    narrow = DiagGaussian(torch.randn(3, 4).to(dtype), torch.full((), -0.3).to(dtype))
    assert narrow.mean.dtype == narrow.log_std.dtype == torch.float32
    for levels in (17, 256):
        unit = to_unit(torch.arange(levels).to(torch.uint8), levels).to(dtype)
        assert torch.equal(from_unit(unit, levels), from_unit(unit.float(), levels))


def test_a_mean_of_whole_numbers_is_refused():
    with pytest.raises(TypeError, match="to_unit"):
        DiagGaussian(torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(()))


@pytest.mark.parametrize(("mean", "log_std"), [((3, 1), (3, 4)), ((4,), (1, 4)), ((2, 3), (3, 2, 3))])
def test_a_log_std_that_widens_the_mean_is_refused(mean, log_std):
    with pytest.raises(ValueError, match="does not broadcast"):
        DiagGaussian(torch.zeros(mean), torch.zeros(log_std))


@pytest.mark.parametrize("shape", [(5,), (4, 1), (3, 5, 5), (5, 5, 5)])
def test_draws_and_gaussians_of_another_shape_are_refused(shape):
    q, other = (DiagGaussian(torch.zeros(size), torch.zeros(())) for size in ((5, 5), shape))
    with pytest.raises(ValueError, match="is no draw of N"):
        q.log_prob(other.mean)
    with pytest.raises(ValueError, match="KL of Gaussians with means"):
        kl(q, other)
    one_for_all = DiagGaussian(torch.ones(1, 5), torch.zeros(()))
    assert torch.equal(kl(q, one_for_all), torch.full((5,), 2.5))


@pytest.mark.parametrize("shape", [(2, 1), ()])
def test_terms_of_one_shape_that_is_not_per_example_are_refused(shape):
    with pytest.raises(ValueError, match="per example"):
        Elbo(*torch.zeros(3, *shape))
