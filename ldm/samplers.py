"""Samplers: from noise to latents along a schedule, each as one loop over its steps.

A denoiser gives z_hat and eps_hat at every time, and along its probability-flow equation dz_t = z_hat dalpha +
eps_hat dsigma, whatever the schedule (Song et al. 2021b; Lipman et al. 2023). Every sampler here is written in alpha and
sigma alone, so each runs on the variance-preserving schedules and on rectified flow. A sample depends on its own key alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ldm.diffusion import Coefficients, Denoiser, split


class Step(NamedTuple):
    """One step, from the time t with coefficients `now` to `t_next` with `then`; `mix` is that of `dpmpp`."""

    index: Any
    t: Any
    t_next: Any
    now: Coefficients
    then: Coefficients
    mix: Any


def timesteps(T: int, steps: int) -> np.ndarray:
    """`steps` times evenly spaced from T - 1 down to 0 ('trailing': the first is pure noise, Lin et al. 2023): (steps,).

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"config.sample.steps={steps} must be between 1 and config.diffusion.steps={T}")
    return (np.round(np.linspace(T, 0, steps, endpoint=False)) - 1).astype(np.int32)


def plan(schedule: Coefficients, steps: int) -> Step:
    """All steps, stacked along axis 0; the last one ends at the latent itself, alpha = 1 and sigma = 0."""
    times = timesteps(len(schedule.alpha), steps)
    alpha, sigma = (
        np.append(np.asarray(c, np.float64)[times], end) for c, end in zip(schedule, (1.0, 0.0), strict=True)
    )
    with np.errstate(divide="ignore"):
        h = np.diff(np.log(alpha) - np.log(sigma))  # of the log signal-to-noise ratio; may be infinite at both ends
    mix = np.zeros(steps)
    mix[1:-1] = h[1:-1] / (2 * h[:-2])
    f = lambda x: jnp.asarray(x, jnp.float32)
    now, then = (Coefficients(f(alpha[cut]), f(sigma[cut])) for cut in (slice(None, -1), slice(1, None)))
    return Step(jnp.arange(steps), jnp.asarray(times), jnp.asarray(np.append(times[1:], 0)), now, then, f(mix))


def ddim(model: Callable, s: Step, z: jax.Array, before: jax.Array, normal: Callable, eta: float) -> tuple:
    """DDIM (Song et al. 2021a, Eq. 12 and 16); with eta=0 also Euler's method on a flow.

    The noise put back is `eta` times the standard deviation of q(z_then | z_now, z).
    """
    del before
    z_hat, eps_hat = model(z, s.t, s.now)
    if not eta:
        return s.then.alpha * z_hat + s.then.sigma * eps_hat, z_hat
    forward = s.now.sigma**2 - (s.now.alpha / s.then.alpha * s.then.sigma) ** 2  # variance of q(z_now | z_then)
    spread = eta * jnp.sqrt(jnp.maximum(forward, 0.0)) * s.then.sigma / s.now.sigma
    direction = jnp.sqrt(jnp.maximum(s.then.sigma**2 - spread**2, 0.0))
    return s.then.alpha * z_hat + direction * eps_hat + spread * normal(s.index + 1), z_hat


def ddpm(model: Callable, s: Step, z: jax.Array, before: jax.Array, normal: Callable, eta: float) -> tuple:
    """Ancestral sampling (Ho et al. 2020, Alg. 2, with the variance of q(z_then | z_now, z)), of any number of steps."""
    del eta
    return ddim(model, s, z, before, normal, 1.0)


def dpmpp(model: Callable, s: Step, z: jax.Array, before: jax.Array, normal: Callable, eta: float) -> tuple:
    """DPM-Solver++(2M) (Lu et al. 2022, Alg. 2): second order at one evaluation a step; first and last step first order."""
    del normal, eta
    z_hat, _ = model(z, s.t, s.now)
    ratio = s.then.sigma / s.now.sigma
    straight = z_hat + s.mix * (z_hat - before)  # mix = 1 / (2 r) of the paper
    return ratio * z + (s.then.alpha - s.now.alpha * ratio) * straight, z_hat


def heun(model: Callable, s: Step, z: jax.Array, before: jax.Array, normal: Callable, eta: float) -> tuple:
    """Heun's method: second order at two evaluations a step; the last step, to sigma = 0, is Euler's."""
    del before, normal, eta
    z_hat, eps_hat = model(z, s.t, s.now)
    euler = s.then.alpha * z_hat + s.then.sigma * eps_hat

    def corrected() -> jax.Array:
        z_end, eps_end = model(euler, s.t_next, s.then)
        d_alpha, d_sigma = s.then.alpha - s.now.alpha, s.then.sigma - s.now.sigma
        return z + (d_alpha * (z_hat + z_end) + d_sigma * (eps_hat + eps_end)) / 2

    return jax.lax.cond(s.then.sigma > 0, corrected, lambda: euler), z_hat


SAMPLERS = {"ddim": ddim, "euler": ddim, "ddpm": ddpm, "dpmpp": dpmpp, "heun": heun}


def sample(
    denoiser: Denoiser,
    params: Any,
    keys_B: jax.Array,
    shape: tuple[int, ...],
    *,
    sampler: str,
    steps: int,
    eta: float = 0.0,
    z: jax.Array | None = None,
    first: jax.Array | int = 0,
) -> jax.Array:
    """Latents (B, *shape).

    Args:
      keys_B: one key per sample; a sample depends on its own key alone, not on its batch.
      z: latents (B, *shape) to start from in place of nothing: they are given the noise of step `first` of the `steps`
        and denoised from there.
      sampler: one of `SAMPLERS`.
      eta: of 'ddim': 0 is deterministic, 1 is 'ddpm'.
    Raises:
      ValueError: an unknown sampler, too many steps, or an `eta` that the sampler does not have.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"config.sample.sampler={sampler!r}: use one of {', '.join(SAMPLERS)}")
    if eta and sampler != "ddim":
        raise ValueError(f"config.sample.eta={eta} is a setting of 'ddim', not of config.sample.sampler={sampler!r}")

    def normal(step: jax.Array | int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape))(keys_B)

    def model(z_t: jax.Array, t: jax.Array, c: Coefficients) -> tuple[jax.Array, jax.Array]:
        output = denoiser.apply(params, z_t, jnp.full(z_t.shape[:1], t) / denoiser.T, None)
        return split(denoiser.predict, z_t, output, c)

    path = plan(denoiser.schedule, steps)
    at = lambda i: jax.tree.map(lambda rows: rows[i], path)
    start = normal(0)
    if z is not None:
        now = at(first).now
        start = now.alpha * z + now.sigma * start
    body = lambda i, carry: SAMPLERS[sampler](model, at(i), *carry, normal, eta)
    return jax.lax.fori_loop(first, steps, body, (start, jnp.zeros_like(start)))[0]
