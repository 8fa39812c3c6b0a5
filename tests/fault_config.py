"""The run of the fault campaign: the smallest that has all parts, with many saves."""
from tests.runs import config as recipe

STEPS, SAVE_EVERY, KEEP = 30, 5, 3


def get_config(variant: str = ""):
    """variant: "" for the embedded digits, "folder" for files that are read again in every epoch (data.folder.path)."""
    config = recipe("digits", "smoke")
    config.net.name = "dit"
    config.train.update(steps=STEPS, save_every=SAVE_EVERY, keep=KEEP, log_every=1)
    config.sampler.update(steps=1, guidance=1.0)
    if variant == "folder":
        config.data.update(name="folder", folder=dict(path="", image_size=8, channels=1, held_out=0.0, cache=False))
    return config
