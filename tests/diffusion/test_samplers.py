import pytest
import torch
from diffusers import DDIMScheduler

from diffusion import GaussianDiffusion, ancestral, constant, cosine, ddim, large, linear, log_snr_linear, sigmoid, small
from diffusion.samplers import Move, check_moves, ddim_move

SCHEDULES = pytest.mark.parametrize("betas", [linear(1000), linear(50), cosine(37), sigmoid(4), torch.tensor([0.3])])


def moments(move, x0_hat, x_t, clip=False):
    """Mean and standard deviation of a move, from what it draws with the generator set back."""
    torch.manual_seed(0)
    noise = torch.randn_like(x_t)
    torch.manual_seed(0)
    return move(x0_hat, x_t, clip) - move.std * noise, move.std


@SCHEDULES
@pytest.mark.parametrize("variance", [small, large])
def test_ancestral_moves_are_the_reverse_chain(betas, variance):
    process = GaussianDiffusion(betas, variance)
    moves = ancestral(process)
    assert [(move.t, move.s) for move in moves] == [(t, t - 1) for t in range(len(betas), 1, -1)]
    x_t, epsilon = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for move in moves:
        t = torch.full((2,), move.t)
        reverse = process.reverse(epsilon, x_t, t)
        x0_hat = (x_t - process.noise_std[move.t].float() * epsilon) / process.sqrt_alpha_bar[move.t].float()
        mean, std = moments(move, x0_hat, x_t)
        torch.testing.assert_close(mean, reverse.mean, rtol=1e-4, atol=1e-4)
        assert std == pytest.approx(reverse.log_std.exp().flatten()[0].item(), rel=1e-6)


@pytest.mark.parametrize("num_steps", [1000, 60])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_is_that_of_diffusers(num_steps, eta, clip):
    """Whose t counts from 0, and which keeps the noise that belongs to the clamped image if it is told to."""
    process = GaussianDiffusion(linear(num_steps))
    scheduler = DDIMScheduler(trained_betas=linear(num_steps).numpy(), clip_sample=clip, num_train_timesteps=num_steps)
    scheduler.set_timesteps(12)
    stride = num_steps // 12
    for step in scheduler.timesteps.tolist():
        x_t, epsilon, noise = torch.randn(3, 2, 3, 5, 5).unbind(0)
        theirs = scheduler.step(epsilon, step, x_t, eta, use_clipped_model_output=True, variance_noise=noise).prev_sample
        t, s = step + 1, max(step + 1 - stride, 0)
        x0_hat = (x_t - process.noise_std[t].float() * epsilon) / process.sqrt_alpha_bar[t].float()
        mean, std = moments(ddim_move(process, t, s, eta), x0_hat, x_t, clip)
        torch.testing.assert_close(mean + std * noise, theirs, rtol=1e-5, atol=2e-4 if step > 0.9 * num_steps else 2e-5)


@SCHEDULES
def test_ddim_with_all_its_noise_is_the_ancestral_chain(betas):
    process = GaussianDiffusion(betas)
    for ours, chain in zip(ddim(process, len(betas) + 1, eta=1.0), ancestral(process), strict=True):
        assert (ours.t, ours.s) == (chain.t, chain.s)
        assert (ours.x0, ours.xt, ours.std) == pytest.approx((chain.x0, chain.xt, chain.std), rel=1e-6, abs=1e-12)


def test_ddim_has_its_noise_where_nothing_of_the_signal_is_left():
    process = GaussianDiffusion(constant(1000, beta=0.9))
    assert process.alpha_bar[600] == 0
    move = ddim_move(process, 701, 700, eta=1.0)
    assert (move.x0, move.xt, move.std) == pytest.approx((0, 0.1**0.5, 0.9**0.5))
    assert ddim_move(process, 800, 400, eta=0.5).std == pytest.approx(0.5)


@SCHEDULES
def test_samplers_lead_from_the_last_step_to_the_first(betas):
    process = GaussianDiffusion(betas)
    for moves in (ancestral(process), ddim(process), ddim(process, 7, eta=0.5)):
        check_moves(moves, len(betas))


@pytest.mark.parametrize("steps", [[], [(9, 5), (5, 1)], [(10, 5), (4, 1)], [(10, 5), (5, 2)], [(5, 1), (10, 5)]])
def test_other_ways_are_refused(steps):
    with pytest.raises(ValueError, match=r"^model\.sampler goes from [^\n]*: moves must lead from T=10 to 1$"):
        check_moves([Move(t, s, 1.0, 0.0, 0.0) for t, s in steps], 10)


@pytest.mark.parametrize("moves", [None, 3, [(10, 1)], [None]])
def test_what_is_no_list_of_moves_is_refused(moves):
    with pytest.raises(ValueError, match=r"^model\.sampler gives [^\n]*diffusion\.samplers\.Move$"):
        check_moves(moves, 10)


@SCHEDULES
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [2, 3, 10, 999])
def test_ddim_keeps_the_marginals_of_the_steps_that_it_visits(betas, eta, num_steps):
    process = GaussianDiffusion(betas)
    moves = ddim(process, num_steps, eta)
    visited = [move.t for move in moves] + [1]
    assert visited[0] == len(betas)
    assert len(visited) == min(num_steps, len(betas)) == len(set(visited))
    for move, s in zip(moves, visited[1:], strict=True):
        assert move.s == s < move.t
        signal, before = process.alpha_bar[move.t].item(), process.alpha_bar[s].item()
        assert move.x0 + move.xt * signal**0.5 == pytest.approx(before**0.5)
        assert move.xt**2 * (1 - signal) + move.std**2 == pytest.approx(1 - before)


@pytest.mark.parametrize("settings", [{"num_steps": 1}, {"num_steps": 2.0}, {"num_steps": True}, {"eta": -0.1}, {"eta": 1.1}])
def test_settings_out_of_range_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=rf"model\.sampler\.{next(iter(settings))}="):
        ddim(GaussianDiffusion(linear(1000)), **settings)


def test_ddim_loses_no_digits_where_there_is_hardly_any_noise():
    """1 - ᾱ_1 is 3e-17 here, less than a rounding of ᾱ_1 = 1."""
    process = GaussianDiffusion(log_snr_linear(50, log_snr_max=38.0))
    for there, here in zip(ancestral(process), ddim(process, 50, eta=1.0), strict=True):
        assert (here.x0, here.xt, here.std) == pytest.approx((there.x0, there.xt, there.std), rel=1e-6)


def test_ddim_takes_the_steps_nearest_to_an_even_spread():
    assert [move.t for move in ddim(GaussianDiffusion(linear(1000)), 6)] == [1000, 800, 600, 401, 201]
