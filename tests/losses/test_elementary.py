import mpmath
import pytest
import torch

from losses.elementary import log1mexp, log_normal_cdf

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@BOTH
def test_log1mexp_and_its_gradient(dtype):
    d = -torch.logspace(-8, 1.5, 2001, dtype=torch.float64).to(dtype)
    mine, theirs = d.clone().requires_grad_(), d.double().requires_grad_()
    ours = log1mexp(mine)
    expected = torch.where(d < -1, torch.log1p(-torch.exp(theirs)), torch.log(-torch.expm1(theirs)))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), expected, rtol=8 * eps, atol=2 * eps)
    (gradient,) = torch.autograd.grad(ours.sum(), mine)
    (right,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(gradient.double(), right, rtol=16 * eps, atol=2 * eps)


def test_bins_narrower_than_rounding_cost_much_but_not_infinitely():
    assert log1mexp(torch.tensor([-0.0, -1e-30])).isfinite().all()


@BOTH
def test_ln_phi_has_the_gradient_of_its_tails(dtype):
    places = torch.tensor([-1e6, -1e4, -1000.0, -40, -5, -1, 0, 1, 5, 12, 40, 1e6], dtype=dtype, requires_grad=True)
    values = log_normal_cdf(places)
    torch.testing.assert_close(values, torch.special.log_ndtr(places))
    (gradient,) = torch.autograd.grad(values.sum(), places)
    with mpmath.workdps(40):
        right = [float(mpmath.npdf(z) / (mpmath.erfc(-z / mpmath.sqrt(2)) / 2)) for z in map(mpmath.mpf, places.tolist())]
    torch.testing.assert_close(gradient.tolist(), right, rtol=16 * torch.finfo(dtype).eps, atol=1e-30)


def test_ln_phi_has_the_gradients_of_finite_differences():
    places = torch.linspace(-30, 8, 77, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_normal_cdf, places)
    assert torch.autograd.gradgradcheck(log_normal_cdf, places)


def test_ln_phi_is_followed_by_function_transforms():
    places = torch.linspace(-50, 5, 12, dtype=torch.float64)
    (right,) = torch.autograd.grad(log_normal_cdf(places.requires_grad_()).sum(), places)
    gradient = torch.func.grad(lambda z: log_normal_cdf(z).sum())(places.detach())
    each = torch.func.vmap(torch.func.grad(log_normal_cdf))(places.detach())
    _, forward = torch.func.jvp(log_normal_cdf, (places.detach(),), (torch.ones_like(places),))
    for other in (gradient, each, forward):
        torch.testing.assert_close(other, right)
