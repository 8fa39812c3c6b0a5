"""The scripts that start a run, with a stub in the place of training: what they pass on, and what they do with each exit code."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

LAUNCH = os.path.join(ROOT, "launch")
SCRIPTS = sorted(name for name in os.listdir(LAUNCH) if name.endswith((".sh", ".sbatch")))

# Stands for the venv's python: answers pip, and runs STUB for the training command.
PYTHON = """#!/bin/sh
case "$*" in "-m pip"*) exit 0 ;; "-m ldm_jax.main"*) shift 2; exec {python} {stub} "$@" ;; esac
exec {python} "$@"
"""
# Says what it was given, then waits for --seconds or SIGTERM, and ends with the code of --codes that its number and start name.
STUB = """
import json, os, signal, sys, time
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
number = int(os.environ.get("JAX_PROCESS_ID") or os.environ.get("SLURM_PROCID") or 0)
def stop(signum, frame):
    os.write(1, b"saved\\n")
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, stop)
start = 0
if "count" in flags:
    start = os.path.exists(flags["count"]) and os.path.getsize(flags["count"]) or 0
    open(flags["count"], "a").write("x")
said = json.dumps({"argv": sys.argv[1:], **{k: v for k, v in os.environ.items() if k.startswith(("JAX_", "LDM_"))}})
os.write(1, said.encode() + b"\\n")  # in one piece
starts = flags.get("codes", "0").split(";")
codes = starts[min(start, len(starts) - 1)].split(",")
code = int(codes[number % len(codes)])
time.sleep(float(flags.get("seconds", 0.2)) if code != 75 else 0.6)
if code > 128:
    os.kill(os.getpid(), code - 128)
sys.exit(code)
"""
AWKWARD = ["--a=it's", "--b=two words", '--c="$HOME" `id` \\n', "--d=*;&|"]  # arguments that a careless script would take apart


@pytest.fixture
def venv(tmp_path):
    """The environment variables with which the scripts run the stub."""
    bin = tmp_path / "venv" / "bin"
    bin.mkdir(parents=True)
    (tmp_path / "stub.py").write_text(STUB)
    (bin / "python").write_text(PYTHON.format(python=shlex.quote(sys.executable), stub=shlex.quote(str(tmp_path / "stub.py"))))
    (bin / "python").chmod(0o755)
    for extras in ("base", "tpu"):
        (bin.parent / f".installed-{extras}").touch()
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "SLURM_", "XLA_"))}
    return {**clean, "VENV": str(bin.parent), "EXTRAS": "", "PAUSE": "0"}


def start(env, *command):
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process):
    out, _ = process.communicate(timeout=60)
    return process.returncode, out


def run(env, *command):
    return finish(start(env, *command))


def given(line):
    """What a stub's line says, without the number before it."""
    return json.loads(line[line.index("{"):])


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name):
    tool = os.path.join(os.path.dirname(sys.executable), "shellcheck")
    tool = tool if os.path.exists(tool) else shutil.which("shellcheck")
    assert tool, "shellcheck is one of the test extras"
    result = subprocess.run([tool, "--external-sources", "--shell=sh", "--source-path=SCRIPTDIR/..", os.path.join(LAUNCH, name)],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_processes_get_their_numbers_devices_and_arguments(venv):
    code, out = run({**venv, "DEVICES": "2"}, "sh", "launch/processes.sh", "2", *AWKWARD)
    lines = {int(line[1]): given(line) for line in out.splitlines() if "argv" in line}
    assert code == 0 and sorted(lines) == [0, 1]
    address = lines[0]["JAX_COORDINATOR_ADDRESS"]
    for number, said in lines.items():
        assert said["argv"] == AWKWARD and said["JAX_COORDINATOR_ADDRESS"] == address
        assert said["JAX_NUM_PROCESSES"] == "2" and said["JAX_PROCESS_ID"] == str(number)
        assert said["JAX_NUM_CPU_DEVICES"] == "2" and said["JAX_LOCAL_DEVICE_IDS"] == ["0,1", "2,3"][number]
    host, port = address.split(":")
    assert host == "localhost" and 1024 < int(port) < 65536


@pytest.mark.parametrize("codes, expected", [("0,0", 0), ("0,2", 2), ("75,137", 137), ("143,75", 143), ("75,75", 75), ("143,1", 1)])
def test_the_code_of_processes_is_that_of_the_one_that_failed(venv, codes, expected):
    code, out = run(venv, "sh", "launch/processes.sh", "2", f"--codes={codes}")
    assert code == expected
    assert ("[launch] process" in out) == (expected != 0), out


def test_a_process_that_does_not_end_after_another_failed_is_ended(venv):
    begun = time.monotonic()
    code, out = run({**venv, "GRACE": "0.5"}, sys.executable, "launch/processes.py", "2", sys.executable, "-c",
                    "import os, sys, time\nif os.environ['JAX_PROCESS_ID'] == '1': sys.exit(3)\ntime.sleep(50)")
    assert code == 3 and time.monotonic() - begun < 20
    assert "process 1 ended with code 3" in out and "SIGTERM to process 0" in out


@pytest.mark.parametrize("command", [["launch/processes.sh", "2"], ["launch/restart.sh", "sh", "launch/processes.sh", "2"]])
def test_sigterm_reaches_every_process_once(venv, command):
    process = start(venv, "sh", *command, "--seconds=40")
    said = [next(line for line in process.stdout if "argv" in line) for _ in range(2)]
    process.send_signal(signal.SIGTERM)
    code, out = finish(process)
    assert len(said) == 2 and code == 143
    assert out.count("saved") == 2 and "[0] saved" in out and "[1] saved" in out


@pytest.mark.parametrize("codes, restarts, expected, starts", [
    ("75;137;0", 5, 0, 3),  # goes on after what a new start may cure
    ("2", 5, 2, 1), ("1", 5, 1, 1), ("143", 5, 143, 1),  # not after a mistake, an error, or a stop
    ("75", 2, 75, 3)])  # and not for ever
def test_restart(venv, tmp_path, codes, restarts, expected, starts):
    count = tmp_path / "count"
    code, out = run({**venv, "RESTARTS": str(restarts)}, "sh", "launch/restart.sh", os.path.join(venv["VENV"], "bin", "python"),
                    "-m", "ldm_jax.main", f"--codes={codes}", f"--count={count}", "--seconds=0")
    assert code == expected and len(count.read_text()) == starts, out


# srun with two tasks and the greatest code, scontrol that notes what it was asked, squeue with the job's state.
SLURM = {"srun": """#!/bin/sh
while [ "${1#--}" != "$1" ]; do shift; done
SLURM_PROCID=0 "$@" & first=$!
SLURM_PROCID=1 "$@" & second=$!
wait "$first"; a=$?
wait "$second"; b=$?
[ "$a" -gt "$b" ] && exit "$a"
exit "$b"
""", "scontrol": '#!/bin/sh\necho "$@" >>"$NOTE"\nkill -TERM $PPID\n', "squeue": '#!/bin/sh\necho "$STATE"\n'}


@pytest.mark.parametrize("codes, count, state, expected, requeued", [
    ("0,0", 0, "RUNNING", 0, False), ("2,75", 0, "RUNNING", 2, False), ("1,75", 0, "RUNNING", 1, False),
    ("143,143", 90, "RUNNING", 143, True),  # asked to stop: always again
    ("143,143", 0, "COMPLETING", 143, False),  # by scancel: not again
    ("75,137", 0, "RUNNING", 137, True), ("75,75", 0, "RUNNING", 75, True), ("75,137", 20, "RUNNING", 137, False)])
def test_slurm_puts_back_what_a_new_start_may_cure(venv, tmp_path, codes, count, state, expected, requeued):
    bin = tmp_path / "slurm"
    bin.mkdir()
    for name, text in SLURM.items():
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    env = {**venv, "PATH": f"{bin}:{venv['PATH']}", "NOTE": str(tmp_path / "note"), "STATE": state, "SLURM_JOB_ID": "7",
           "SLURM_RESTART_COUNT": str(count), "SLURM_SUBMIT_DIR": ROOT}
    if requeued:  # the real one ends the shell; here the sleep after it would be waited for
        (bin / "sleep").write_text("#!/bin/sh\n")
        (bin / "sleep").chmod(0o755)
    code, out = run(env, "sh", "launch/slurm.sbatch", f"--codes={codes}", *AWKWARD)
    assert code == expected, out
    assert [given(line)["argv"][1:] for line in out.splitlines() if "argv" in line] == [AWKWARD, AWKWARD]
    assert (tmp_path / "note").exists() == requeued
    assert not requeued or (tmp_path / "note").read_text().split() == ["requeue", "7"]


# gcloud with two hosts, each a home directory of this machine; the command goes through a shell, as it does over ssh.
GCLOUD = """#!/bin/sh
echo "$@" >>"$HOSTS/calls"
for argument in "$@"; do
    case "$argument" in
        --command=*) command="${argument#--command=}" ;;
        --worker=all) workers="0 1" ;;
        --worker=*) workers="${argument#--worker=}" ;;
        *.tgz) file="$argument" ;;
    esac
done
code=0
for worker in $workers; do
    case "$4" in
        scp) cp "$file" "$HOSTS/$worker/" ;;
        ssh) (cd "$HOSTS/$worker" && HOME="$PWD" TPU_WORKER_ID=$worker sh -c "$command") || code=$? ;;
    esac
done
exit $code
"""


def test_tpu_pod_starts_once_shows_and_stops(venv, tmp_path):
    hosts = tmp_path / "hosts"
    for worker in "01":
        (hosts / worker).mkdir(parents=True)
    (hosts / "gcloud").write_text(GCLOUD)
    (hosts / "gcloud").chmod(0o755)
    env = {**venv, "PATH": f"{hosts}:{venv['PATH']}", "HOSTS": str(hosts), "ZONE": "z", "DIR": "my run", "EXTRAS": "tpu"}
    pod = lambda what, *args: run(env, "sh", "launch/tpu_pod.sh", what, "pod", *args)

    for extras in ("base", "tpu"):  # newer than the setup.cfg that is unpacked, so that nothing is installed
        os.utime(tmp_path / "venv" / f".installed-{extras}", (time.time() + 100,) * 2)
    code, out = pod("start", "--seconds=60", *AWKWARD)
    try:
        assert code == 0 and out.count("started, process") == 2, out
        for worker in "01":
            log = (hosts / worker / "my run" / "log").read_text()
            assert given(log)["argv"] == ["--seconds=60", *AWKWARD] and given(log)["LDM_JAX_DISTRIBUTED"] == "1"
            assert (hosts / worker / "my run" / "ldm_jax" / "main.py").exists()
        assert pod("status")[1].count(": runs") == 2
        code, out = pod("start", "--seconds=60")
        assert code == 2 and "a run is under way" in out
        code, out = pod("logs", "-n", "1")
        assert code == 0 and out.count("argv") == 1
    finally:
        code, out = pod("stop")
    assert code == 0 and out.count("ended with code 143") == 2, out
    assert "saved" in (hosts / "0" / "my run" / "log").read_text()
    calls = (hosts / "calls").read_text()
    assert "compute tpus tpu-vm scp" in calls and "--zone=z" in calls
