r"""DDPM: an MHVAE whose q is fixed and linear-Gaussian. In the two-variable form (Ho et al. 2020, eq. 5).

.. math::
    ELBO(x_0) = E[\ln p_θ(x_0|x_1)] - KL(q(x_T|x_0) ‖ N(0, I)) - Σ_{t=2}^T E[KL(q(x_{t-1}|x_t,x_0) ‖ p_θ(x_{t-1}|x_t))],

reconstruction - prior - matching. T = 1 leaves a VAE's ELBO, with q(x_1|x_0) for an encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import GaussianDiffusion, Parameterization, ancestral, elbo, low_discrepancy, small
from diffusion.control import Control
from diffusion.samplers import Move, check_moves
from diffusion.step_profile import StepProfile, draw_steps
from diffusion.weightings import StepTerms
from lightning_modules.base import LikelihoodModule, build
from losses import DiagGaussian, Elbo, kl
from losses.checks import is_whole
from losses.draws import global_batch, randn_like, stratified

# Several steps of one image share a network batch until it holds so many numbers, or rows. On a CPU, a U-Net takes up to twice
# as long for each row of a batch whose activations outgrow the caches; accelerators want large batches.
CPU_CALL, ACCELERATOR_CALL = (2**16, 256), (2**20, 1024)


@dataclass(frozen=True, eq=False)
class StepDraws:
    """Drawn steps, K for each of B images, as rows (B·K, ...): x_0, x_t, t and the network's output; KL_t is (B, K), nats."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    output: Tensor
    kl: Tensor


def steps_per_call(x0: Tensor) -> int:
    """Returns how many steps of each image go into one network batch: the same on every rank, as noise is drawn per call."""
    numbers, rows = CPU_CALL if x0.device.type == "cpu" else ACCELERATOR_CALL
    return max(1, min(rows, numbers // x0.shape[1:].numel()) // max(1, global_batch(len(x0))))


def check_calls(setting: str, calls: object, otherwise: str = "") -> None:
    """Refuses a number of network calls for each image that leaves none for t = 1, or none above.

    Raises:
        ValueError: naming ``setting``, and what else may be given.
    """
    if not is_whole(calls, 2):
        raise ValueError(f"{setting} must be an integer of at least 2, one for t = 1 and the rest above it{otherwise}")


class DDPMLightningModule(LikelihoodModule):
    """A denoising diffusion model of T steps.

    Args:
        network: (x_t (B, C, H, W), t (B,) int64 in 1..T) -> (B, P·C, H, W); or a factory of these sizes.
        schedule: T -> betas.
        num_steps: T ≥ 1.
        parameterization: what the network's output means; its ``outputs_per_channel`` is P.
        variance: betas -> σ_t².
        weighting: what is minimised at each step.
        timestep_sampler: (batch size, T, device) -> t, each uniform on 1..T.
        val_calls: network calls for each image in validation, ``None`` for all T. Fewer draw t by importance.
        test_calls: the same for the test set.
        sampler: chain -> the moves that :meth:`sample` makes, :func:`diffusion.ancestral` or a partial :func:`diffusion.ddim`.
        **settings: see :class:`LikelihoodModule`.
    """

    def __init__(
        self,
        network: nn.Module | Callable[..., nn.Module],
        schedule: Callable[[int], Tensor],
        num_steps: int,
        parameterization: Parameterization,
        variance: Callable[[Tensor], Tensor] = small,
        weighting: Callable[[StepTerms], Tensor] = elbo,
        timestep_sampler: Callable[[int, int, torch.device], Tensor] = low_discrepancy,
        val_calls: int | None = 8,
        test_calls: int | None = None,
        sampler: Callable[[GaussianDiffusion], list[Move]] = ancestral,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        for stage, calls in (("val", val_calls), ("test", test_calls)):
            if calls is not None:
                check_calls(f"model.{stage}_calls={calls!r}", calls, "; null is for all steps")
        self.likelihood = parameterization.likelihood(self.levels)
        with torch.device("cpu"):  # the chain's numbers are checked: torch.device("meta") has none, nor a state dict these
            process = GaussianDiffusion(schedule(num_steps), variance)
            if process.num_steps != num_steps:
                raise ValueError(
                    f"the schedule gives {process.num_steps} betas for num_steps={num_steps}: give one for each step"
                )
            parameterization.check(process)
            check_moves(sampler(process), num_steps)
        device = torch.get_default_device()
        self.process = process if device.type == "meta" else process.to(device)
        self.parameterization, self.weighting, self.timestep_sampler = parameterization, weighting, timestep_sampler
        self.sampler = sampler
        self.calls = {"val": val_calls, "test": test_calls}
        self.clip = self.levels is not None  # x̂_0 of pixels lies in [-1, 1]: in evaluation and sampling alike, not in training
        self.network = build(network, image_shape=self.image_shape, outputs_per_channel=parameterization.outputs_per_channel)
        self.step_profile = StepProfile(num_steps)

    @property
    def num_steps(self) -> int:
        """T."""
        return self.process.num_steps

    def elbo(self, x: Tensor, calls: int | None = None, proposal: Tensor | None = None, control: Control | None = None) -> Elbo:
        """Returns an unbiased estimate of the bound, of the ancestral chain p_θ, whichever sampler draws pictures.

        Args:
            x: uint8 (B, C, H, W).
            calls: network calls for each image: one at t = 1, the rest at steps drawn by importance, weighted to stay
                unbiased. ``None`` sums over every t with one noise draw for each.
            proposal: p_t for t = 0..T, (T + 1,), zero for t < 2; by default the one learned in training.
            control: takes noise out of a few calls' estimate; not used when every t is summed.

        Raises:
            ValueError: if ``calls`` leaves none for t > 1.
        """
        x0 = self.to_unit(x)
        if calls is not None:
            check_calls(f"calls={calls!r}", calls, "; None is for all steps")
        if calls is None or calls >= self.num_steps:
            matching, control = self._every_step_kl(x0).sum(0), None
        else:
            matching = self._drawn_matching(
                x0, calls - 1, self.step_profile.proposal if proposal is None else proposal, control
            )
        reconstruction = self._reconstruction(x, x0, control)
        if control is not None:
            first, steps = control.totals(x)
            reconstruction, matching = reconstruction - first, matching + steps
        return Elbo(reconstruction, self.process.prior_kl(x0), matching)

    def three_variable_elbo(self, x: Tensor) -> Elbo:
        r"""Returns the bound in the consistency form, an unbiased estimate from one drawn chain and T network calls.

        .. math::
            E[\ln p_θ(x_0|x_1)] - E[KL(q(x_T|x_{T-1}) ‖ p(x_T))] - Σ_{t=1}^{T-1} E[\ln q(x_t|x_{t-1}) - \ln p_θ(x_t|x_{t+1})]

        The last expectation is over neighbours drawn together. It is no KL: given both neighbours, x_t does not follow
        q(x_t|x_{t-1}). ``matching`` is this sum.
        """
        q, p, (x_before_last, _) = self._chain(x)
        last = torch.full((len(x),), self.num_steps, device=x.device)
        step = self.process.step(x_before_last, last)
        return Elbo(p[0], kl(step, DiagGaussian.standard(x_before_last)).to(p), q[:-1].sum(0) - p[1:].sum(0))

    def log_weight(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.log_weight`: the chain's, T network calls for a draw."""
        q, p, (_, x_last) = self._chain(x)
        return DiagGaussian.standard(x_last).log_prob(x_last) + p.sum(0) - q.sum(0)

    def _chain(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Draws x_1..x_T: ln q(x_t|x_{t-1}) and ln p_θ(x_{t-1}|x_t), (T, B) float64 each, and (x_{T-1}, x_T)."""
        before = self.to_unit(x)
        forward, backward = [], []
        for step in range(1, self.num_steps + 1):
            t = torch.full((len(x),), step, device=x.device)
            q = self.process.step(before, t)
            x_t = q.sample()
            output = self.network(x_t, t)
            if step == 1:
                log_p = self._log_likelihood(output, x, x_t, self.clip)
            else:
                log_p = self.process.reverse(output, x_t, t, self.parameterization, self.clip).log_prob(before)
            forward.append(q.log_prob(x_t))
            backward.append(log_p)
            ends = before, x_t
            before = x_t
        # float64: neighbouring terms are large and cancel
        return torch.stack(forward).double(), torch.stack(backward).double(), ends

    def evaluation_elbo(self, x: Tensor, stage: str) -> Elbo:
        """Returns :meth:`elbo` with the stage's number of network calls."""
        return self.elbo(x, self.calls[stage])

    def objective(self, x: Tensor) -> tuple[Tensor, Elbo]:
        """Returns the weighted error at one t for each image, per dimension, and the bound's estimate at that t.

        x̂_0 is clamped in the bound, as in :meth:`elbo`, and not in the loss.
        """
        x0 = self.to_unit(x)
        noise = randn_like(x0)  # before t: with T = 1 the draws are then a VAE's
        steps = self._draw_t(x)
        t = steps.to(x.device, non_blocking=True)
        marginal = self.process.marginal(x0, t)
        x_t = marginal.mean + marginal.log_std.exp() * noise
        output = self.network(x_t, t)
        prior, zero = self.process.prior_kl(x0), x0.new_zeros(len(x0))
        first = (steps == 1).nonzero().flatten().to(x.device, non_blocking=True)
        seen = x0 if self.levels is None else x  # in the model's precision, whatever the data's

        def terms(clip: bool) -> tuple[Tensor, Tensor]:
            """Reconstruction of the images whose t is 1 and KL_t of the others, 0 elsewhere: (B,) each."""
            matching = self._kl(output, x0, x_t, t, clip) if self.num_steps > 1 else zero
            if not len(first):
                return zero, matching
            values = self._log_likelihood(output[first], seen[first], x_t[first], clip)
            return zero.index_copy(0, first, values), matching.index_fill(0, first, 0.0)

        minimised = terms(clip=False)
        with torch.no_grad():  # where nothing is clamped the bound's are the same
            reconstruction, matching = terms(clip=True) if self.clip and not self.parameterization.bounded else minimised
        if self.training and self.num_steps > 1:  # for validation's proposal
            self.step_profile.record(t, matching)
        predict_noise = partial(self.parameterization.epsilon, output, x_t, t, self.process)
        loss = self._weighted(StepTerms(minimised[1] - minimised[0], prior, noise, predict_noise, self.num_steps))
        return loss.mean() / self.num_dims, Elbo(self.num_steps * reconstruction, prior, self.num_steps * matching)

    def _draw_t(self, x: Tensor) -> Tensor:
        """Returns a step for each image, (B,), on the CPU: what is in it is known there without waiting for a device.

        Raises:
            ValueError: if the sampler, which may be a user's own, gives anything else.
        """
        t = self.timestep_sampler(x.shape[0], self.num_steps, torch.device("cpu"))
        if not isinstance(t, Tensor):
            raise ValueError(f"model.timestep_sampler gives {type(t).__name__}, not a step for each image")
        if t.shape != x.shape[:1] or not all(1 <= step <= self.num_steps for step in t.tolist()):
            raise ValueError(
                f"model.timestep_sampler gives {t.flatten()[:4].tolist()}... of shape {tuple(t.shape)}, not a step from 1 to "
                f"{self.num_steps} for each of {len(x)} images"
            )
        return t

    def _weighted(self, terms: StepTerms) -> Tensor:
        """Returns what is minimised for each image, (B,).

        Raises:
            ValueError: if the weighting, which may be a user's own, gives anything else.
        """
        loss = self.weighting(terms)
        if not isinstance(loss, Tensor) or loss.shape != terms.prior.shape:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"the weighting gives {found}, not one number for each of {len(terms.prior)} images")
        return loss

    def sample(self, num: int, mean: bool = False) -> Tensor:
        """Draws from x_T ~ N(0, I) down to x_1 by the sampler's moves, x̂_0 clamped as in the bound, then from p_θ(x_0|x_1).

        The bound is the one of the ancestral sampler's images; another sampler's have none.
        """
        x_t = torch.randn(num, *self.image_shape, device=self.device, dtype=self.likelihood_dtype)
        for move in self.sampler(self.process):
            output = self.network(x_t, torch.full((num,), move.t, device=self.device))
            x0_hat = self.parameterization.x0(output, x_t, move.t, self.process)
            x_t = move(x0_hat, x_t, self.clip)
        output = self.network(x_t, torch.ones(num, dtype=torch.int64, device=self.device))
        params = self.parameterization.likelihood_params(output, x_t, self.process, self.clip)
        return self.likelihood.mean(params) if mean else self.likelihood.sample(params)

    def latent_kls(self, x: Tensor) -> Tensor:
        """See :meth:`LikelihoodModule.latent_kls`: (T, B); row t - 1 codes x_t, by the step from x_{t+1}."""
        x0 = self.to_unit(x)
        return torch.cat([self._every_step_kl(x0), self.process.prior_kl(x0).unsqueeze(0)])

    @property
    def evens_out(self) -> bool:
        """See :class:`LikelihoodModule`: where steps are drawn."""
        calls = self.calls["test"]
        return calls is not None and calls < self.num_steps

    def protocol(self) -> dict[str, Any]:
        """See :meth:`LikelihoodModule.protocol`."""
        calls, every = self.calls["test"], not self.evens_out
        how = "every step, one noise draw each" if every else "t = 1 and steps drawn by importance, unbiased"
        return {"estimator": how, "network_calls_per_image": self.num_steps if every else calls, "num_steps": self.num_steps}

    def on_validation_start(self) -> None:
        """Turns the steps' KLs seen in training into the proposal that validation draws t from."""
        super().on_validation_start()
        self.step_profile.refresh(self.trainer.strategy)

    def before_stop(self) -> None:
        """Gives rank 0 the steps' KLs that all ranks have seen since the last validation."""
        super().before_stop()
        self.step_profile.share(self.trainer.strategy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what the proposal of the next validation follows from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["step_profile"] = self.step_profile.recorded()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with it where training goes on."""
        super().on_load_checkpoint(checkpoint)
        if self.goes_on and "step_profile" in checkpoint:
            self.step_profile.restore(checkpoint["step_profile"], self.trainer.strategy)

    def _log_likelihood(self, output: Tensor, x: Tensor, x_1: Tensor, clip: bool) -> Tensor:
        params = self.parameterization.likelihood_params(output, x_1, self.process, clip)
        return self.likelihood.log_prob(params, x)

    def _reconstruction(self, x: Tensor, x0: Tensor, control: Control | None = None) -> Tensor:
        """Ln p(x_0|x_1) with one draw of x_1, and the control's c_1 of the same x_1: (B,)."""
        cost, x_1 = self.first_draws(x, x0)
        return -cost if control is None else control.first(x, x_1) - cost

    def first_draws(self, x: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Draws x_1: (-ln p(x_0|x_1) (B,) nats, x_1 (B, C, H, W)) of x uint8 and x0 = unit(x)."""
        t = torch.ones(x.shape[0], dtype=torch.int64, device=x.device)
        x_1 = self.process.marginal(x0, t).sample()
        return -self._log_likelihood(self.network(x_1, t), x, x_1, self.clip), x_1

    def _kl(self, output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Tensor:
        # t = 1 has no KL; a finite stand-in there keeps the gradient of the rows that are kept finite too
        return self.process.step_kl(x0, x_t, t.clamp(min=2), output, self.parameterization, clip)

    def step_draws(self, x0: Tensor, t: Tensor) -> StepDraws:
        """Draws x_t and KL_t for each image and step, in one network batch: x0 (B, C, H, W), t (B, K) in 2..T."""
        x0, steps = x0.repeat_interleave(t.shape[1], 0), t.flatten()
        x_t = self.process.marginal(x0, steps).sample()
        output = self.network(x_t, steps)
        return StepDraws(x0, x_t, steps, output, self._kl(output, x0, x_t, steps, self.clip).view_as(t))

    def squared_errors(self, draws: StepDraws) -> Tensor:
        """Returns ‖x_0 - x̂_0(x_t, t)‖²/D of drawn steps, x̂_0 clamped as in the bound: (B, K)."""
        x0_hat = self.parameterization.x0(draws.output, draws.x_t, draws.t, self.process)
        error = (draws.x0 - (x0_hat.clamp(-1, 1) if self.clip else x0_hat)).square()
        return error.flatten(1).mean(1).view_as(draws.kl)

    def _every_step_kl(self, x0: Tensor) -> Tensor:
        """KL_t for every t = 2..T: (T - 1, B)."""
        steps = torch.arange(2, self.num_steps + 1, device=x0.device)
        chunks = steps.split(steps_per_call(x0))
        kls = [self.step_draws(x0, chunk.expand(len(x0), -1)).kl for chunk in chunks if len(chunk)]
        return torch.cat(kls, 1).T if kls else x0.new_zeros(0, len(x0))

    def _drawn_matching(self, x0: Tensor, num: int, proposal: Tensor, control: Control | None) -> Tensor:
        """Σ_t KL_t from ``num`` steps an image: t ~ p_t, low-discrepancy over draws and batch, weighted 1/(num · p_t)."""
        uniform = stratified(len(x0), x0.device).unsqueeze(1)
        t, probability = draw_steps(proposal, (uniform + torch.arange(num, device=x0.device)) / num)
        weight = (1 / (num * probability)).to(x0.dtype)
        together = steps_per_call(x0)
        total = x0.new_zeros(len(x0))
        for steps, share in zip(t.split(together, 1), weight.split(together, 1), strict=True):
            draws = self.step_draws(x0, steps)
            values = draws.kl
            if control is not None:
                values = values - control.step(draws.x0, draws.x_t, draws.t).view_as(steps)
            total = total + (share * values).sum(1)
        return total
