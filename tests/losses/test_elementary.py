import pytest
import torch

from losses.elementary import log1mexp

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
