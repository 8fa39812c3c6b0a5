"""The mesh and its rules: where arrays lie, and that no mesh changes the numbers."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ldm_jax import models, process, systems
from ldm_jax.parallel import cost, sharding
from ldm_jax.parallel.sharding import batch_sharding, check_rules, make_mesh, place, replicated, shardings, share
from ldm_jax.parallel.signals import asking
from ldm_jax.training.loop import compiled_step, placed_state, train_step
from ldm_jax.training.state import new_state
from ldm_jax.types import UserError

# of four devices: XLA's collectives on a CPU can wait for each other for ever where the devices are many more than the cores
MESHES = {"alone": (1,), "data": (4,), "fsdp": (1, 4), "sequence": (1, 1, 4), "tensor": (1, 1, 1, 4), "mixed": (1, 2, 1, 2)}


def diffusing(net):
    return systems.diffusion(net, image_shape=(8, 8, 3), schedule=process.SCHEDULES["cosine"](), parameterization="v",
                             conditioners=conditioners())


def conditioners():
    from ldm_jax.systems.conditioners import CONDITIONERS
    from ldm_jax.systems.conditions import Space
    return {"class": CONDITIONERS["class"](Space((8, 8, 3), (8, 8, 3), 4), drop=0.5)}


SYSTEMS = {
    "dit": lambda: diffusing(models.NETS["dit"]((8, 8, 3), 4, patch=1, width=64, depth=2, num_heads=8, scan_layers=True, dropout=0.2)),
    "unet": lambda: diffusing(models.NETS["unet"]((8, 8, 3), 4, width=16, mults=(1, 2), num_res_blocks=1, attention=(4,), num_heads=2,
                                                  dropout=0.2, norm_groups=4)),
    "autoencoder": lambda: systems.autoencoding(models.AUTOENCODERS["kl"]((8, 8, 3), factor=2, width=16, mults=(1, 2), num_res_blocks=1,
                                                                          latent_channels=2), image_shape=(8, 8, 3)),
}
CASES = [*(("dit", mesh) for mesh in ("data", "fsdp", "sequence", "tensor", "mixed")),
         *(pytest.param(net, "mixed", marks=pytest.mark.long) for net in ("unet", "autoencoder"))]


@functools.lru_cache(maxsize=None)
def trained(name, axes):
    """(losses, state, share of the state's bytes that one device holds) after three updates on a mesh."""
    system, tx = SYSTEMS[name](), optax.adam(1e-2, eps=1e-3)
    mesh = make_mesh(*axes, devices=jax.devices()[:int(np.prod(axes))])
    start = lambda: new_state(system.init(jax.random.key(0)), system.trained, tx)
    placed = shardings(jax.eval_shape(start), mesh)
    state = jax.jit(start, out_shardings=placed)()
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3)).astype(np.uint8)
    batch = {"image": images, "class": np.arange(16, dtype=np.int32) % 4}
    batch = {name: place(a, batch_sharding(mesh, a.shape)) for name, a in batch.items()}
    key, good, asked = place(jax.random.key(3), replicated(mesh)), place(np.bool_(True), replicated(mesh)), asking(mesh)(0)
    step = compiled_step(train_step(system.loss_fn, tx, ema_decay=0.9, refresh=system.refresh), state, batch, key, good, asked)
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, key, good, asked)
        losses.append(float(metrics["loss"]))
    leaves = jax.tree.leaves((state.params, state.opt_state))
    held = sum(a.addressable_shards[0].data.nbytes for a in leaves) / sum(a.nbytes for a in leaves)
    return losses, jax.device_get((state.params, state.ema)), held


@pytest.fixture(scope="module", autouse=True)
def small_arrays_too():
    before, sharding.SMALLEST_SHARDED = sharding.SMALLEST_SHARDED, 64
    yield
    sharding.SMALLEST_SHARDED = before


@pytest.mark.slow
@pytest.mark.parametrize("name, mesh", CASES)
def test_no_mesh_changes_the_numbers(name, mesh):
    """Per-example times, noise, dropped conditions and dropout, the loss and three updates, against one device."""
    losses, trees, _ = trained(name, MESHES["alone"])
    again, others, held = trained(name, MESHES[mesh])
    np.testing.assert_allclose(losses, again, rtol=2e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), others, trees)
    assert held < {"data": 1.01, "sequence": 1.01, "fsdp": 0.35, "tensor": 0.45, "mixed": 0.45}[mesh]


def test_default_rules_split_blocks_by_columns_then_rows():
    mesh = make_mesh(2, 2, 1, 2)
    kernel = jnp.zeros((4, 64, 256))
    tree = {"blocks": {"q": {"kernel": kernel, "bias": jnp.zeros((4, 256))}, "out": {"kernel": kernel}, "modulation": {"kernel": kernel}},
            "conv_1": {"kernel": jnp.zeros((3, 3, 32, 64))}, "patch_out": {"kernel": jnp.zeros((64, 256))},
            "odd": {"q": {"kernel": jnp.zeros((63, 255))}}}
    specs = jax.tree.map(lambda s: s.spec, shardings(tree, mesh))
    assert specs["blocks"]["q"] == {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")}
    assert specs["blocks"]["out"]["kernel"] == specs["blocks"]["modulation"]["kernel"] == P(None, "tensor", "fsdp")
    assert specs["conv_1"]["kernel"] == P(None, None, "fsdp", "tensor")
    assert specs["patch_out"]["kernel"] == P(None, "fsdp")  # no rule: the largest axis
    assert specs["odd"]["q"]["kernel"] == P()  # what does not divide stays whole


def test_rules_of_the_user_go_first_and_to_the_letter():
    mesh = make_mesh(1, 4, 1, 2)
    tree = {"net": {"q": {"kernel": jnp.zeros((64, 512))}, "out": {"kernel": jnp.zeros((64, 512))}}}
    specs = shardings(tree, mesh, [("net/q/kernel", ("tensor", None)), ("out", ())])
    assert specs["net"]["q"]["kernel"].spec == P("tensor", None) and specs["net"]["out"]["kernel"].is_fully_replicated
    for rule, says in ((("q/kernel", ("rows",)), "rows"), (("q/kernel", (None, None, None)), "3 axes")):
        with pytest.raises(UserError, match=says):
            shardings(tree, mesh, [rule])
    with pytest.raises(UserError, match="does not divide 6"):
        shardings({"a": jnp.zeros((6,))}, mesh, [("a", ("fsdp",))])
    for rule, says in ((("nowhere", ()), "matches no parameter"), (("(", ()), "regular expression"), (("q",), "is not a pair")):
        with pytest.raises(UserError, match=says):
            check_rules([rule], tree)


def test_pictures_are_split_by_rows_too():
    mesh = make_mesh(2, 1, 4, 1)
    a = np.arange(4 * 8 * 8 * 3, dtype=np.float32).reshape(4, 8, 8, 3)
    placed = place(a, batch_sharding(mesh, a.shape))
    assert placed.addressable_shards[0].data.shape == (2, 2, 8, 3)
    np.testing.assert_array_equal(placed, a)
    assert batch_sharding(mesh, (4, 77, 64)).spec == P(("data", "fsdp"))  # a sequence beside the picture stays whole
    with pytest.raises(UserError, match="6 rows.*sequence=4"):
        batch_sharding(mesh, (4, 6, 6, 3))
    assert share(mesh) == (0, 1)


def test_keys_are_placed_as_keys():
    mesh, keys = make_mesh(8), jax.random.split(jax.random.key(0), 8)
    placed = place(keys, batch_sharding(mesh, keys.shape))
    assert placed.addressable_shards[0].data.shape == (1,)
    np.testing.assert_array_equal(jax.random.key_data(placed), jax.random.key_data(keys))


def test_a_sequence_axis_is_refused_where_convolutions_are_trained():
    """XLA's partitioner gives wrong gradients of kernels whose pictures are split by rows and whose channels are split too."""
    system, tx = SYSTEMS["unet"](), optax.sgd(1.0)
    with pytest.raises(UserError, match="sequence=8 is for networks without convolutions"):
        placed_state(lambda: new_state(system.init(jax.random.key(0)), system.trained, tx), make_mesh(1, 1, 8), ())


def test_a_sequence_axis_divides_the_memory_of_the_activations():
    """Otherwise the partitioner has gathered the tokens, and the axis is of no use."""
    net = models.NETS["dit"]((32, 32, 4), patch=1, width=32, depth=2, num_heads=2)
    def memory(*axes):
        mesh = make_mesh(*axes, devices=jax.devices()[:int(np.prod(axes))])
        params = jax.eval_shape(net.init, jax.random.key(0))
        x, t = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.float32)
        loss = lambda params, x, t: jnp.sum(net.apply(params, x, t) ** 2)
        run = jax.jit(jax.grad(loss), in_shardings=(replicated(mesh), batch_sharding(mesh, x.shape), batch_sharding(mesh, t.shape)))
        return run.lower(params, x, t).compile().memory_analysis().temp_size_in_bytes
    assert memory(1, 1, 4) < 0.4 * memory(1)


def test_fsdp_sends_weights_and_no_activations():
    """A scan over blocks included: what is received is the weights twice and their gradients, whatever the batch. Without a word from
    `models.placing` XLA splits these activations by channels and sums them over all devices."""
    net = models.NETS["dit"]((8, 8, 3), patch=1, width=64, depth=4, num_heads=4, scan_layers=True)
    mesh, params = make_mesh(1, 8), jax.eval_shape(net.init, jax.random.key(0))
    placed = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), params, shardings(params, mesh))
    x = jax.ShapeDtypeStruct((256, 8, 8, 3), jnp.float32, sharding=batch_sharding(mesh))
    t = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=batch_sharding(mesh))
    loss = lambda params, x, t: jnp.mean(net.apply(params, x, t) ** 2)
    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda a: a.sharding, placed)).lower(placed, x, t).compile()
    received = sum(size for _, size in cost.collectives(program.as_text(), 8).values())
    weights = sum(4 * a.size for a in jax.tree.leaves(params))
    assert received < 4.5 * weights < 4 * 256 * 64 * 64 * 4  # of activations, one array for each block would be more
