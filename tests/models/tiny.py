"""Parameters for tests that want none of them zero, drawn without compiling anything."""
import jax
import numpy as np


def random_params(net, seed=0):
    """float32 numpy leaves: kernels of variance 1 / fan_in, scales about 1, everything else of size 0.2."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        if name == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
        return 0.2 * noise + (name == "scale")

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(net.init, jax.random.key(0)))


def count(net):
    """The number of parameters, from abstract shapes."""
    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))
