"""Train, sample or evaluate:

    python -m ldm_jax.main --config=configs/digits.py --workdir=runs/digits [--mode=train|sample|eval] [--config.a.b=value]

Training goes on from the newest checkpoint in the workdir when there is one. Sampling and evaluation take what the workdir
holds; with --config they take its `sampler` and `eval` sections instead.
"""
import os
import sys
import traceback

from absl import app, flags, logging
from ml_collections import config_flags

from ldm_jax.types import UserError

config_flags.DEFINE_config_file("config", None, "The recipe, such as configs/digits.py or configs/ldm_cifar.py:smoke.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, metrics, pictures.")
flags.DEFINE_enum("mode", "train", ["train", "sample", "eval"], "What to do.")
flags.DEFINE_integer("num", None, "sample: how many pictures.", lower_bound=1)
flags.DEFINE_list("class_id", None, "sample: class ids, repeated to as many as --num; all classes in turn if not given.")
flags.DEFINE_integer("seed", 0, "sample: the seed.", lower_bound=0)
flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
FLAGS = flags.FLAGS


def parse(argv):
    """absl's parser, with every error of flags, config files and overrides in one line."""
    try:
        rest = FLAGS(argv)
        FLAGS.config is None or FLAGS.config.to_dict()  # a config file that could not be loaded says so only when it is used
        return rest
    except (flags.Error, AttributeError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        lines = str(error).replace("\\n", " ").replace("\\'", "'").strip("'\" ").splitlines()
        if isinstance(error, OSError) or any("Traceback" in line for line in lines):
            fail(f"--config: {lines[-1].strip()}")
        fail(" ".join(lines) + "; the config file lists its keys, --config.a.b=value sets one")


def fail(message: str, code: int = 2):
    if "--debug" in sys.argv:
        traceback.print_exc()
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)  # not sys.exit: threads of a failed save would have the last word


def main(argv):
    if argv[1:]:
        fail(f"unexpected argument {argv[1]!r}; settings are given as --config.a.b=value")
    if not FLAGS.workdir or (FLAGS.mode == "train" and FLAGS.config is None):
        fail("give " + ("--config=configs/NAME.py and --workdir=DIR" if FLAGS.mode == "train" else "--workdir=DIR"))
    if not FLAGS.debug:
        logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback for each error that it also raises
    import jax
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/ldm_jax/compiled"))
    from ldm_jax import run
    from ldm_jax.training.loop import Interrupted
    config = None if FLAGS.config is None else FLAGS.config.to_dict()
    try:
        if FLAGS.mode == "train":
            run.train(config, FLAGS.workdir)
        elif FLAGS.mode == "sample":
            try:
                classes = FLAGS.class_id and [int(c) for c in FLAGS.class_id]
            except ValueError:
                raise UserError(f"--class_id={','.join(FLAGS.class_id)} is not a list of class ids such as 3 or 0,1,2") from None
            run.sample(FLAGS.workdir, num=FLAGS.num, classes=classes, seed=FLAGS.seed, sampler=config and config.get("sampler"))
        else:
            run.evaluate(FLAGS.workdir, config)
    except UserError as error:
        fail(str(error))
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + stop.signum)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from the last checkpoint", 130)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
