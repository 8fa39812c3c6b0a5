"""How the processes of one run find each other: JAX's own multi-controller runtime, joined as the environment says.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID    host:port of process 0, how many there are, which one this is
    Slurm (srun with several tasks), a TPU pod, Open MPI          found by JAX; a TPU pod's scripts set LDM_JAX_DISTRIBUTED=1
"""
import os
from typing import Any, Callable, Mapping, Optional

import jax
import numpy as np

from ldm_jax.parallel.rollcall import RollCall
from ldm_jax.types import UserError

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def stated(environ: Mapping[str, str]) -> Optional[dict]:
    """The arguments of `jax.distributed.initialize` that the environment states; {} where JAX finds them by itself, None for one
    process.

    Raises:
      UserError: for some of the variables without the others, and for numbers that are none or do not fit.
    """
    given = {name: environ[name] for name in VARIABLES if environ.get(name)}
    if set(given) >= {"JAX_NUM_PROCESSES"} or set(given) >= {"JAX_PROCESS_ID"}:
        missing = [name for name in VARIABLES if name not in given]
        if missing:
            raise UserError(f"{missing[0]} is not set, and {', '.join(given)} is; several processes need {', '.join(VARIABLES)}, one none")
        try:
            count, index = int(given["JAX_NUM_PROCESSES"]), int(given["JAX_PROCESS_ID"])
        except ValueError:
            count, index = 0, -1
        if not 0 <= index < count or ":" not in given["JAX_COORDINATOR_ADDRESS"]:
            raise UserError(f"{given} do not name a process; JAX_PROCESS_ID must be in 0..JAX_NUM_PROCESSES - 1, and "
                            f"JAX_COORDINATOR_ADDRESS host:port")
        return dict(coordinator_address=given["JAX_COORDINATOR_ADDRESS"], num_processes=count, process_id=index) if count > 1 else None
    slurm = int(environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ
    mpi = int(environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    tpu = "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    return {} if slurm or mpi or tpu or environ.get("LDM_JAX_DISTRIBUTED") == "1" else None


def join(environ: Mapping[str, str] = os.environ, *, timeout: float = 60.0) -> Optional[RollCall]:
    """Join the run's other processes, if the environment speaks of any; to be called before anything else is asked of JAX.

    timeout: after how many seconds without a sign of life a process counts as lost, see `rollcall.RollCall`.

    Raises:
      UserError: see `stated`, and when the processes do not find each other within five minutes.
    """
    arguments = stated(environ)
    if arguments is None:
        return None
    # JAX's preemption service would take SIGTERM from the training loop; its heartbeat names nobody, so that ours comes first
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=int(max(100, 4 * timeout)), shutdown_timeout_seconds=60)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes of this run did not find each other ({str(error).splitlines()[0]}); "
                        f"check {', '.join(VARIABLES)} and that the coordinator's port is open") from error
    if jax.process_count() == 1:
        return None
    from jax._src.distributed import global_state  # there is no public way to ask for the address that JAX has found
    from jax.experimental.multihost_utils import broadcast_one_to_all
    host = global_state.coordinator_address.rsplit(":", 1)[0].strip("[]")
    index, count = jax.process_index(), jax.process_count()
    call = RollCall(index, count, timeout=timeout)
    port = int(broadcast_one_to_all(np.int32(call.listen() if index == 0 else 0)))
    if index:
        call.report_to(host, port)
    return call


def the_first_before(make: Callable[[], Any]) -> Any:
    """make() in every process, in the first one before the others: what it leaves on a disk that all share need not be made again."""
    first = jax.process_index() == 0
    made = make() if first else None
    wait_for_all("made by the first process")
    return made if first else make()


def wait_for_all(name: str) -> None:
    """Return when every process has come here; at once where there is one."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices
        sync_global_devices(name)
