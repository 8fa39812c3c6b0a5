"""The command line of `ldm_jax.main`: its flags, which of them a mode has a use for, and errors in a line."""
import os
import sys
import traceback

from absl import flags
from ml_collections import config_flags

from ldm_jax.types import UserError

config_flags.DEFINE_config_file("config", None, "The recipe, such as configs/digits.py or configs/ldm_cifar.py:smoke.", lock_config=True)
flags.DEFINE_string("workdir", None, "Where the run lives: checkpoints, metrics, pictures.")
flags.DEFINE_enum("mode", "train", ["train", "sample", "eval", "export", "ema"], "What to do.")
flags.DEFINE_integer("num", None, "sample: how many pictures.", lower_bound=1)
flags.DEFINE_list("class_id", None, "sample: class ids, repeated to as many as --num; all classes in turn if not given.")
flags.DEFINE_multi_string("prompt", None, "sample: a text; give the flag again for another picture, or --num pictures of one.")
flags.DEFINE_string("negative_prompt", None, "sample: what guidance steers away from.")
flags.DEFINE_string("image", None, "sample: a picture's file to start from, to fill in, or to enlarge.")
flags.DEFINE_string("mask", None, "sample: a picture's file, white where --image is made anew.")
flags.DEFINE_float("strength", None, "sample: the part of the steps that --image goes through.", lower_bound=0.0, upper_bound=1.0)
flags.DEFINE_string("weights", None, "sample, export: a published checkpoint, in place of the run in the workdir.")
flags.DEFINE_string("original", None, "sample, export: what --weights holds where it is one file, such as sd1 or adm_256.")
flags.DEFINE_string("tokenizer", None, "sample, export: the directory of the tokeniser that --original needs.")
flags.DEFINE_string("vae", None, "sample, export: the directory of the first stage that --original needs.")
flags.DEFINE_string("lora", None, "sample, export: a file of LoRA adapters, merged into the weights.")
flags.DEFINE_float("lora_scale", 1.0, "sample, export: how strongly the adapters act.")
flags.DEFINE_bool("merged", False, "export: a run of LoRA adapters as a whole model, not as the adapters alone.")
flags.DEFINE_string("out", None, "export: the new directory, WORKDIR/exported if not given.")
flags.DEFINE_list("std", None, "ema: relative lengths of averages to put together, such as 0.08 or 0.05,0.12.")
flags.DEFINE_integer("step", None, "sample, eval, export: of which checkpoint, ema: of which snapshot; the newest if not given.",
                     lower_bound=1)
flags.DEFINE_integer("seed", 0, "sample: the seed.", lower_bound=0)
flags.DEFINE_bool("dry-run", False, "train: print the config, the mesh and what an update would take on each device, and start nothing.")
flags.DEFINE_integer("devices", None, "--dry-run: as if this machine had so many devices.", lower_bound=1)
flags.DEFINE_float("device_memory", None, "--dry-run: as if each device had so many GB.", lower_bound=0.0)
flags.DEFINE_float("process_timeout", 60.0, "Of several processes, one that gives no sign of life for so many seconds is lost, and "
                   "one that stays behind the others for ten times as many.", lower_bound=3.0)
flags.DEFINE_bool("debug", False, "Show the traceback of an error.")
FLAGS = flags.FLAGS
MODES = {**dict.fromkeys(("num", "class_id", "prompt", "negative_prompt", "image", "mask", "strength", "seed"), ("sample",)),
         **dict.fromkeys(("weights", "original", "tokenizer", "vae", "lora", "lora_scale"), ("sample", "export")),
         **dict.fromkeys(("out", "merged"), ("export",)), "std": ("ema",), "step": ("sample", "eval", "export", "ema"),
         **dict.fromkeys(("dry-run", "devices", "device_memory"), ("train",))}  # the modes of a flag that not all have


def parse(argv):
    """absl's parser, with every error of flags, config files and overrides in one line."""
    try:
        rest = FLAGS(argv)
        FLAGS.config is None or FLAGS.config.to_dict()  # a config file that could not be loaded says so only when it is used
        return rest
    except (flags.Error, AttributeError, KeyError, IndexError, TypeError, ValueError, OSError) as error:
        said = str(error).strip()
        if said[:1] in ("'", '"') and said[:1] == said[-1:]:  # a KeyError's text is the representation of one
            said = said[1:-1]
        lines = said.replace("\\n", " ").replace("\\'", "'").splitlines()
        if isinstance(error, OSError) or any("Traceback" in line for line in lines):
            fail(f"--config: {lines[-1].strip()}")
        fail(" ".join(lines) + "; the config file lists its keys, --config.a.b=value sets one")


def fail(message: str, code: int = 2):
    if "--debug" in sys.argv:
        traceback.print_exc()
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)  # not sys.exit: threads of a failed save would have the last word


def class_ids(texts):
    """The ids of --class_id, None where it is not given."""
    try:
        return texts and [int(c) for c in texts]
    except ValueError:
        raise UserError(f"--class_id={','.join(texts)} is not a list of class ids such as 3 or 0,1,2") from None


def lengths(texts):
    """The numbers of --std."""
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise UserError(f"--std={','.join(texts)} is not a list of lengths such as 0.08 or 0.05,0.12") from None


def check(argv) -> None:
    """End with an error for arguments that do not go together."""
    if argv[1:]:
        fail(f"unexpected argument {argv[1]!r}; settings are given as --config.a.b=value")
    planned = FLAGS["dry-run"].value
    if (FLAGS["devices"].present or FLAGS["device_memory"].present) and not planned:
        fail("--devices and --device_memory are for --dry-run")
    if not (FLAGS.workdir or planned) or (FLAGS.mode == "train" and FLAGS.config is None):
        fail("give " + ("--config=configs/NAME.py and --workdir=DIR" if FLAGS.mode == "train" else "--workdir=DIR"))
    for name, modes in MODES.items():
        if FLAGS[name].present and FLAGS.mode not in modes:
            instead = "; training starts from a checkpoint with --config.init_from=DIR" if name == "weights" else ""
            fail(f"--{name} is for --mode={' and --mode='.join(modes)}, not for {FLAGS.mode}{instead}")
    if FLAGS.mode == "ema" and not FLAGS.std:
        fail("--mode=ema puts averages together; give their relative lengths, such as --std=0.08")
