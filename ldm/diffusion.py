"""Diffusion maths: schedules, what the network predicts, the loss, and the sampler. No model is defined here.

Symbols: z_t = alpha_t z + sigma_t eps with alpha_t^2 = alpha_bar_t, sigma_t^2 = 1 - alpha_bar_t; t = 0 ... T-1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from launch.loop import Task

SCHEDULES = ("cosine", "linear", "scaled_linear")
PREDICTIONS = ("eps", "v", "x0")


def alpha_bar(kind: str, steps: int, beta: tuple[float, float] = (0.0015, 0.0195)) -> np.ndarray:
    """alpha_bar_t for t = 0 ... steps - 1, decreasing, in (0, 1), fp32.

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
    return np.cumprod(1 - betas).astype(np.float32)


class Coefficients(NamedTuple):
    """alpha_t and sigma_t, shaped to multiply a batch of latents."""

    alpha: jax.Array
    sigma: jax.Array


def at(alpha_bar_T: jax.Array, t: jax.Array, rank: int) -> Coefficients:
    """Coefficients of times t (B,), each (B, 1, ..., 1) with `rank` + 1 trailing axes."""
    a = jnp.asarray(alpha_bar_T)[t].reshape(-1, *(1,) * (rank + 1))
    return Coefficients(jnp.sqrt(a), jnp.sqrt(1 - a))


def q_sample(z: jax.Array, eps: jax.Array, c: Coefficients) -> jax.Array:
    """z_t ~ q(z_t | z) for the noise eps (Ho et al. 2020, Eq. 4)."""
    return c.alpha * z + c.sigma * eps


def check(predict: str) -> None:
    """Raises ValueError unless `predict` is one of `PREDICTIONS`."""
    if predict not in PREDICTIONS:
        raise ValueError(f"config.diffusion.predict={predict!r}: use one of {', '.join(PREDICTIONS)}")


def target(predict: str, z: jax.Array, eps: jax.Array, c: Coefficients) -> jax.Array:
    """What the network is to output: eps, x0 = z, or v = alpha eps - sigma z (Salimans and Ho 2022)."""
    check(predict)
    if predict == "eps":
        return eps
    if predict == "x0":
        return z
    return c.alpha * eps - c.sigma * z


def split(predict: str, z_t: jax.Array, output: jax.Array, c: Coefficients) -> tuple[jax.Array, jax.Array]:
    """(z_hat, eps_hat) from the network's output at z_t; inverse of `target`."""
    if predict == "eps":
        return (z_t - c.sigma * output) / c.alpha, output
    if predict == "x0":
        return output, (z_t - c.alpha * output) / c.sigma
    return c.alpha * z_t - c.sigma * output, c.sigma * z_t + c.alpha * output


class Denoiser(NamedTuple):
    """A network with the schedule and parametrisation it is trained for.

    Attributes:
      apply: `apply(params, z_t, t, train, key)`; t (B,) is scaled to [0, 1].
      alpha_bar_T: (T,) fp32.
    """

    apply: Callable[..., jax.Array]
    alpha_bar_T: np.ndarray
    predict: str


def losses(
    denoiser: Denoiser, params: Any, z: jax.Array, t: jax.Array, eps: jax.Array, key: jax.Array | None
) -> jax.Array:
    """Squared error of the network at times t, mean over latent elements: (B,)."""
    c = at(denoiser.alpha_bar_T, t, z.ndim - 2)
    output = denoiser.apply(params, q_sample(z, eps, c), t / len(denoiser.alpha_bar_T), key)
    return ((output - target(denoiser.predict, z, eps, c)) ** 2).mean(tuple(range(1, z.ndim)))


def task(denoiser: Denoiser, init: Callable[[jax.Array], Any], draw: Callable[[Any, jax.Array], jax.Array]) -> Task:
    """Denoising loss of Ho et al. 2020, Eq. 14, in the network's own parametrisation.

    Times are stratified over the batch (Kingma et al. 2021, App. I.1): a lower-variance loss at no cost.

    Args:
      draw: `draw(batch, key) -> z` (B, *s, c), normalised latents.
    """
    T = len(denoiser.alpha_bar_T)

    def loss(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        draw_key, t_key, eps_key, drop_key = jax.random.split(key, 4)
        z = draw(batch, draw_key)
        u = (jax.random.uniform(t_key) + jnp.arange(z.shape[0]) / z.shape[0]) % 1.0
        t = (u * T).astype(jnp.int32)
        each = losses(denoiser, params, z, t, jax.random.normal(eps_key, z.shape), drop_key)
        return each.mean(), {}

    return Task(init, loss)


def timesteps(T: int, steps: int) -> np.ndarray:
    """`steps` times evenly spaced from T - 1 down to 0 ('trailing': the first is pure noise, Lin et al. 2023): (steps,).

    Raises:
      ValueError: unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"config.sample.steps={steps} must be between 1 and config.diffusion.steps={T}")
    return (np.round(np.linspace(T, 0, steps, endpoint=False)) - 1).astype(np.int32)


def sample(
    denoiser: Denoiser, params: Any, keys_B: jax.Array, shape: tuple[int, ...], *, steps: int, eta: float
) -> jax.Array:
    """Latents (B, *shape) by DDIM (Song et al. 2021, Eq. 12 and 16) as one scan.

    Args:
      keys_B: one key per sample; a sample depends on its own key alone, not on its batch.
      eta: 0 is deterministic DDIM; 1 with `steps` = T is ancestral sampling (Ho et al. 2020, Alg. 2).
    """
    times = timesteps(len(denoiser.alpha_bar_T), steps)
    now = jnp.asarray(denoiser.alpha_bar_T)[times]
    following = jnp.append(now[1:], 1.0)

    def normal(step: jax.Array | int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, step), shape))(keys_B)

    def body(z_t: jax.Array, xs: tuple) -> tuple[jax.Array, None]:
        i, t, a, a_next = xs
        c = Coefficients(jnp.sqrt(a), jnp.sqrt(1 - a))
        output = denoiser.apply(params, z_t, jnp.full(z_t.shape[:1], t) / len(denoiser.alpha_bar_T), None)
        z_hat, eps_hat = split(denoiser.predict, z_t, output, c)
        spread = eta * jnp.sqrt(jnp.maximum((1 - a_next) / (1 - a) * (1 - a / a_next), 0.0))
        direction = jnp.sqrt(jnp.maximum(1 - a_next - spread**2, 0.0))
        z_next = jnp.sqrt(a_next) * z_hat + direction * eps_hat
        return (z_next + spread * normal(i + 1)) if eta else z_next, None

    z, _ = jax.lax.scan(body, normal(0), (jnp.arange(steps), jnp.asarray(times), now, following))
    return z
