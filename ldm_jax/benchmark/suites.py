"""The suites, and one of them for one network in a process of its own: what was measured before it has no part in its figures."""
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
from typing import Any, Callable, Dict, List, Tuple

import jax
from absl import logging

from ldm_jax import machine
from ldm_jax.benchmark import compiling, nets, reading, report, sampling, saving, training
from ldm_jax.benchmark.aside import Peer
from ldm_jax.benchmark.report import Row
from ldm_jax.benchmark.settings import Settings

SUITES = {"train": training.run, "sample": sampling.run, "compile": compiling.run, "input": reading.run, "checkpoint": saving.run}
BESIDE = ("train", "sample")  # those that a peer takes part in


def measured(suite: str, net: str, settings: Settings) -> List[Row]:
    """The rows of a suite for a network, measured in this process."""
    machine.keep_freed_memory()
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every part of a save
    beside = Peer() if settings.peer_labels and suite in BESIDE else contextlib.nullcontext()
    with beside as peer:
        return SUITES[suite](net, nets.CASES[net], dataclasses.replace(settings, peer=peer))


def surroundings() -> Tuple[Dict[str, Any], Tuple[str, ...]]:
    """(facts about this machine, the networks that are measured on it unless others are asked for)."""
    return report.facts(), nets.ON_CPU if jax.default_backend() == "cpu" else tuple(nets.CASES)


def apart(function: Callable, *arguments: Any) -> Any:
    """function(*arguments) in a new process, which ends with it: an accelerator's memory is free again."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
