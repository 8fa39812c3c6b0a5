"""What a run may change on its way, and what makes it another run."""
from ldm_jax.recipe import changed


def test_where_the_data_lies_may_change_for_both_stages():
    def config(directory, seed, first_seed):
        data = {"tfds": {"data_dir": directory, "name": "cifar10"}}
        return {"data": data, "seed": seed, "first_stage": {"data": data, "seed": first_seed}}

    assert changed(config("a", 0, 0), config("b", 0, 0)) == []
    assert changed(config("a", 0, 0), config("a", 0, 1)) == ["first_stage.seed (0 there, 1 now)"]
    assert changed(config("a", 0, 0), config("b", 1, 0)) == ["seed (0 there, 1 now)"]
