"""The README says what is true: its table of what exists is the tables, its files exist, and its recipes build."""
import importlib
import os
import re

import jax
import pytest

from ldm_jax.models import AUTOENCODERS, NETS
from ldm_jax.recipe import build_system
from ldm_jax.types import UserError
from tests.conftest import ROOT
from tests.runs import config

README = open(os.path.join(ROOT, "README.md")).read()
TABLES = {
    "ldm_jax.process": ["SCHEDULES", "PARAMETERIZATIONS", "TIMES", "WEIGHTS", "GRIDS", "SAMPLERS", "GUIDANCE", "DISTILLATIONS", "FEW_STEP",
                        "ADVERSARIAL"],
    "ldm_jax.models": ["NETS", "AUTOENCODERS", "CLASSIFIERS", "DISCRIMINATORS", "PERCEPTUALS"],
    "ldm_jax.systems.conditioners": ["CONDITIONERS"], "ldm_jax.data.sources": ["SOURCES"], "ldm_jax.training.state": ["OPTIMIZERS"],
}


@pytest.mark.parametrize("module, table", [(module, table) for module, tables in TABLES.items() for table in tables])
def test_the_table_of_what_exists(module, table):
    row = re.search(rf"^\| `{table}` \| (.*) \|$", README, re.M)
    assert row, f"the README has no row for {table}"
    assert re.findall(r"`(\w+)`", row[1]) == list(getattr(importlib.import_module(module), table))


def test_files_that_the_readme_names_exist():
    named = set(re.findall(r"(?:configs|launch|docs)/[\w.]+\.(?:py|sh|ipynb|png)", README))
    assert len(named) > 8 and not [path for path in named if not os.path.exists(os.path.join(ROOT, path))]


NAMES = sorted(f[:-3] for f in os.listdir(os.path.join(ROOT, "configs")) if f.endswith(".py"))
PUBLISHED = {"sd15": ["", "lora"], "sdxl": ["", "lora"], "dit_imagenet256": [""]}  # begun from a checkpoint, so without nets of their own


@pytest.mark.parametrize("name, variant", [(name, variant) for name, variants in PUBLISHED.items() for variant in variants])
def test_recipes_of_published_checkpoints_ask_for_one(name, variant):
    assert f"configs/{name}.py" in README
    settings = config(name, variant).to_dict()
    assert settings["lora"]["rank"] == (8 if variant else 0)
    with pytest.raises(UserError, match="init_from is empty; give the directory of a published checkpoint"):
        build_system(settings)


@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in PUBLISHED])
def test_every_recipe_builds_with_each_net(name, variant):
    assert f"configs/{name}.py" in README
    settings = config(name, variant).to_dict()
    counts = set()
    part = "net" if "net" in settings else "autoencoder"
    for choice in set(settings[part]) & {*NETS, *AUTOENCODERS}:
        parameters = jax.eval_shape(build_system({**settings, part: {**settings[part], "name": choice}}).init, jax.random.key(0))
        counts.add(sum(a.size for a in jax.tree.leaves(parameters[part])))
    assert len(counts) == 2
    if (name, variant) == ("ddpm_cifar", ""):
        assert 35_746_307 in counts  # Ho et al. 2020, appendix B: 35.7 million
