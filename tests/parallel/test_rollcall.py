"""Processes that watch each other, without JAX: who is named, how soon, and with which exit code."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ldm_jax.parallel.processes import stated
from ldm_jax.types import UserError
from tests.conftest import ROOT

PROCESS = """
import sys, time
from ldm_jax.parallel.rollcall import RollCall
index, count, folder, doing = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:]
call = RollCall(index, count, timeout=3.0, stuck=3.0)
if index == 0:
    open(folder + "/port.part", "w").write(str(call.listen()))
    import os
    os.rename(folder + "/port.part", folder + "/port")
else:
    while True:
        try:
            port = int(open(folder + "/port").read())
            break
        except OSError:
            time.sleep(0.02)
    call.report_to("127.0.0.1", port)
for step in range(10000):
    call.mark(step)
    if step == 30 and doing:
        if doing[0] == "leaves": call.leave(); sys.exit(0)
        if doing[0] == "mistake": call.leave("no such file", 2); sys.exit(2)
        if doing[0] == "hangs": time.sleep(1000)
    time.sleep(0.02)
"""


class Processes:
    def __init__(self, folder, count, **doing):
        lines = [[str(i), str(count), str(folder), *filter(None, [doing.get(f"p{i}")])] for i in range(count)]
        self.all = [subprocess.Popen([sys.executable, "-c", PROCESS, *line], cwd=ROOT, stderr=subprocess.PIPE, text=True) for line in lines]
        while not os.path.exists(folder / "port"):
            time.sleep(0.02)
        time.sleep(1.0)

    def ends(self, but):
        """(exit codes, last lines) of all processes but one, which is then killed."""
        rest = [p for i, p in enumerate(self.all) if i != but]
        out = [(p.communicate(timeout=20)[1].strip().splitlines() or [""])[-1] for p in rest]
        self.all[but].kill()
        self.all[but].communicate()
        return [p.returncode for p in rest], out


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("signum, says, within", [(signal.SIGKILL, "died", 5.0), (signal.SIGSTOP, "silent for 3 s", 9.0)])
def test_a_process_that_dies_or_stops_ends_the_others(tmp_path, victim, signum, says, within):
    run = Processes(tmp_path, 3)
    run.all[victim].send_signal(signum)
    since = time.monotonic()
    codes, lines = run.ends(victim)
    assert time.monotonic() - since < within
    assert codes == [75, 75]
    assert all(re.match(rf"error: process {victim} \(host .*, pid {run.all[victim].pid}\)", line) and says in line for line in lines), lines


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_process_that_stays_behind_is_named(tmp_path, victim):
    run = Processes(tmp_path, 3, **{f"p{victim}": "hangs"})
    others, lines = run.ends(victim)
    assert others == [75, 75]
    assert all(f"process {victim} " in line and "has not moved on from step 30" in line for line in lines), lines


def test_a_mistake_ends_all_as_a_mistake_and_a_process_that_leaves_is_not_missed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    codes, lines = Processes(tmp_path / "a", 2, p1="mistake").ends(1)
    assert codes == [2] and "process 1" in lines[0] and "stopped: no such file" in lines[0]
    run = Processes(tmp_path / "b", 3, p1="leaves")
    time.sleep(5)
    assert [p.poll() for p in run.all] == [None, 0, None]
    for p in run.all:
        p.kill()
        p.communicate()


def test_what_the_environment_states():
    full = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}
    assert stated({}) is None and stated({**full, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    assert stated(full) == {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 2}
    slurm = {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "a,b"}
    assert stated(slurm) == {} and stated({**slurm, "SLURM_NTASKS": "1"}) is None
    assert stated({"TPU_WORKER_HOSTNAMES": "a,b"}) == {} and stated({"TPU_WORKER_HOSTNAMES": "a"}) is None
    for change, says in (({"JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID is not set"), ({"JAX_PROCESS_ID": "4"}, "must be in"),
                         ({"JAX_NUM_PROCESSES": "four"}, "must be in"), ({"JAX_COORDINATOR_ADDRESS": "host"}, "host:port")):
        with pytest.raises(UserError, match=says):
            stated({**full, **change})
