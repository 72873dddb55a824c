"""Diffusion maths: schedules, what the network predicts, and the loss. No model is defined here.

Symbols: z_t = alpha_t z + sigma_t eps, t = 0 ... T-1. Variance-preserving schedules have alpha_t^2 = alpha_bar_t and
sigma_t^2 = 1 - alpha_bar_t; rectified flow goes straight, alpha_t = 1 - sigma_t. SNR_t = alpha_t^2 / sigma_t^2.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch.loop import Task

SCHEDULES = ("cosine", "linear", "scaled_linear", "flow")
PREDICTIONS = ("eps", "v", "x0", "flow")


class Coefficients(NamedTuple):
    """alpha_t and sigma_t: of the whole schedule, (T,) each, or shaped to multiply a batch of latents."""

    alpha: Any
    sigma: Any


def schedule(kind: str, steps: int, beta: tuple[float, float] = (0.0015, 0.0195)) -> Coefficients:
    """alpha_t and sigma_t for t = 0 ... steps - 1, (steps,) fp32; alpha falls towards 0 as sigma rises towards 1.

    'cosine', 'linear', 'scaled_linear': variance-preserving, see `alpha_bar`. 'flow': rectified flow (Liu et al. 2023),
    sigma_t = (t + 1) / steps and alpha_t = 1 - sigma_t, so that the last one is noise and nothing else.

    Raises:
      ValueError: for another kind.
    """
    if kind == "flow":
        sigma = np.arange(1, steps + 1) / steps
        return Coefficients((1 - sigma).astype(np.float32), sigma.astype(np.float32))
    a = alpha_bar(kind, steps, beta)
    return Coefficients(np.sqrt(a).astype(np.float32), np.sqrt(1 - a).astype(np.float32))


def alpha_bar(kind: str, steps: int, beta: tuple[float, float] = (0.0015, 0.0195)) -> np.ndarray:
    """alpha_bar_t for t = 0 ... steps - 1, decreasing, in (0, 1), float64.

    'cosine': Nichol and Dhariwal 2021, Eq. 17, betas capped at 0.999. 'linear': Ho et al. 2020, betas evenly spaced
    between the two of `beta`. 'scaled_linear': Rombach et al. 2022, square roots of the betas evenly spaced.

    Raises:
      ValueError: for another kind.
    """
    if kind == "cosine":
        t = np.arange(steps + 1) / steps
        f = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    elif kind == "linear":
        betas = np.linspace(*beta, steps)
    elif kind == "scaled_linear":
        betas = np.linspace(*np.sqrt(beta), steps) ** 2
    else:
        raise ValueError(f"config.diffusion.schedule={kind!r}: use one of {', '.join(SCHEDULES)}")
    return np.cumprod(1 - betas)


def at(schedule: Coefficients, t: jax.Array, rank: int) -> Coefficients:
    """Coefficients of times t (B,), each (B, 1, ..., 1) with `rank` + 1 trailing axes."""
    return Coefficients(*(jnp.asarray(c)[t].reshape(-1, *(1,) * (rank + 1)) for c in schedule))


def q_sample(z: jax.Array, eps: jax.Array, c: Coefficients) -> jax.Array:
    """z_t ~ q(z_t | z) for the noise eps (Ho et al. 2020, Eq. 4)."""
    return c.alpha * z + c.sigma * eps


def mixture(predict: str, c: Coefficients) -> tuple[Any, Any]:
    """(a, b) of what the network is to output, a z + b eps: 'eps', 'x0' = z, 'v' = alpha eps - sigma z (Salimans and Ho
    2022), or 'flow' = eps - z, the velocity of rectified flow.

    Raises:
      ValueError: for another output.
    """
    mixtures = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-c.sigma, c.alpha), "flow": (-1.0, 1.0)}
    if predict not in mixtures:
        raise ValueError(f"config.diffusion.predict={predict!r}: use one of {', '.join(PREDICTIONS)}")
    return mixtures[predict]


def target(predict: str, z: jax.Array, eps: jax.Array, c: Coefficients) -> jax.Array:
    """What the network is to output for z_t = alpha z + sigma eps."""
    a, b = mixture(predict, c)
    return a * z + b * eps


def split(predict: str, z_t: jax.Array, output: jax.Array, c: Coefficients) -> tuple[jax.Array, jax.Array]:
    """(z_hat, eps_hat) from the network's output at z_t: the two linear equations in z and eps, solved."""
    a, b = mixture(predict, c)
    determinant = c.alpha * b - c.sigma * a
    return (b * z_t - c.sigma * output) / determinant, (c.alpha * output - a * z_t) / determinant


def min_snr_weight(predict: str, gamma: float, c: Coefficients) -> jax.Array:
    """Weight of the squared error of the network's output that makes the loss of z_hat min(SNR, gamma) (Hang et al. 2023,
    Sec. 3.4, there for eps and v): the output errs by (a - b alpha / sigma) times the error of z_hat."""
    a, b = mixture(predict, c)
    return jnp.minimum((c.alpha / c.sigma) ** 2, gamma) / (a - b * c.alpha / c.sigma) ** 2


class Denoiser(NamedTuple):
    """A network with the schedule and parametrisation it is trained for.

    Attributes:
      apply: `apply(params, z_t, t, key)`; t (B,) is scaled to [0, 1]; dropout acts where there is a key.
      schedule: (T,) each.
      predict: what it outputs, one of `PREDICTIONS`.
    """

    apply: Callable[..., jax.Array]
    schedule: Coefficients
    predict: str

    @property
    def T(self) -> int:
        return len(self.schedule.alpha)


def denoiser(apply: Callable[..., jax.Array], schedule: Coefficients, predict: str) -> Denoiser:
    """A `Denoiser` whose parts fit together.

    Raises:
      ValueError: for an unknown `predict`, or one that says nothing of z where the schedule is pure noise.
    """
    end = Coefficients(*(float(c[-1]) for c in schedule))
    a, b = mixture(predict, end)
    if end.alpha * b == end.sigma * a:
        raise ValueError(
            f"config.diffusion.predict={predict!r} cannot start from pure noise, where this schedule starts: use 'flow'"
        )
    return Denoiser(apply, schedule, predict)


def losses(
    denoiser: Denoiser, params: Any, z: jax.Array, t: jax.Array, eps: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Squared error of the network at times t, mean over latent elements: (B,)."""
    c = at(denoiser.schedule, t, z.ndim - 2)
    output = denoiser.apply(params, q_sample(z, eps, c), t / denoiser.T, key)
    return ((output - target(denoiser.predict, z, eps, c)) ** 2).mean(tuple(range(1, z.ndim)))


def task(
    denoiser: Denoiser,
    init: Callable[[jax.Array], Any],
    draw: Callable[[Any, jax.Array], jax.Array],
    *,
    min_snr: float = 0.0,
) -> Task:
    """Denoising loss of Ho et al. 2020, Eq. 14, in the network's own parametrisation.

    Times are stratified over the batch (Kingma et al. 2021, App. I.1): a lower-variance loss at no cost.

    Args:
      draw: `draw(batch, key) -> z` (B, *s, c), normalised latents.
      min_snr: gamma of `min_snr_weight`; 0 weighs all times alike.
    """

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        draw_key, t_key, eps_key, drop_key = jax.random.split(key, 4)
        z = draw(batch, draw_key)
        u = (jax.random.uniform(t_key) + jnp.arange(z.shape[0]) / z.shape[0]) % 1.0
        t = (u * denoiser.T).astype(jnp.int32)
        each = losses(denoiser, params, z, t, jax.random.normal(eps_key, z.shape), drop_key)
        if min_snr:
            each = each * min_snr_weight(denoiser.predict, min_snr, at(denoiser.schedule, t, -1))
        return each.mean(), {}

    return Task(init, loss)
