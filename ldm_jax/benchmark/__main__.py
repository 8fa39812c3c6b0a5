"""Speed on this machine, alone or beside PyTorch:

    python -m ldm_jax.benchmark [--suite=train,sample,compile,input,checkpoint] [--net=dit_s2,...] [--peer=torch] [--out=FILE.json]

Prints a table and writes JSON with device, versions and commit. Peers take turns with us in one run; a ratio is of a pair of turns,
ours above 1 being the faster, its median with the smallest and the largest. Without --net the networks are those that the machine can bear.
"""
import datetime
import importlib.util
import os
import re
import sys

from absl import app, flags

from ldm_jax.benchmark import nets, report
from ldm_jax.benchmark.settings import Settings
from ldm_jax.benchmark.suites import SUITES, apart, measured, surroundings
from ldm_jax.types import UserError, lookup

PEERS = {"": (), "torch": ("torch eager", "torch compiled"), "torch-eager": ("torch eager",)}
flags.DEFINE_list("suite", list(SUITES), f"What to measure: {', '.join(SUITES)}.")
flags.DEFINE_list("net", None, "Which networks, rows of nets.CASES.")
flags.DEFINE_enum("peer", "", list(PEERS), "Beside whom: torch runs eagerly and compiled, and the better of the two counts.")
flags.DEFINE_integer("rounds", 5, "How often each call is timed.", lower_bound=1)
flags.DEFINE_integer("steps", 10, "Of the sampler.", lower_bound=1)
flags.DEFINE_integer("batch", None, "Instead of the networks' own.", lower_bound=1)
flags.DEFINE_string("out", None, "The JSON file; by default benchmarks/results/DEVICE_DATE.json.")
FLAGS = flags.FLAGS


def measure() -> str:
    """Run the suites asked for; returns the path of the JSON."""
    for table, names, kind in ((SUITES, FLAGS.suite, "suite"), (nets.CASES, FLAGS.net or (), "net")):
        for name in names:
            lookup(table, name, kind)
    check_peer()
    about, usual = apart(surroundings)
    settings = Settings(rounds=FLAGS.rounds, steps=FLAGS.steps, batch=FLAGS.batch, asked=FLAGS.net and tuple(FLAGS.net),
                        peer_labels=PEERS[FLAGS.peer])
    out, rows = FLAGS.out or os.path.join("benchmarks", "results", f"{slug(about['device'])}_{datetime.date.today()}.json"), []
    for suite in FLAGS.suite:
        for net in FLAGS.net or usual:
            new = apart(measured, suite, net, settings)
            rows += new
            report.write(out, rows, about, sys.argv[1:])  # what is measured is kept, whatever comes after
            print("\n".join(report.table(new).splitlines()[2:]), file=sys.stderr, flush=True)
    print(report.table(rows))
    return out


def check_peer() -> None:
    """Raises UserError when the peer that is asked for cannot be had."""
    missing = [name for name in ("torch", "diffusers") if FLAGS.peer and importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--peer={FLAGS.peer} needs {', '.join(missing)}; pip install -e .[parity]")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def main(argv):
    try:
        if argv[1:]:
            raise UserError(f"unexpected argument {argv[1]!r}; options are --name=value")
        print(f"wrote {measure()}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    app.run(main)
