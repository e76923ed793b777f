import math

import mpmath
import pytest
import torch

import diffusion

NAMES = ["linear", "scaled_linear", "cosine", "log_snr_linear", "sigmoid", "constant", "jsd"]


def betas_of(name, num_steps):
    extra = {"rescale": False} if name == "linear" and num_steps <= 20 else {}
    return getattr(diffusion, name)(num_steps, **extra)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100, 1000, 4000])
def test_betas_are_valid_and_snr_falls(name, num_steps):
    betas = betas_of(name, num_steps)
    assert betas.shape == (num_steps,)
    assert betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1)).all()
    snr = diffusion.GaussianDiffusion(betas).snr
    assert snr[0] == math.inf
    assert (snr.diff()[1:] < 0).all()


@pytest.mark.parametrize(
    ("name", "num_steps", "last", "prior", "tolerance"),
    [
        ("linear", 1000, 4.036e-5, 7.28e-6, 1e-3),
        ("linear", 100, 2.0e-5, 3.7e-6, 3e-2),
        ("cosine", 1000, 2.4e-9, 4.4e-10, 3e-2),
        ("scaled_linear", 1000, 7.3e-4, 1.3e-4, 3e-2),
    ],
)
def test_published_values(name, num_steps, last, prior, tolerance):
    process = diffusion.GaussianDiffusion(betas_of(name, num_steps))
    assert process.alpha_bar[-1].item() == pytest.approx(last, rel=tolerance)
    x0 = torch.full((1, 1), 0.5, dtype=torch.float64)
    assert (process.prior_kl(x0) / math.log(2)).item() == pytest.approx(prior, rel=tolerance)


def test_closed_forms():
    u = torch.linspace(0, 1, 51, dtype=torch.float64)
    bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    process = diffusion.GaussianDiffusion(diffusion.cosine(50))
    torch.testing.assert_close(process.alpha_bar[:-1], (bar / bar[0])[:-1])
    process = diffusion.GaussianDiffusion(diffusion.log_snr_linear(40, 5.0, -8.0))
    torch.testing.assert_close(process.snr[1:].log(), torch.linspace(5, -8, 40, dtype=torch.float64))
    gate = torch.sigmoid(6 * u - 3)
    expected = (gate[-1] - gate) / (gate[-1] - gate[0])
    torch.testing.assert_close(diffusion.GaussianDiffusion(diffusion.sigmoid(50)).alpha_bar[:-1], expected[:-1])
    assert diffusion.jsd(4).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 0.999])
    assert diffusion.scaled_linear(3)[1].item() == pytest.approx(((0.01 + math.sqrt(0.02)) / 2) ** 2)
    assert diffusion.linear(1000)[[0, -1]].tolist() == pytest.approx([1e-4, 0.02])
    assert diffusion.linear(100)[[0, -1]].tolist() == pytest.approx([1e-3, 0.2])
    assert diffusion.linear(100, rescale=False)[-1].item() == pytest.approx(0.02)


@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("num_steps", [10, 1000, 4000])
def test_sigmoid_keeps_its_digits_where_hardly_anything_changes(num_steps, tau):
    betas = diffusion.sigmoid(num_steps, tau=tau)
    with mpmath.workdps(80):

        def gate(t):
            return 1 / (1 + mpmath.exp(-(6 * mpmath.mpf(t) / num_steps - 3) / mpmath.mpf(tau)))

        for t in (1, 2, num_steps // 2, num_steps - 1):
            expected = (gate(t) - gate(t - 1)) / (gate(num_steps) - gate(t - 1))
            assert betas[t - 1].item() == pytest.approx(min(0.999, float(expected)), rel=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_steps", [0, -1, 2.5, "10", True])
def test_impossible_numbers_of_steps_are_refused(name, num_steps):
    with pytest.raises(ValueError, match="num_steps"):
        getattr(diffusion, name)(num_steps)


@pytest.mark.parametrize("num_steps", [1, 2, 10, 20])
def test_linear_says_what_to_do_below_21_steps(num_steps):
    with pytest.raises(ValueError, match="rescale=false"):
        diffusion.linear(num_steps)
    assert len(diffusion.linear(21)) == 21


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("constant", {"beta": 1.0}),
        ("constant", {"beta": 0.0}),
        ("linear", {"beta_end": 1.5, "rescale": False}),
        ("scaled_linear", {"beta_start": -0.1}),
        ("sigmoid", {"tau": 0.0}),
        ("sigmoid", {"start": 3.0, "end": -3.0}),
        ("log_snr_linear", {"log_snr_max": -10.0}),
        ("constant", {"beta": math.nan}),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(name, settings):
    with pytest.raises(ValueError, match=f"schedule={name}") as error:
        getattr(diffusion, name)(100, **settings)
    assert "\n" not in str(error.value)


def test_the_default_ends_of_log_snr():
    snr = diffusion.GaussianDiffusion(diffusion.log_snr_linear(5)).snr
    assert snr[[1, -1]].log().tolist() == pytest.approx([6.5, -9.0])
