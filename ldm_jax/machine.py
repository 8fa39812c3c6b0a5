"""What the compiler and the memory allocator of this machine are told: nothing where their own ways are the best known.

Measured effects are in the README's design notes; `python -m ldm_jax.benchmark` measures them again.
"""
import ctypes
import functools
import os
import tempfile
from typing import Any, Dict

import jax

_ON_CPU = {
    # Keep the barriers of `models.layers.written` until code is made: by default they go before operations are fused, when they matter.
    "xla_disable_hlo_passes": "cse_barrier_expander",
    # Matrix products and convolutions by Eigen: YNNPACK's, with what it fuses to them, are slower.
    "xla_cpu_experimental_ynn_fusion_type": "",
}
_MMAP_MAX, _TRIM_THRESHOLD, _ARENA_MAX = -4, -1, -8  # parameters of mallopt


def compiler_options() -> Dict[str, Any]:
    """`compiler_options` of jax.jit for networks on the default backend: on CPU those of _ON_CPU that this version of XLA knows."""
    return _known() if jax.default_backend() == "cpu" else {}


@functools.lru_cache(maxsize=None)
def _known() -> Dict[str, Any]:
    known = {}
    for name, value in _ON_CPU.items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value})()
            known[name] = value
        except jax.errors.JaxRuntimeError:  # "No such compile option"
            pass
    return known


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees, for its next use of as much; of use on CPU, with the GNU C library alone.

    XLA asks for a program's temporary memory anew in every call. By default that much comes as fresh pages from the kernel, which must
    clear each before its first use, and goes back to it after the call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, -1)  # never
    mallopt(_ARENA_MAX, 1)  # other threads' arenas hold 64 MiB at most; what is larger they have mapped anew, whatever else is said


def use_compilation_cache() -> None:
    """Keep compiled programs between processes: where JAX was told to (JAX_COMPILATION_CACHE_DIR), otherwise in the user's cache
    directory (XDG_CACHE_HOME, or ~/.cache), if that can be written.

    All programs are kept, unless JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS says otherwise: by default JAX passes over those of less
    than a second, of which every start compiles dozens. JAX files a program under its versions, its flags, the options it is compiled
    with and the kind of device; another installation finds none of them.
    """
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        directory = os.path.join(home, "ldm_jax", "compiled")
        try:
            os.makedirs(directory, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError:
            return
        jax.config.update("jax_compilation_cache_dir", directory)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
