"""What a run may change on its way, and what makes it another run."""
import os
import runpy

import pytest

from ldm_jax import run
from ldm_jax.recipe import changed

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


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


@pytest.mark.parametrize("stated, used", [({}, 0), ({"num_workers": 3}, 3)])
def test_the_number_of_decoding_processes_is_a_setting_that_may_change(monkeypatch, tmp_path, stated, used):
    """Not stated it is 0, as in runs from before there was the key."""
    config = runpy.run_path(os.path.join(ROOT, "configs", "digits.py"))["get_config"]().to_dict()
    before = {**config, "data": {**config["data"], **stated}}
    config["data"].pop("num_workers")
    assert changed(config, before) == []
    config["data"].update(stated)
    given = {}

    class Enough(Exception):
        pass

    def loop(batches, **_):
        batches(0, None)
        raise Enough

    monkeypatch.setattr(run, "train_loop", loop)
    monkeypatch.setattr(run, "batches", lambda **arguments: given.update(arguments))
    with pytest.raises(Enough):
        run.train(config, str(tmp_path))
    assert given["num_workers"] == used
