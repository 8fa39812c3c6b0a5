"""Conditioners: what each row draws, encodes and reads, how they are dropped, and that any number go together."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import models, process, run
from ldm_jax.systems.base import Codec, diffusion
from ldm_jax.systems.conditioners import CONDITIONERS, stepped_low_resolution
from ldm_jax.systems.conditions import Space, join, needs, of_batch, of_values, replace
from ldm_jax.types import UserError, to_signed
from tests.models.tiny import random_params
from tests.runs import config

FIELDS = {"vector": (5,), "map": (8, 8), "sequence": (4, 6), "sequence_mask": (4,)}
SPACE = Space((8, 8, 3), (8, 8, 3), 10, FIELDS)
OPTIONS = {"semantic_map": {"classes": 4}, "low_resolution": {"factor": 2, "max_noise": 0.3}, "sequence": {"mask_field": "sequence_mask"}}
PLACES = {"num_classes": "class", "context_dim": "context", "vector_dim": "vector", "concat_channels": "concat"}
N = 6


def make(name, space=SPACE, **options):
    return CONDITIONERS[name](space, **{**OPTIONS.get(name, {}), **options})


def batch(n=N, seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (n, 4))
    mask[:, 0] = 1
    return {"image": rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8), "class": rng.integers(0, 10, n).astype(np.int32),
            "vector": rng.normal(size=(n, 5)).astype(np.float32), "map": rng.integers(0, 4, (n, 8, 8)).astype(np.uint8),
            "sequence": rng.normal(size=(n, 4, 6)).astype(np.float32), "sequence_mask": mask.astype(np.uint8)}


def keys(n=N, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def same(a, b, **tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), **tolerance), a, b)


@pytest.mark.parametrize("name", CONDITIONERS)
def test_every_row_fills_what_it_says_it_needs(name):
    row = make(name)
    value = row.draw(batch(), keys())
    for places in (row.encode({}, value, keys(), Codec()), row.null(N)):
        assert set(places) - {"context_mask"} == {PLACES[need] for need in row.needs}
        for need, size in row.needs.items():
            a = places[PLACES[need]]
            if need == "num_classes":
                assert a.dtype == jnp.int32 and a.shape == (N,) and a.max() <= size
            else:
                assert a.dtype == jnp.float32 and (a.shape[0], a.shape[-1]) == (N, size)
            assert need != "concat_channels" or a.shape[1:3] == (8, 8)
    assert set(row.fields) <= set(batch())
    if row.show:
        assert row.show(value).shape == (N, 8, 8, 3) and 0 <= row.show(value).min() <= row.show(value).max() <= 1


@pytest.mark.parametrize("name", CONDITIONERS)
def test_what_is_drawn_can_be_given_by_a_user(name):
    row = make(name)
    value = jax.tree.map(np.asarray, row.draw(batch(), keys()))
    same(row.read(value), value)
    one = jax.tree.map(lambda a: a[:1], value)
    same(row.read(one), one)


@pytest.mark.parametrize("name", CONDITIONERS)
def test_dropped_is_null_and_kept_is_whole(name):
    """Rate 1 leaves nothing but the null (a sequence's is filled up with masked tokens); rate 0 leaves the condition."""
    row = make(name, drop=1.0)
    dropped, null = of_batch({name: row}, {}, batch(), keys(), Codec()), row.null(N)
    for place, a in dropped.items():
        kept = a[:, :null[place].shape[1]] if place.startswith("context") else a
        np.testing.assert_array_equal(kept, null[place])
        assert not np.any(a[:, 1:]) if place.startswith("context") else True
    other = of_batch({name: row}, {}, batch(seed=1), keys(), Codec())
    same(dropped, other)  # nothing of the example is left
    kept = [of_batch({name: make(name, drop=0.0)}, {}, batch(seed=s), keys(), Codec()) for s in (0, 1)]
    assert any(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, kept)))


def test_drops_have_their_rates_and_are_independent():
    n = 20_000
    data = {"class": jnp.zeros(n, jnp.int32), "vector": jnp.ones((n, 5))}
    cond = of_batch({"class": make("class", drop=0.3), "vector": make("vector", drop=0.6)}, {}, data, keys(n), Codec())
    a, b = np.asarray(cond["class"]) == 10, np.asarray(cond["vector"])[:, 0] == 0
    for seen, rate in ((a, 0.3), (b, 0.6), (a & b, 0.18)):
        assert abs(seen.mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)


def test_what_an_example_gets_does_not_depend_on_the_batch():
    rows = {name: make(name, drop=0.5) for name in CONDITIONERS}
    whole = of_batch(rows, {}, batch(), keys(), Codec())
    few = of_batch(rows, {}, {k: a[:2] for k, a in batch().items()}, keys()[:2], Codec())
    same(few, {k: a[:2] for k, a in whole.items()}, atol=1e-6)


def test_guidance_drops_exactly_what_training_drops():
    rows = {"class": make("class", drop=0.1), "vector": make("vector", drop=0.0), "sequence": make("sequence", drop=0.2)}
    values = {name: row.read(jax.tree.map(np.asarray, row.draw(batch(), keys()))) for name, row in rows.items()}
    given, without = of_values(rows, {}, values, keys(), Codec())
    np.testing.assert_array_equal(without["class"], 10)
    np.testing.assert_array_equal(without["vector"], given["vector"])
    np.testing.assert_array_equal(without["context"], 0)
    np.testing.assert_array_equal(without["context_mask"], np.arange(4)[None] == np.zeros((N, 1)))
    np.testing.assert_array_equal(given["class"], values["class"])
    left_out, _ = of_values(rows, {}, {"vector": values["vector"]}, keys(), Codec())
    same(left_out, {**rows["class"].null(N), **rows["sequence"].null(N), "vector": values["vector"]})


def test_conditions_that_meet_in_one_place_are_joined():
    rows = {"a": make("vector"), "b": make("low_resolution"), "c": make("masked_image"), "d": make("sequence"), "e": make("sequence")}
    assert needs(rows) == {"vector_dim": 6, "concat_channels": 7, "context_dim": 6}
    cond = of_batch({name: row for name, row in rows.items()}, {}, batch(), keys(), Codec())
    assert cond["vector"].shape == (N, 6) and cond["concat"].shape == (N, 8, 8, 7)
    assert cond["context"].shape == (N, 8, 6) and cond["context_mask"].shape == (N, 8)
    parts = [{"vector": jnp.ones((2, 1))}, {"vector": jnp.zeros((2, 2)), "class": jnp.array([1, 2])}]
    np.testing.assert_array_equal(join(parts)["vector"], [[1, 0, 0]] * 2)


def test_low_resolution_is_the_mean_and_its_noise_keeps_the_variance():
    row = make("low_resolution", max_noise=0.5)
    data = batch()
    value = row.draw(data, keys())
    blocks = data["image"].reshape(N, 4, 2, 4, 2, 3).astype(np.float64).mean((2, 4)) / 255
    np.testing.assert_allclose(value["image"], blocks, atol=1e-6)
    n = 4000
    level = np.asarray(row.draw({"image": np.zeros((n, 8, 8, 3), np.uint8)}, keys(n))["level"])
    assert 0 <= level.min() and level.max() <= 0.5 and abs(level.mean() - 0.25) < 4 * 0.5 / np.sqrt(12 * n)
    for s in (0.0, 0.3, 0.5):
        value = {"image": jnp.full((n, 4, 4, 3), 0.75), "level": jnp.full(n, s)}  # 0.5 in [-1, 1]
        out = row.encode({}, value, keys(n), Codec())
        np.testing.assert_array_equal(out["vector"], np.full((n, 1), s, np.float32))
        z = np.asarray(make("low_resolution", method="nearest", max_noise=0.5).encode({}, value, keys(n), Codec())["concat"])
        np.testing.assert_array_equal(z[:, ::2, ::2], z[:, 1::2, 1::2])  # each value fills its 2 x 2 pixels
        z = z[:, ::2, ::2].astype(np.float64)
        assert abs(z.mean() - 0.5 * np.sqrt(1 - s**2)) < 5 * s / np.sqrt(z.size) + 1e-6
        assert abs(z.std() - s) < 5 * s / np.sqrt(2 * z.size) + 1e-6


def test_low_resolution_in_steps_takes_its_noise_from_the_table():
    abar, n = [0.9, 0.6, 0.2], 4000
    row = stepped_low_resolution(Space((8, 8, 3), (4, 4, 4)), factor=2, abar=abar, highest=2, usual=1)
    level = np.asarray(row.draw({"image": np.zeros((n, 8, 8, 3), np.uint8)}, keys(n))["level"])
    np.testing.assert_allclose(np.bincount(level) / n, 1 / 3, atol=4 * np.sqrt(2 / 9 / n))
    assert row.needs == {"concat_channels": 3} and set(row.null(2)) == {"concat", "class"}
    for k, given in ((0, {"level": 0}), (1, {}), (2, {"level": [2] * n})):
        value = row.read({"image": np.full((n, 4, 4, 3), 0.75, np.float32), **given})
        out = row.encode({}, value, keys(n), Codec())
        np.testing.assert_array_equal(out["class"], np.full(n, k))
        z = np.asarray(out["concat"], np.float64)
        assert z.shape == (n, 4, 4, 3) and abs(z.mean() - 0.5 * np.sqrt(abar[k])) < 5 * np.sqrt((1 - abar[k]) / z.size)
        assert abs(z.var() - (1 - abar[k])) < 5 * (1 - abar[k]) * np.sqrt(2 / z.size)
    for wrong in (3, -1, 0.5):
        with pytest.raises(UserError, match="from 0 to 2"):
            row.read({"image": np.zeros((4, 4, 3)), "level": wrong})
    with pytest.raises(UserError, match="usual <= highest < length"):
        stepped_low_resolution(SPACE, abar=abar, highest=3)


def test_low_resolution_without_a_table_is_the_picture_alone():
    row = stepped_low_resolution(Space((8, 8, 3), (4, 4, 3)), factor=2)
    picture = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    out = row.encode({}, row.read(picture), keys(1), Codec())
    assert set(out) == set(row.null(1)) == {"concat"}
    np.testing.assert_allclose(out["concat"][0], 2 * picture - 1, atol=1e-6)


def test_a_masked_image_is_zero_where_it_is_masked():
    row, data, n = make("masked_image", smallest=0.25, largest=0.75), batch(200), 200
    value = row.draw(data, keys(n))
    concat = np.asarray(row.encode({}, value, keys(n), Codec())["concat"])
    mask, picture = concat[..., :1], np.asarray(to_signed(jnp.asarray(data["image"])))
    np.testing.assert_allclose(concat[..., 1:], np.where(mask == 1, 0.0, picture), atol=1e-6)
    hole = mask[..., 0] == 1
    heights, widths = hole.any(2).sum(1), hole.any(1).sum(1)
    np.testing.assert_array_equal(hole.sum((1, 2)), heights * widths)  # one rectangle
    assert {2, 6} <= set(heights) == set(widths) and heights.min() == 2 and heights.max() == 6
    assert (hole.mean(0) > 0).all()  # anywhere, the corners included


def test_in_latents_pictures_are_encoded_and_maps_and_masks_made_small():
    space = Space((8, 8, 3), (4, 4, 2), 10, FIELDS)
    codec = Codec(encode=lambda params, batch, key: params["gain"] * batch["image"][:, ::2, ::2, :2])
    masked = CONDITIONERS["masked_image"](space)
    assert masked.needs == {"concat_channels": 3}
    np.testing.assert_array_equal(masked.null(2)["concat"][1, 3], [[1, 0, 0]] * 4)
    mask = np.zeros((1, 8, 8, 1), np.float32)
    mask[:, :, 4:] = 1
    out = masked.encode({"gain": 2.0}, {"image": jnp.full((1, 8, 8, 3), 0.75), "mask": mask}, keys(1), codec)["concat"]
    np.testing.assert_allclose(out[0, 0], [[0, 1, 1], [0, 1, 1], [1, 0, 0], [1, 0, 0]])  # mask, 2 x 0.5, 2 x 0.5
    ids = batch()["map"].astype(np.int32)
    out = np.asarray(CONDITIONERS["semantic_map"](space, classes=4).encode({}, ids, keys(), codec)["concat"])
    np.testing.assert_array_equal(out, np.eye(4)[ids[:, ::2, ::2]])
    low = CONDITIONERS["low_resolution"](space, factor=4)
    assert low.encode({}, low.draw(batch(), keys()), keys(), codec)["concat"].shape == (N, 4, 4, 3)


def test_a_sequence_without_tokens_is_the_null():
    row = make("sequence")
    value = {"tokens": jnp.ones((2, 3, 6)), "mask": jnp.array([[False] * 3, [False, True, False]])}
    out, null = row.encode({}, value, keys(2), Codec()), row.null(2)
    same({k: a[:1] for k, a in replace(jnp.zeros(2, bool), out, null).items()}, {k: a[:1] for k, a in out.items()})
    np.testing.assert_array_equal(out["context_mask"][1], [False, True, False])
    np.testing.assert_array_equal(out["context"][1], np.array([[0.0], [1.0], [0.0]]) * np.ones((1, 6)))


FOUR = ("class", "vector", "sequence", "low_resolution", "masked_image", "semantic_map")


@pytest.mark.parametrize("name", models.NETS)
def test_all_kinds_together_reach_every_net(name):
    rows = {kind: make(kind, drop=0.0) for kind in sorted(FOUR)}
    sizes = needs(rows)
    options = {"unet": dict(width=8, mults=(1,), num_res_blocks=1, attention=(), transformer_depth=1),
               "dit": dict(width=16, depth=1, num_heads=2, patch=2)}[name]
    net = models.NETS[name]((8, 8, 3), **sizes, **options)
    system = diffusion(net, image_shape=(8, 8, 3), schedule=process.SCHEDULES["cosine"](), parameterization="v", conditioners=rows)
    params, data = {"net": random_params(net)}, jax.tree.map(lambda a: a[:2], batch())
    cond = of_batch(rows, {}, data, keys(2), Codec())
    given = {place: a for place, a in cond.items() if a.dtype == jnp.float32}

    @jax.jit
    def reached(params, image, given):
        twice = lambda a: jnp.concatenate([a, a])
        labels = jnp.concatenate([cond["class"], 9 - cond["class"]])

        def square(given):
            told = {**cond, **given, "class": labels, "context_mask": twice(cond["context_mask"])}
            out = net.apply(params["net"], twice(to_signed(image)), twice(jnp.array([0.3, 0.7])), told)
            return jnp.sum(out**2), out[:2] - out[2:]

        return jax.grad(square, has_aux=True)(jax.tree.map(twice, given))

    assert jax.eval_shape(system.loss_fn, params, data, jax.random.key(0))[0].shape == (2,)
    reach, change = reached(params, data["image"], given)
    assert (np.abs(np.asarray(change)).max((1, 2, 3)) > 1e-4).all()
    assert (np.abs(np.asarray(reach["vector"])).min(0) > 0).all()
    assert (np.abs(np.asarray(reach["concat"])).max((0, 1, 2)) > 0).all()  # every channel of every picture
    used = np.abs(np.asarray(reach["context"])).max(-1) > 0
    np.testing.assert_array_equal(used, np.tile(cond["context_mask"], (2, 1)))


@pytest.mark.parametrize("name, options, says", [
    ("vector", {"field": "colour"}, "no field 'colour'; it has: map, sequence"),
    ("vector", {"field": "map"}, "field 'map' has shape"),
    ("vector", {"drop": 1.5}, "drop=1.5"),
    ("sequence", {"mask_field": "vector"}, "field 'vector' has shape"),
    ("semantic_map", {"field": "sequence"}, "has the picture's"),
    ("low_resolution", {"factor": 3}, "factor=3"),
    ("low_resolution", {"max_noise": 2.0}, "max_noise=2.0"),
    ("low_resolution", {"method": "cubic"}, "unknown method 'cubic'"),
    ("masked_image", {"largest": 2.0}, "largest=2.0"),
])
def test_mistakes_when_built(name, options, says):
    with pytest.raises(UserError, match=says):
        make(name, **options)


def test_a_class_needs_classes():
    with pytest.raises(UserError, match="data.num_classes"):
        CONDITIONERS["class"](Space((8, 8, 3), (8, 8, 3)))


PICTURES = np.zeros((2, 4, 4, 3), np.float32)


@pytest.mark.parametrize("name, value, says", [
    ("class", [10], "class id 10 is out of range; this model knows 0 to 9"),
    ("class", "seven", "takes class ids"),
    ("class", [[1, 2]], "shape"),
    ("vector", np.zeros((2, 4)), "vectors of shape \\(2, 4\\).*\\(5,\\)"),
    ("vector", ["a"], "vectors of 5 numbers"),
    ("vector", [np.nan] * 5, "not finite"),
    ("sequence", np.zeros((2, 4, 5)), "a sequence has shape"),
    ("sequence", {"words": [1]}, "it takes tokens and optionally mask"),
    ("sequence", {"tokens": np.zeros((2, 4, 6)), "mask": np.ones((2, 3))}, "masks of shape"),
    ("semantic_map", np.full((8, 8), 4), "id 4 is out of range"),
    ("semantic_map", np.zeros((4, 4), int), "semantic maps of shape \\(4, 4\\)"),
    ("semantic_map", np.zeros((8, 8)), "maps of ids"),
    ("low_resolution", np.zeros((2, 8, 8, 3)), "pictures of shape"),
    ("low_resolution", PICTURES - 1, "give uint8, or \\[0, 1\\]"),
    ("low_resolution", {"image": PICTURES, "level": 0.4}, "level=0.4.*0 to 0.3"),
    ("low_resolution", {"image": PICTURES, "level": [0.1] * 3}, "2 of 'image' were given for 3"),
    ("masked_image", np.zeros((8, 8, 3)), "is given as"),
    ("masked_image", {"image": np.zeros((8, 8, 3))}, "it takes image, mask"),
    ("masked_image", {"image": np.zeros((8, 8, 3)), "mask": np.full((8, 8), 0.5)}, "0 .*and 1"),
    ("masked_image", {"image": np.zeros((8, 8, 3)), "mask": np.ones((4, 4))}, "masks of shape"),
])
def test_mistakes_when_given(name, value, says):
    with pytest.raises(UserError, match=says):
        make(name).read(value)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="second class"):
        needs({"class": make("class"), "kind": make("class")})
    wide = CONDITIONERS["vector"]
    other = Space((8, 8, 3), (8, 8, 3), None, {"sequence": (4, 7)})
    with pytest.raises(UserError, match="make them equal"):
        needs({"a": make("sequence"), "b": CONDITIONERS["sequence"](other)})
    net = models.NETS["dit"]((8, 8, 3), vector_dim=4, width=16, depth=1, num_heads=2)
    with pytest.raises(UserError, match="built with vector_dim=4.*need vector_dim=5"):
        diffusion(net, image_shape=(8, 8, 3), schedule=process.SCHEDULES["cosine"](), parameterization="v",
                  conditioners={"vector": wide(SPACE)})
    with pytest.raises(UserError, match="drawn from 'vector', which the data lacks"):
        of_batch({"vector": make("vector")}, {}, {"image": batch()["image"]}, keys(), Codec())


@pytest.mark.parametrize("change, says", [
    (dict(conditioners={"clas": {}}), "unknown conditioner 'clas'; choose from"),
    (dict(conditioners={"class": {"rate": 0.1}}), "has no option 'rate'; it takes: drop"),
    (dict(conditioners={"vector": {"field": "size"}}), "no field 'size'; it has: map, sequence"),
])
def test_mistakes_in_a_config(change, says):
    from ldm_jax import recipe
    with pytest.raises(UserError, match=says):
        recipe.build_system({**config("shapes", "all_smoke").to_dict(), **change})
    data = config("shapes", "all_smoke").to_dict()["data"]
    with pytest.raises(UserError, match="'vector' of data 'shapes' has shape \\(9,\\), the config states \\(8,\\)"):
        recipe.build_source({**data, "fields": {"vector": (8,)}}, "train")
    with pytest.raises(UserError, match="'digits' has no fields"):
        recipe.build_source({**data, "name": "digits"}, "train")


def test_pictures_as_conditions_rule_out_a_cache_of_latents():
    from ldm_jax import recipe
    settings = config("ldm_cifar", "smoke").to_dict()
    settings["conditioners"] = {"masked_image": {}, "class": {}}
    settings["latents"] = {**settings.get("latents", {}), "cache": True}
    with pytest.raises(UserError, match="'masked_image' is drawn from the pictures"):
        recipe.build_system(settings)
    system = recipe.build_system({**settings, "latents": {**settings["latents"], "cache": False}})
    params = jax.eval_shape(system.init, jax.random.key(0))
    data = {"image": jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.uint8), "class": jax.ShapeDtypeStruct((2,), jnp.int32)}
    assert jax.eval_shape(system.loss_fn, params, data, jax.random.key(0))[0].shape == (2,)


@pytest.mark.slow
@pytest.mark.long
def test_a_recipe_of_several_conditions_trains_samples_and_draws(tmp_path):
    settings = config("shapes", "all_smoke").to_dict()
    settings["net"]["name"] = "dit"
    kinds = settings["conditioners"]
    settings["conditioners"] = {"vector": kinds["vector"], "semantic_map": kinds["semantic_map"], "low_resolution": kinds["low_resolution"],
                                "small": {"kind": "low_resolution", "factor": 8, "drop": 0.1}}  # the same kind twice
    pipeline = run.train(settings, str(tmp_path))
    assert {"grid.png", "denoising.png", "real_and_generated.png"} <= {path.name for path in (tmp_path / "samples").iterdir()}
    assert set(pipeline.system.conditioners) == {*settings["conditioners"]}
    assert (tmp_path / "samples" / run.sample(run.load(str(tmp_path)), str(tmp_path), num=3, classes=None, seed=0)).exists()
