"""The networks that the benchmark runs beside ours are the same functions, from the same parameters."""
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from ldm_jax.benchmark import nets, peer  # noqa: E402
from ldm_jax.models.dit import dit  # noqa: E402
from ldm_jax.weights import original_dit, rules  # noqa: E402


def test_the_dit_is_ours():
    torch.manual_seed(0)
    theirs = peer.DiT(8, 4, depth=2, width=32, heads=2, classes=10)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    arrays = {name: a.numpy() for name, a in theirs.state_dict().items() if name != original_dit.POSITIONS}
    arguments = original_dit.dit_arguments(dict(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, learn_sigma=False))
    net = dit(**arguments)
    params = rules.load(original_dit.dit_rules(arguments), arrays, jax.eval_shape(net.init, jax.random.key(0)))
    x, y = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32), np.array([0, 4, 10])
    with torch.no_grad():
        want = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.full((3,), 249), torch.tensor(y)).permute(0, 2, 3, 1).numpy()
    got = net.apply(params, jnp.asarray(x), jnp.full(3, 0.25), jnp.asarray(y))
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", peer.PEERS)
def test_networks_have_as_many_parameters(name):
    net = nets.system_of(nets.CASES[name], "float32").nets["net"]
    ours = sum(a.size for a in jax.tree.leaves(jax.eval_shape(net.init, jax.random.key(0))))
    with torch.device("meta"):
        theirs = sum(p.numel() for p in peer.PEERS[name]().parameters())
    assert ours == theirs


def test_ddim_of_one_step_is_the_formula():
    class Constant(torch.nn.Module):
        def forward(self, x, t):
            return type("Out", (), {"sample": torch.ones_like(x)})

    abar = torch.tensor([0.9, 0.5])
    x = peer.ddim(Constant(), torch.full((1, 1, 1, 1), 2.0), [1], abar, None)
    assert float(x) == pytest.approx((2.0 - 0.5**0.5) / 0.5**0.5)
