"""Train, sample, evaluate, export, or put an average of any length together:

    python -m ldm_jax.main --config=configs/digits.py --workdir=runs/digits [--mode=train|sample|eval|export|ema] [--config.a.b=value]

Training goes on from the newest checkpoint in the workdir when there is one. Sampling, evaluation and export take what the workdir
holds; with --config they take its `sampler` and `eval` sections instead. With --weights a published checkpoint is sampled:

    python -m ldm_jax.main --config=configs/sd15.py --mode=sample --workdir=runs/sd15 --weights=DIR --prompt="a red fox in the snow"
"""
import os
import sys
import traceback

from absl import app, logging

from ldm_jax.command_line import FLAGS, check, class_ids, fail, lengths, parse
from ldm_jax.types import UserError


def act(config, marked) -> None:
    """What --mode asks for. marked: {"mark": ...} where several processes watch each other, see `parallel.rollcall`."""
    from ldm_jax import run
    if FLAGS["dry-run"].value:
        from ldm_jax import planning
        return print(planning.plan(config, memory_gb=FLAGS.device_memory), flush=True)
    if FLAGS.mode == "train":
        return run.train(config, FLAGS.workdir, **marked)
    if FLAGS.mode == "eval":
        return run.evaluate(FLAGS.workdir, config, step=FLAGS.step)
    if FLAGS.mode == "ema":
        return run.average(FLAGS.workdir, lengths(FLAGS.std), step=FLAGS.step)
    pipeline = run.load(FLAGS.workdir, config, weights=FLAGS.weights, original=FLAGS.original, tokenizer=FLAGS.tokenizer, vae=FLAGS.vae,
                        lora=FLAGS.lora, lora_scale=FLAGS.lora_scale, step=FLAGS.step)
    if FLAGS.mode == "export":
        return run.export(pipeline, FLAGS.out or os.path.join(FLAGS.workdir, "exported"), merged=FLAGS.merged)
    run.sample(pipeline, FLAGS.workdir, num=FLAGS.num, classes=class_ids(FLAGS.class_id), seed=FLAGS.seed, prompts=FLAGS.prompt,
               negative=FLAGS.negative_prompt, image=FLAGS.image, mask=FLAGS.mask, strength=FLAGS.strength, **marked)


def end(call, reason=None, code=0):
    """Leave the other processes of the run, and exit."""
    if call:
        call.leave(reason, code)
    if reason:
        fail(reason, code)
    sys.exit(code)


def main(argv):
    check(argv)
    if not FLAGS.debug:
        logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback for each error that it also raises
    import jax
    if FLAGS.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    from ldm_jax import machine
    machine.use_compilation_cache()
    machine.keep_freed_memory()
    from ldm_jax.parallel import processes
    from ldm_jax.training.loop import Interrupted
    call = None
    try:
        call = processes.join(timeout=FLAGS.process_timeout)
        act(None if FLAGS.config is None else FLAGS.config.to_dict(), {"mark": call.mark} if call else {})
    except UserError as error:
        end(call, str(error), 2)
    except Interrupted as stop:
        print(f"{stop}; the same command goes on from there", file=sys.stderr)
        end(call, code=128 + stop.signum)
    except KeyboardInterrupt:
        end(call, "interrupted; the same command goes on from the last checkpoint", 130)
    except Exception as error:
        if call is None:
            raise
        call.wait_for_verdict()  # most failures of one process are another's end
        traceback.print_exc()
        end(call, f"{type(error).__name__}: {error}", 1)
    end(call)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
