"""The files of launch/ and the lines of launch/README.md, read by the parsers of accelerate and torchrun.

Nothing is trained here, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.run as torchrun
import yaml
from accelerate.commands.launch import _filter_args, _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from distvsd.config import load_config

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
ACCELERATE = sorted((LAUNCH / "accelerate").glob("*.yaml"))
SCRIPTS = sorted([*LAUNCH.rglob("*.sh"), *LAUNCH.rglob("*.sbatch"), *(ROOT / "tests/fakes/slurm").glob("s[bc]*")])
PROGRAMS = ("accelerate", "torchrun", "distvsd", "docker", "kubectl")
STARTS = ["-m", "distvsd.train", "configs/smoke.yaml"]

# accelerate does not copy these keys to its arguments. The tests of the started processes cover them.
NOT_COPIED = {"compute_environment", "distributed_type"}


def read_by_accelerate(path: Path, *options: str) -> argparse.Namespace:
    """The arguments of `accelerate launch --config_file PATH OPTIONS -m distvsd.train ...` after it has read the
    file."""
    given = launch_command_parser().parse_args(["--config_file", str(path), *options, *STARTS])
    args, _, _ = _validate_launch_command(given)
    assert isinstance(args, argparse.Namespace)
    return args


def passed_over(path: Path) -> list[str]:
    """The keys of a file, at any depth, that accelerate ignores. accelerate does not report them."""
    content = yaml.safe_load(path.read_text())
    inner = {key: value for part in content.values() if isinstance(part, dict) for key, value in part.items()}
    outer = {key: value for key, value in content.items() if not isinstance(value, dict) and key not in NOT_COPIED}
    args = read_by_accelerate(path)
    known = vars(launch_command_parser().parse_args(STARTS)).keys() | {"use_cpu"}
    wanted = outer | inner
    return [key for key, value in wanted.items() if key not in known or getattr(args, key) != value]


def launched(path: Path, *options: str) -> torchrun.LaunchConfig:
    """The configuration that accelerate passes to torch's launcher."""
    args = read_by_accelerate(path, *options)
    prepare_multi_gpu_env(args)
    own = ["--training_script", args.training_script, "--training_script_args", args.training_script_args]
    config, _, command = torchrun.config_from_args(_filter_args(args, torchrun.get_args_parser(), own))
    assert command[-3:] == STARTS
    return config


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_every_key_of_its_files(path: Path) -> None:
    assert passed_over(path) == []


def test_a_key_that_accelerate_passes_over_is_found(tmp_path: Path) -> None:
    """accelerate 1.15 reads rdzv_backend from its command line only, so nodes.yaml does not have it."""
    path = tmp_path / "more.yaml"
    more = "rdzv_backend: c10d\nsame_network: true\nenable_cpu_affinity: true\nfsdp_config: {fsdp_verzion: 2}\n"
    path.write_text((LAUNCH / "accelerate/nodes.yaml").read_text() + more)
    assert sorted(passed_over(path)) == ["enable_cpu_affinity", "fsdp_verzion", "rdzv_backend", "same_network"]
    path.write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nmax_restarts: 1\n")
    with pytest.raises(ValueError, match="max_restarts"):
        read_by_accelerate(path)


@pytest.mark.parametrize(
    ("name", "options", "nodes", "ranks", "endpoint"),
    [
        ("one-node", [], 1, 8, r"127\.0\.0\.1:\d+"),
        ("one-node", ["--num_processes", "4"], 1, 4, r"127\.0\.0\.1:\d+"),
        ("cpu", [], 1, 2, r"127\.0\.0\.1:\d+"),
        ("nodes", [], 2, 8, r"10\.0\.0\.1:29500"),
        ("nodes", ["--machine_rank", "1", "--main_process_ip", "HOST"], 2, 8, "HOST:29500"),
    ],
)
def test_accelerate_starts_what_its_files_say(
    name: str, options: list[str], nodes: int, ranks: int, endpoint: str
) -> None:
    config = launched(LAUNCH / f"accelerate/{name}.yaml", *options)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (nodes, nodes, ranks)
    assert re.fullmatch(endpoint, config.rdzv_endpoint)
    assert not config.rdzv_endpoint.endswith(":0")
    assert config.rdzv_configs["rank"] == (1 if "--machine_rank" in options else 0)


def test_accelerate_starts_one_process_for_one_gpu() -> None:
    args = read_by_accelerate(LAUNCH / "accelerate/one-gpu.yaml")
    assert not (args.multi_gpu or args.use_fsdp or args.use_deepspeed)
    command, environment = prepare_simple_launcher_cmd_env(args)
    assert command[1:] == STARTS
    assert environment["ACCELERATE_USE_CPU"] == "False" and "MASTER_ADDR" not in environment


@pytest.mark.skipif(torch.cuda.is_available(), reason="this test starts two CPU ranks")
def test_the_cpu_file_makes_one_world_of_two(tmp_path: Path) -> None:
    show = ["--config_file", str(LAUNCH / "accelerate/cpu.yaml"), str(Path(__file__).with_name("show_world.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *show, str(tmp_path)],
        env=without_launchers() | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted((world["rank"], world["size"], world["sum"]) for world in found) == [(0, 2, 3.0), (1, 2, 3.0)]


def without_launchers() -> dict[str, str]:
    launchers_own = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "ACCELERATE_", "TORCHELASTIC_", "PET_", "SLURM_")
    return {name: value for name, value in os.environ.items() if not name.startswith((*launchers_own, "DISTVSD_"))}


class Shell:
    """Runs shell lines in which each launcher is replaced by a program that only records its arguments."""

    def __init__(self, home: Path) -> None:
        self._notes = home / "notes"
        programs = home / "bin"
        programs.mkdir()
        for name in PROGRAMS:
            path = programs / name
            # Tabs separate the arguments, because none of these lines contains one. Each call is one write, because
            # several programs may write at the same time.
            what = f'{name} "$PET_SIGNALS_TO_HANDLE" "$PET_SHUTDOWN_TIMEOUT" "$@"'
            path.write_text(f"#!/bin/sh\nline=$(printf '%s\\t' {what})\nprintf '%s\\n' \"$line\" >>'{self._notes}'\n")
            path.chmod(0o755)
        path = [str(programs), str(ROOT / "tests/fakes/slurm"), os.environ["PATH"]]
        self.environment = without_launchers() | {"PATH": os.pathsep.join(path), "FAKE_SLURM": str(home)}

    def run(self, line: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", "-c", line],
            env=self.environment | environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def noted(self) -> list[tuple[str, dict[str, str], list[str]]]:
        """Every call: the program, the variables of torchrun in its environment, and its arguments."""
        calls = []
        for line in self._notes.read_text().splitlines():
            name, signals, timeout, *arguments = line.split("\t")[:-1]
            calls.append((name, {"PET_SIGNALS_TO_HANDLE": signals, "PET_SHUTDOWN_TIMEOUT": timeout}, arguments))
        return calls


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def read_by_torchrun(
    arguments: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> torchrun.LaunchConfig:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = torchrun.get_args_parser().parse_args(arguments)
    given.nproc_per_node = "8" if given.nproc_per_node == "gpu" else given.nproc_per_node
    config, _, _ = torchrun.config_from_args(given)
    return config


@pytest.mark.parametrize(
    ("script", "environment", "nodes", "ranks", "restarts"),
    [
        ("fixed", {}, (1, 1), 8, 0),
        ("fixed", {"DISTVSD_NODES": "2", "DISTVSD_HEAD": "HOST:29500", "DISTVSD_RANKS": "4"}, (2, 2), 4, 0),
        ("elastic", {"DISTVSD_NODES": "2:4", "DISTVSD_HEAD": "HOST:29500", "DISTVSD_JOB": "castle"}, (2, 4), 8, 3),
    ],
)
def test_the_torchrun_scripts_let_a_run_save_before_it_ends(
    shell: Shell,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    environment: dict[str, str],
    nodes: tuple[int, int],
    ranks: int,
    restarts: int,
) -> None:
    done = shell.run(f"sh launch/torchrun/{script}.sh configs/smoke.yaml 'prompt=a red cube'", **environment)
    assert done.returncode == 0, done.stderr
    ((name, launchers, arguments),) = shell.noted()
    assert name == "torchrun" and arguments[-4:] == [*STARTS, "prompt=a red cube"]
    config = read_by_torchrun(arguments, launchers, monkeypatch)
    assert (config.min_nodes, config.max_nodes) == nodes
    assert (config.nproc_per_node, config.max_restarts) == (ranks, restarts)
    assert {"SIGTERM", "SIGINT", "SIGUSR1"} <= set(config.signals_to_handle.split(","))
    assert config.shutdown_timeout == 300
    if environment:
        assert (config.rdzv_backend, config.rdzv_endpoint) == ("c10d", "HOST:29500")
        assert config.run_id == environment.get("DISTVSD_JOB", "distvsd")
    else:
        assert "--standalone" in arguments


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sh launch/torchrun/fixed.sh", "usage:"),
        ("DISTVSD_NODES=2 sh launch/torchrun/fixed.sh configs/smoke.yaml", "DISTVSD_HEAD: is HOST:PORT"),
        ("DISTVSD_NODES=2:4 sh launch/torchrun/elastic.sh configs/smoke.yaml", "DISTVSD_HEAD: is HOST:PORT"),
        *(
            (f"DISTVSD_NODES={nodes} DISTVSD_HEAD=HOST:1 sh launch/torchrun/elastic.sh configs/smoke.yaml", "usage:")
            for nodes in ("2", "2:", ":4", "a:b", "1:2:3", "")
        ),
    ],
)
def test_what_a_torchrun_script_cannot_do_without_is_asked_for(shell: Shell, line: str, message: str) -> None:
    done = shell.run(line)
    assert done.returncode == 2 and message in done.stderr


def page_lines() -> list[str]:
    """The lines of launch/README.md that test_end_to_end.py does not run."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (LAUNCH / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize("line", page_lines())
def test_every_line_of_the_page_starts_what_it_shows(shell: Shell, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """Runs each line up to the launcher. The launcher's parser must accept its arguments, and distvsd must load the
    configuration."""
    for word in re.findall(r"(?:launch|configs)/\S+", line):
        assert (ROOT / word).is_file(), word
    done = shell.run(line)
    assert done.returncode == 0, done.stderr
    calls = shell.noted()
    assert calls
    for name, environment, arguments in calls:
        if name == "accelerate":
            assert arguments[0] == "launch"
            given = launch_command_parser().parse_args(arguments[1:])
            trains = [given.training_script, *given.training_script_args]
            assert given.module and Path(given.config_file).is_file()
            _validate_launch_command(given)
            assert given.num_processes % given.num_machines == 0
        elif name == "torchrun":
            read_by_torchrun(arguments, environment, monkeypatch)
            trains = arguments[arguments.index("-m") + 1 :]
        else:
            continue
        assert trains[0] == "distvsd.train"
        assert load_config(ROOT / trains[1], trains[2:]).run.dir


def test_a_job_of_four_nodes_starts_as_many_processes_as_they_have_gpus(shell: Shell) -> None:
    """Each node starts one launcher with the rank of that node. If the job's shell expanded the variable, the rank
    would be 0 on all nodes."""
    line = "sbatch --nodes=4 --gpus-per-node=4 launch/slurm/train.sbatch configs/smoke.yaml run.dir=runs/none"
    done = shell.run(line)
    assert done.returncode == 0, done.stderr
    started = [launch_command_parser().parse_args(arguments[1:]) for _, _, arguments in shell.noted()]
    assert sorted(given.machine_rank for given in started) == [0, 1, 2, 3]
    assert {(given.num_machines, given.num_processes) for given in started} == {(4, 16)}
    # The fake sbatch gives the job the id 1234567.
    assert {(given.main_process_ip, given.main_process_port) for given in started} == {("localhost", 24567)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_plain_shell(path: Path) -> None:
    checked = subprocess.run(["/bin/sh", "-n", str(path)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    text = path.read_text()
    assert not re.search(r"\[\[|\blocal |\bsource |<\(|\bpipefail\b", text), "not POSIX"
    assert "set -eu" in text or path.name == "job.sh"  # sourced by scripts that have set it


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_in_the_scripts(path: Path) -> None:
    refuse(["--external-sources", str(path)], linter("shellcheck"))


def linter(name: str) -> str:
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    return found or pytest.skip(f"{name} is not installed")


def refuse(arguments: list[str], program: str) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def instructions() -> list[tuple[str, str]]:
    text = (LAUNCH / "container/Containerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, rest in lines]


def test_the_container_is_built_from_what_is_here() -> None:
    steps = instructions()
    known = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "CMD"}
    assert {word for word, _ in steps} <= known and steps[0][0] == "FROM"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = re.search(r"python:(\d+\.\d+)", steps[0][1])
    assert python is not None and project["requires-python"] == f">={python[1]}"
    for _, rest in (step for step in steps if step[0] == "COPY"):
        for source in rest.split()[:-1]:
            assert (ROOT / source).exists(), source
    copied = {source for word, rest in steps if word == "COPY" for source in rest.split()[:-1]}
    assert {"distvsd", "launch", "configs", project["readme"], *project["license-files"]} <= copied
    # The container runs as its own user. The launcher is the first process, because that one gets the signals.
    assert [rest for word, rest in steps if word == "USER"] == ["1000"]
    assert json.loads(next(rest for word, rest in steps if word == "CMD"))[0] in project["scripts"]


def test_hadolint_finds_nothing_in_the_container_file() -> None:
    refuse([str(LAUNCH / "container/Containerfile")], linter("hadolint"))


def resources() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all((LAUNCH / "kubernetes/job.yaml").read_text())}


def test_the_parts_of_the_kubernetes_job_fit_together(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    found = resources()
    service, job, claim = found["Service"], found["Job"]["spec"], found["PersistentVolumeClaim"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {each["name"]: each["value"] for each in container["env"]}
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == int(environment["DISTVSD_NODES"])
    # The host name of the first pod consists of the job's name, its index and the name of the service.
    name, subdomain = found["Job"]["metadata"]["name"], service["metadata"]["name"]
    assert environment["DISTVSD_HEAD"] == f"{name}-0.{subdomain}:{container['ports'][0]['containerPort']}"
    assert pod["subdomain"] == subdomain and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}  # Kubernetes sets this label on the pods of a job
    assert int(environment["DISTVSD_RANKS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    # Kubernetes must not kill the pod during a save.
    assert pod["terminationGracePeriodSeconds"] > int(environment["PET_SHUTDOWN_TIMEOUT"])
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    done = shell.run(" ".join(container["command"]), **environment)
    assert done.returncode == 0, done.stderr
    ((_, launchers, arguments),) = shell.noted()
    config = read_by_torchrun(arguments, launchers, monkeypatch)
    assert (config.min_nodes, config.nproc_per_node) == (2, 8)
    assert config.rdzv_endpoint == environment["DISTVSD_HEAD"]


def test_the_kubernetes_job_fits_the_published_schema() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    for resource in yaml.safe_load_all((LAUNCH / "kubernetes/job.yaml").read_text()):
        validator.validate(resource, "1.37", strict=True)
