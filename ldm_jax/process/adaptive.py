"""The probability-flow ODE by a solver that chooses its own steps, in a variable in which every schedule looks the same."""
import jax.numpy as jnp

from ldm_jax.process.parameterizations import eps_of_x0
from ldm_jax.process.stepping import Sampler, check_option
from ldm_jax.types import UserError, expand, split_prediction

SOLVERS = ("dopri5", "dopri8", "tsit5", "heun")
LAST = 1e-3  # the angle nearest to data; leaving out the rest errs by about its square


def ode(rtol=1e-5, atol=1e-5, solver: str = "dopri5", max_steps: int = 4096) -> Sampler:
    """From t to s by an adaptive Runge-Kutta method of the library diffrax, whatever the distance; use it with steps=1.

    With rho^2 = alpha^2 + sigma^2 and the angle phi = atan(sigma / alpha), equation (3) of stepping.py is

        d(x / rho) / d phi = cos(phi) eps - sin(phi) x0,    logsnr = -2 log tan(phi),

    bounded on all of [0, pi / 2], alpha = 0 included. sigma = 0 is left and reached at phi = 1e-3, or at the first time of a
    discrete process where that is larger; the rest of the way down is a step of `ddim`.

    All examples share the solver's steps, so one example's answer moves with the others by about the tolerance. rtol and atol may
    be traced; a solve that needs more than `max_steps` steps is an error when it runs.

    Raises:
      UserError: for an unknown solver, and where diffrax is not installed.
    """
    check_option("ode", "solver", solver, SOLVERS)
    try:
        import diffrax
    except ImportError as error:
        raise UserError("sampler 'ode' needs the library diffrax: pip install diffrax; or choose 'heun' or 'dpmpp_2m'") from error
    method = dict(zip(SOLVERS, (diffrax.Dopri5, diffrax.Dopri8, diffrax.Tsit5, diffrax.Heun)))[solver]()

    def step(denoise, schedule, x, t, s, key, carry):
        def angle(t):
            return jnp.arctan2(schedule.sigma(t), schedule.alpha(t))

        def rho(t):
            return expand(jnp.hypot(schedule.alpha(t), schedule.sigma(t)), x)

        def time(phi):
            tangent = jnp.sin(phi) / jnp.maximum(jnp.cos(phi), 1e-30)
            return jnp.clip(schedule.t_of_logsnr(-2 * jnp.log(tangent)), 0.0, 1.0)

        nearest = LAST if schedule.timesteps is None else jnp.maximum(angle(jnp.full_like(t, 1 / schedule.timesteps)), LAST)
        from_data, into_data = (schedule.sigma(u) <= 0 for u in (t, s))
        start, end = jnp.where(from_data, nearest, angle(t)), jnp.where(into_data, nearest, angle(s))
        t_first, t_last = jnp.where(from_data, time(start), t), jnp.where(into_data, time(end), s)

        def velocity(fraction, y, _):
            phi = start + fraction * (end - start)
            at = jnp.where(fraction <= 0, t_first, jnp.where(fraction >= 1, t_last, time(phi)))
            x0, _ = split_prediction(denoise(y * rho(at), at))
            cos, sin = expand(jnp.cos(phi), y), expand(jnp.sin(phi), y)
            return (expand(end - start, y) * (cos * eps_of_x0(x0, y, cos, sin) - sin * x0)).astype(y.dtype)

        y = diffrax.diffeqsolve(
            diffrax.ODETerm(velocity), method, 0.0, 1.0, None, x / rho(t), max_steps=max_steps,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol)).ys[-1]
        x0, _ = split_prediction(denoise(y * rho(t_last), t_last))
        return jnp.where(expand(into_data, x), expand(schedule.alpha(s), x) * x0, y * rho(s)).astype(x.dtype), carry

    return Sampler(step)
