"""The names and shapes of the files that a layout describes."""
import jax
import numpy as np

from ldm_jax.pipelines.original_file import LOADERS
from ldm_jax.weights import rules


def names(builder, arguments, layout):
    """{name: shape}, for a net that is never made; the rules must name each of its parameters once."""
    want = rules.flatten(jax.eval_shape(LOADERS[builder](**arguments).init, jax.random.key(0)))
    paths = [path for rule in layout for path in rule.paths]
    assert sorted(paths) == sorted(want)
    shapes = {}
    for rule in layout:
        ours = [want[path].shape[1:] if rule.layers else want[path].shape for path in rule.paths]
        found = rule.join([np.broadcast_to(np.zeros((), bool), shape) for shape in ours]).shape
        assert not set(shapes) & set(rule.names)
        shapes.update(dict.fromkeys(rule.names, found))
    return shapes
