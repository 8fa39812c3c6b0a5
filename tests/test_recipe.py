"""What a run may change on its way, and what makes it another run."""
from ldm_jax.recipe import changed


def test_where_the_data_lies_may_change_for_both_stages():
    def config(directory, seed, first_seed):
        data = {"tfds": {"data_dir": directory, "name": "cifar10"}}
        return {"data": data, "seed": seed, "first_stage": {"data": data, "seed": first_seed}}

    assert changed(config("a", 0, 0), config("b", 0, 0)) == []
    assert changed(config("a", 0, 0), config("a", 0, 1)) == ["first_stage.seed (0 there, 1 now)"]
    assert changed(config("a", 0, 0), config("b", 1, 0)) == ["seed (0 there, 1 now)"]


def test_a_run_from_before_a_key_goes_on_while_the_key_is_off():
    def config(**averages):
        return {"train": {"steps": 1, "averages": {"every": 1000, **averages}}, "init_dir": "", "init_part": "",
                "first_stage": {"init_dir": ""}}

    before = {"train": {"steps": 1}, "first_stage": {}}
    assert changed(before, config(stds=[])) == [] == changed(config(stds=[]), {**before, "seed": None})
    assert changed(before, config(stds=[0.05])) == ["train.averages.stds ([] there, [0.05] now)"]
    assert changed(before, {**config(stds=[]), "init_dir": "run"}) == ["init_dir ('' there, 'run' now)"]
