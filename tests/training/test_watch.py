"""Where values first cease to be finite: planted in small computations of named layers, through everything that JAX nests."""
import jax
import jax.numpy as jnp
import pytest

from ldm_jax.training.watch import described, first_bad, watch


def where(fn, *args):
    watched, places = watch(fn)
    out, flags = jax.jit(watched)(*args)
    jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype or pytest.fail(f"{a} for {b}"), out, jax.eval_shape(fn, *args))
    found = first_bad(places, jax.device_get(flags))
    return found and described(*found)


def layer(name, x, factor=1.0):
    with jax.named_scope(name):
        return jax.nn.silu(x) * factor


def net(x, factors, wrap=lambda f: f, scan=False):
    """Three layers, each in "block", between two others; factors: what each multiplies by."""
    with jax.named_scope("Net"):
        x = layer("first", x)

        def block(x, factor):
            with jax.named_scope("block"):
                return x + layer("inner", x, factor), jnp.log(x * 0)  # what it returns beside is -inf, and nobody uses it

        if scan:
            x = jax.lax.scan(wrap(block), x, factors)[0]
        else:
            for factor in factors:
                x = wrap(block)(x, factor)[0]
        return layer("last", x).sum()


ONES, X = jnp.ones(3), jnp.linspace(1.0, 2.0, 4)
WRAPS = {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("scan", [False, True])
def test_the_layer_that_overflows_is_named(scan, wrap):
    run = lambda x, factors: net(x, factors, WRAPS[wrap], scan)
    grad = jax.value_and_grad(run, argnums=(0, 1))
    of = jnp.array if scan else tuple
    inner = "Net/block/01/inner" if scan else "Net/block/inner"
    for fn in (run, grad):
        assert where(fn, X, of([1.0, 1.0, 1.0])) is None
        assert where(fn, X, of([1.0, jnp.inf, 1.0])) == f"the output of {inner}"
        assert where(fn, X.at[2].set(jnp.nan), of([1.0, 1.0, 1.0])) == "the output of Net/first"


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("scan", [False, True])
def test_the_layer_whose_gradient_is_not_finite_is_named(scan, wrap):
    """sqrt at 0 has the value 0 and the slope inf; of the layers that come before it on the way back, none is blamed."""
    def run(x, factors):
        def block(x, factor):
            with jax.named_scope("block"):
                with jax.named_scope("root"):
                    y = jnp.sqrt(jnp.maximum(factor, 0.0) * x)
                with jax.named_scope("sum"):
                    return x + y, None
        with jax.named_scope("Net"):
            if scan:
                return jax.lax.scan(WRAPS[wrap](block), x, factors)[0].sum()
            for i, factor in enumerate(factors):
                with jax.named_scope(f"turn_{i}"):
                    x = WRAPS[wrap](block)(x, factor)[0]
            return x.sum()

    grad = jax.value_and_grad(run, argnums=(0, 1))
    assert where(grad, X, ONES) is None
    assert where(run, X, ONES.at[1].set(0.0)) is None
    found = where(grad, X, ONES.at[1].set(0.0))
    assert found == ("the gradient in Net/block/01/root" if scan else "the gradient in Net/turn_1/block/root"), found


def test_a_mask_is_nobodys_fault():
    def attend(logits, mask):
        with jax.named_scope("attention"):
            with jax.named_scope("softmax"):
                p = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf))
            with jax.named_scope("values"):
                return jnp.sum(p * jnp.arange(4.0))

    mask = jnp.array([True, True, False, True])
    fn = jax.value_and_grad(attend)
    assert where(fn, X, mask) is None
    assert where(fn, X.at[0].set(jnp.nan), mask) == "the output of attention/softmax"


def test_what_lies_outside_of_all_layers():
    def run(x, scale):
        h = scale * x
        return jnp.exp(100.0 * layer("Net", h).sum())

    assert where(run, X * 1e38, 1e38) == "the input of Net"
    assert where(run, X, 1.0) == "the loss, after the last layer"


def test_scans_within_scans():
    """The turn of each is told; keys and integers pass through."""
    def run(x, key, factors):
        def outer(carry, row):
            def inner(carry, factor):
                x, key, count = carry
                key, other = jax.random.split(key)
                with jax.named_scope("inner"):
                    x = layer("product", x + 0 * jax.random.normal(other, x.shape), factor)
                return (x, key, count + 1), count
            with jax.named_scope("outer"):
                return jax.lax.scan(inner, carry, row)
        (x, _, count), counts = jax.lax.scan(outer, (x, key, 0), factors)
        return x.sum(), count, counts

    key = jax.random.key(0)
    assert where(run, X, key, jnp.ones((3, 2))) is None
    assert where(run, X, key, jnp.ones((3, 2)).at[2, 1].set(jnp.nan)) == "the output of outer/02/inner/01/product"
