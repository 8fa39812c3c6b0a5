"""Stable Diffusion 1's U-Net at its full size with random weights, against diffusers.

Run by hand, for it takes 3.4 GB on disk and 6 GB of memory:

    python -m tests.parity.full_size
"""
import resource
import tempfile
import time

import diffusers
import jax
import numpy as np
import torch

from ldm_jax.published import load_net


def main():
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, in_channels=4, out_channels=4)
    for name, p in unet.named_parameters():
        if p.ndim == 1:
            p.data = 0.1 * torch.randn(p.shape) + float("norm" in name and name.endswith("weight"))
    rng = np.random.default_rng(0)
    x, context = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 64, 64, 4), (1, 77, 768)))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        want = unet(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor([500]), torch.tensor(context)).sample.numpy().transpose(0, 2, 3, 1)
        count = sum(p.numel() for p in unet.parameters())
        unet.save_pretrained(folder)
        del unet
        start = time.perf_counter()
        net, params = load_net(folder)
        loaded = time.perf_counter() - start
    ours = sum(a.size for a in jax.tree.leaves(params))
    got = np.asarray(jax.jit(net.apply)(params, x, np.array([501 / 1000], np.float32), {"context": context}))
    error = np.abs(got - want).max() / np.abs(want).max()
    print(f"{ours:,} parameters (theirs {count:,}), read in {loaded:.1f} s; largest difference {error:.1e} of the largest value; "
          f"peak memory of both together {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")
    assert ours == count and error < 1e-4


if __name__ == "__main__":
    main()
