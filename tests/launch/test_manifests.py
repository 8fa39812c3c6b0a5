"""The Kubernetes manifests fit the API's schema and start the command line as it is; the image can hold what they start."""
import configparser
import fnmatch
import json
import os
import re
import string

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from tests.conftest import ROOT

MANIFESTS = sorted(name for name in os.listdir(os.path.join(ROOT, "launch")) if name.endswith(".yaml"))


def text(*path):
    with open(os.path.join(ROOT, *path)) as f:
        return f.read()


def filled(name):
    """The manifest with the values that its header's command exports."""
    source = text("launch", name)
    exported = re.search(r"^#   export (.*?)\n#   envsubst", source, re.M | re.S)[1]
    return yaml.safe_load(string.Template(source).substitute(dict(re.findall(r"(\w+)=(\S+)", exported))))


def job(manifest):
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def container(manifest):
    (only,) = job(manifest)["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_is_in_the_schema(name):
    manifest = filled(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    # The models check types and required fields, and leave out what they do not know.
    assert JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == json.loads(json.dumps(manifest))
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,40}[a-z0-9])?", manifest["metadata"]["name"])


def outcome(manifest, code=None, condition=None):
    """What the JobSet does when a pod ends with `code` or for `condition`, by the rules of Jobs and of JobSets: the first that fits."""
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job(manifest)["podFailurePolicy"]["rules"]):
        exits, conditions = rule.get("onExitCodes"), [c["type"] for c in rule.get("onPodConditions", ())]
        assert rule["action"] == "FailJob" and (exits is None or exits["operator"] == "In" and exits["values"] == sorted(exits["values"]))
        if exits and code in exits["values"] and exits["containerName"] == container(manifest)["name"]:
            reason = "PodFailurePolicy"
            message = f"Container train for pod default/a-0 failed with exit code {code} matching FailJob rule at index {index}"
            break
        if condition in conditions:
            reason, message = "PodFailurePolicy", f"Pod default/a-0 has condition {condition} matching FailJob rule at index {index}"
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule.get("onJobFailureReasons", [reason]) and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_mistake_ends_it_a_stop_restarts_it_and_failures_are_counted(name):
    manifest = filled(name)
    assert outcome(manifest, code=2) == "FailJobSet"
    assert outcome(manifest, code=143) == outcome(manifest, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    assert all(outcome(manifest, code=code) == "RestartJobSet" for code in (1, 75, 134, 137))
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    spec = job(manifest)
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"  # all or none, and by the JobSet alone
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] > 1


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_arguments_are_flags_and_name_a_recipe(name):
    from ldm_jax.command_line import FLAGS
    flags = dict(argument[2:].split("=", 1) for argument in container(filled(name))["args"])
    assert set(flags) >= {"config", "workdir"} and all(flag in FLAGS for flag in flags)
    assert os.path.exists(os.path.join(ROOT, flags["config"].split(":")[0]))
    assert "command" not in container(filled(name))  # the image's


def test_gpu_pods_find_each_other():
    manifest = filled("gke_gpu.yaml")
    env = {variable["name"]: variable for variable in container(manifest)["env"]}
    (replicated,) = manifest["spec"]["replicatedJobs"]
    name = manifest["metadata"]["name"]
    # pod 0 of job 0, in the JobSet's headless service, which is called as the JobSet is
    assert env["JAX_COORDINATOR_ADDRESS"]["value"].split(":")[0] == f"{name}-{replicated['name']}-0-0.{name}"
    assert manifest["spec"]["network"]["enableDNSHostnames"] and replicated["replicas"] == 1
    assert env["JAX_NUM_PROCESSES"]["value"] == str(job(manifest)["completions"])
    field = env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_a_tpu_slice_has_as_many_chips_as_its_pods():
    manifest = filled("gke.yaml")
    topology = job(manifest)["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = int(container(manifest)["resources"]["limits"]["google.com/tpu"])
    x, y = map(int, topology.split("x"))
    assert x * y == chips * job(manifest)["completions"]
    assert "env" not in container(manifest)  # jax finds a slice's hosts by what GKE sets


def instructions():
    """(instruction, rest) of the Containerfile, continued lines joined."""
    lines = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text("launch", "Containerfile"), flags=re.M)).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def test_the_image_runs_the_command_line_as_a_user_and_passes_signals_on():
    last = dict(instructions())
    assert json.loads(last["ENTRYPOINT"]) == ["tini", "--", "python", "-m", "ldm_jax.main"]  # a list: no shell between
    assert last["USER"] not in ("0", "root") and "CMD" not in last
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM" and names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")


def test_what_the_image_copies_exists_and_reaches_the_builder():
    lines = [line for line in text(".dockerignore").splitlines() if line]
    sources = [source for name, rest in instructions() if name == "COPY" for source in rest.split()[:-1]]
    assert {"setup.cfg", "ldm_jax", "configs"} <= set(sources)
    for source in sources:
        ignored = False
        for line in lines:  # the last that fits counts
            if fnmatch.fnmatch(source, line.lstrip("!")):
                ignored = not line.startswith("!")
        assert os.path.exists(os.path.join(ROOT, source)) and not ignored, source


@pytest.mark.parametrize("path", [["launch", "Containerfile"], ["launch", "tpu_pod.sh"]])
def test_the_extras_that_are_asked_for_exist(path):
    extras = configparser.ConfigParser()
    extras.read(os.path.join(ROOT, "setup.cfg"))
    asked = set(re.findall(r"EXTRAS=(\w+)", text(*path))) | set(re.findall(r"EXTRAS-(\w+)", text(*path)))
    assert asked and asked <= set(extras["options.extras_require"])
