"""The text tower of latent text-to-image against float64 numpy."""
import math

import jax
import numpy as np
import pytest

from ldm_jax.models.bert import bert_text
from ldm_jax.types import UserError
from tests.models.tiny import random_params

SMALL = dict(vocab_size=20, width=12, depth=2, num_heads=3, head_width=5, mlp_width=20, max_length=9)
IDS = np.array([[2, 3, 4, 18, 0, 0, 0], [2, 9, 19, 2, 5, 18, 3]], np.int32)
MASK = np.array([[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1, 1]], bool)


def oracle(params, ids, mask, heads):
    """The states between the blocks, one text at a time and one head at a time, and the last norm of the last."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    norm = lambda p, x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]
    gelu = lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
    hidden, last = [], []
    for row, seen in zip(ids, mask):
        x = params["token"]["embedding"][row] + params["position"][:len(row)]
        states = [x]
        for i in range(SMALL["depth"]):
            p = jax.tree.map(lambda a: a[i], params["blocks"])
            h = norm(p["norm_1"], x)
            parts = []
            for q, k, v in zip(*(np.split(h @ p[n]["kernel"], heads, -1) for n in ("q", "k", "v"))):
                weights = np.exp(q @ k.T / math.sqrt(q.shape[-1])) * seen
                parts.append(weights / weights.sum(-1, keepdims=True) @ v)
            x = x + np.concatenate(parts, -1) @ p["out"]["kernel"] + p["out"]["bias"]
            h = gelu(norm(p["norm_2"], x) @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"])
            x = x + h @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
            states.append(x)
        hidden.append(states)
        last.append(norm(params["norm_out"], x))
    return np.array(hidden).swapaxes(0, 1), np.array(last)


@pytest.mark.parametrize("mask", [None, MASK])
def test_against_numpy(mask):
    tower = bert_text(**SMALL)
    params = random_params(tower)
    assert set(params["blocks"]["q"]) == {"kernel"}
    got = jax.jit(lambda p, i: tower.apply(p, i, mask, hidden=True))(params, IDS)
    hidden, last = oracle(params, IDS, np.ones_like(MASK) if mask is None else mask, 3)
    np.testing.assert_allclose(got.hidden, hidden, atol=2e-5)
    np.testing.assert_allclose(got.last, last, atol=2e-5)
    assert got.pooled is None and got.projected is None


@pytest.mark.parametrize("change, message", [(dict(head_width=0), "head_width=0"), (dict(activation="tanh"), "activation of the text"),
                                             (dict(dtype="float16"), "dtype")])
def test_refused(change, message):
    with pytest.raises(UserError, match=message):
        bert_text(**{**SMALL, **change})
