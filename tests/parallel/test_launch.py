"""Recipes for engines: each file is what its engine reads, and starts a command that exists."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jrlhf.cli.flags import stage_config
from jrlhf.config import Config
from tests.support import ROOT

LAUNCH = ROOT / "configs" / "launch"
RESTARTS = range(1, 21)


def documents(name: str) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all((LAUNCH / name).read_text(encoding="utf-8"))]


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Config:
    """What a recipe's ``jrlhf ...`` asks for; an unknown flag, key or file raises."""
    assert arguments[0] == "jrlhf"
    monkeypatch.chdir(ROOT)
    config = stage_config(arguments[1], arguments[2:])
    assert config.sft.data.train
    return config


def check_pods(job: dict[str, Any], container: str) -> dict[str, Any]:
    """A Job that fails as soon as a pod does, and says whether it was a mistake in the config; its container."""
    assert job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": container, "operator": "In", "values": [2]}
    pod = job["template"]["spec"]
    # What podFailurePolicy asks for.
    assert pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 60
    [found] = pod["containers"]
    assert found["name"] == container
    mounts, volumes = ({entry["name"] for entry in entries} for entries in (found["volumeMounts"], pod["volumes"]))
    assert mounts == volumes
    return found


def check_restarts(policy: dict[str, Any]) -> None:
    assert policy["maxRestarts"] in RESTARTS
    [rule] = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert rule["name"]


def test_jobset(monkeypatch):
    [jobset] = documents("jobset.yaml")
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert spec.keys() == {"coordinator", "failurePolicy", "replicatedJobs"}
    check_restarts(spec["failurePolicy"])
    [workers] = spec["replicatedJobs"]
    assert spec["coordinator"] == {"replicatedJob": workers["name"], "jobIndex": 0, "podIndex": 0}
    job = workers["template"]["spec"]
    assert job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"
    container = check_pods(job, "jrlhf")
    variables = {entry["name"]: entry for entry in container["env"]}
    assert variables["JAX_NUM_PROCESSES"]["value"] == str(job["parallelism"] * workers["replicas"])
    [port] = container["ports"]
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == f"$(COORDINATOR):{port['containerPort']}"
    # Kubernetes replaces only what stands before.
    assert [*variables].index("COORDINATOR") < [*variables].index("JAX_COORDINATOR_ADDRESS")
    assert parsed(container["command"], monkeypatch).run.startswith("/runs/")


def test_kubeflow(monkeypatch):
    runtime, job = documents("kubeflow-trainjob.yaml")
    for document, kind in ((runtime, "TrainingRuntime"), (job, "TrainJob")):
        assert (document["apiVersion"], document["kind"]) == ("trainer.kubeflow.org/v1alpha1", kind)
    reference = job["spec"]["runtimeRef"]
    assert reference == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "jrlhf-jax"}
    assert reference["name"] == runtime["metadata"]["name"]
    assert runtime["spec"]["mlPolicy"] == {"numNodes": job["spec"]["trainer"]["numNodes"], "jax": {}}
    template = runtime["spec"]["template"]["spec"]
    check_restarts(template["failurePolicy"])
    [node] = template["replicatedJobs"]
    # The names by which the trainer finds what to fill in.
    assert node["name"] == "node"
    assert node["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}
    check_pods(node["template"]["spec"], "node")
    assert parsed(job["spec"]["trainer"]["command"], monkeypatch).run.startswith("/runs/")


def test_skypilot(monkeypatch, tmp_path):
    [task] = documents("skypilot.yaml")
    assert task.keys() == {"name", "workdir", "num_nodes", "resources", "volumes", "setup", "run"}
    assert task["resources"]["job_recovery"]["strategy"] in ("FAILOVER", "EAGER_NEXT_REGION")
    assert task["resources"]["job_recovery"]["max_restarts_on_errors"] in RESTARTS
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    [call] = run_with_stubs(task["run"], tmp_path, {"jrlhf": "exit 0"}, variables)[1]
    config = parsed(call, monkeypatch)
    assert [*task["volumes"]] == ["/runs"]
    assert config.run.startswith("/runs/")
    told = config.distributed
    assert (told.coordinator, told.processes, told.process) == ("10.0.0.1:1234", 2, 1)


def run_with_stubs(
    script: str, folder: Path, stubs: dict[str, str], variables: dict[str, str]
) -> tuple[int, list[list[str]]]:
    """Run a bash script with stand-ins for the commands it calls; exit code and what was called with what."""
    programs, log = folder / "bin", folder / "calls"
    programs.mkdir(exist_ok=True)
    log.write_text("")
    for name, body in stubs.items():
        stub = programs / name
        stub.write_text(f'#!/bin/bash\nprintf "%q " {name} "$@" >> {log}\necho >> {log}\n{body}\n')
        stub.chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"} | variables
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, [shlex.split(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("name", ["slurm.sbatch", "cloud-tpu.sh"])
def test_scripts_are_bash(name):
    done = subprocess.run(["bash", "-n", LAUNCH / name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("code", "before", "again"), [(0, 0, False), (2, 0, False), (1, 0, True), (143, 3, True), (1, 5, False)]
)
def test_slurm_queues_a_failed_job_again_and_not_for_ever(code, before, again, monkeypatch, tmp_path):
    script = (LAUNCH / "slurm.sbatch").read_text()
    stubs = {"srun": f"exit {code}", "scontrol": "exit 0"}
    variables = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": str(before)}
    found, calls = run_with_stubs(script, tmp_path, stubs, variables)
    assert found == code
    assert calls[1:] == ([["scontrol", "requeue", "17"]] if again else [])
    assert calls[0][:2] == ["srun", "--kill-on-bad-exit=1"]
    parsed(calls[0][2:], monkeypatch)


def test_slurm_asks_for_a_signal_before_the_end_and_a_task_a_gpu():
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in (LAUNCH / "slurm.sbatch").read_text().splitlines()
        if line.startswith("#SBATCH --")
    )
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "TERM@180"
    assert options["open-mode"] == "append"
    assert "requeue" in options


TPU = {"TPU": "t", "ZONE": "z", "TYPE": "v5p-32", "IMAGE": "i", "SHARE": "10.0.0.2:/share", "PAUSE": "0"}


@pytest.mark.parametrize(
    ("state", "fails", "runs", "code"), [("READY", 0, 1, 0), ("READY", 2, 3, 0), ("PREEMPTED", 9, 5, 1), ("", 0, 1, 0)]
)
def test_cloud_tpu_starts_a_failed_run_again_and_not_for_ever(state, fails, runs, code, monkeypatch, tmp_path):
    script = (LAUNCH / "cloud-tpu.sh").read_text()
    stub = f"""
case "$*" in
  *describe*) echo {state} ;;
  *"jrlhf pipeline"*) echo x >> {tmp_path}/tries; (($(wc -l < {tmp_path}/tries) > {fails})) ;;
esac"""
    found, calls = run_with_stubs(script, tmp_path, {"gcloud": stub}, TPU)
    assert found == code
    commands = [call for call in calls if "jrlhf pipeline" in call[-1]]
    assert len(commands) == runs
    for call in commands:
        assert call[1:6] == ["compute", "tpus", "tpu-vm", "ssh", "t"]
        assert "--worker=all" in call
        parsed(shlex.split(call[-1].partition(" && ")[2]), monkeypatch)
    made = [call[4] for call in calls if call[4] in ("create", "delete")]
    assert made == ([] if state == "READY" else ["delete", "create"] * runs if state else ["create"])
