"""Which jobs are whose, how a launcher says so, and the scripts that rely on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vidkv.errors import InputError
from vidkv.jobs.shards import Shard, local_device

EXAMPLES = Path(__file__).resolve().parents[2] / "apps" / "examples"
ARRAY = {
    "SLURM_ARRAY_TASK_ID": "5",
    "SLURM_ARRAY_TASK_MIN": "3",
    "SLURM_ARRAY_TASK_MAX": "6",
    "SLURM_ARRAY_TASK_COUNT": "4",
    "SLURM_ARRAY_TASK_STEP": "1",
}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASKS = {"SLURM_PROCID": "2", "SLURM_NTASKS": "6", "SLURM_STEP_ID": "0"}


class TestWritten:
    def test_counts_from_zero(self) -> None:
        assert [Shard.parse(f"{i}/3") for i in range(3)] == [Shard(0, 3), Shard(1, 3), Shard(2, 3)]

    @pytest.mark.parametrize(
        "text",
        ["", "3", "1/", "/8", "8/8", "1/0", "0/0", "-1/8", "1.5/8", "a/b", "1/2/3", "٣/٨", "0/9999999"],
    )
    def test_what_is_no_shard_is_named(self, text: str) -> None:
        with pytest.raises(InputError, match=r"shard=.*[0-9]") as raised:
            Shard.parse(text)
        assert "\n" not in str(raised.value)

    def test_one_past_the_end_is_told_where_the_end_is(self) -> None:
        with pytest.raises(InputError, match="the last 7/8"):
            Shard.parse("8/8")

    @pytest.mark.parametrize("text", ["auto/", "auto/x", "auto/-1", "automatic", "auto /8x"])
    def test_choice(self, text: str) -> None:
        with pytest.raises(InputError, match="shard="):
            Shard.choose(text, {"RANK": "0", "WORLD_SIZE": "2"})

    def test_auto_must_find_something(self) -> None:
        with pytest.raises(InputError, match=r"RANK and WORLD_SIZE.*give --shard"):
            Shard.choose("auto", {"PATH": "/bin"})

    def test_what_is_written_needs_no_launcher(self) -> None:
        assert Shard.choose("1/2", {"RANK": "0", "WORLD_SIZE": "9"}) == Shard(1, 2)


class TestTakes:
    @given(st.text(), st.integers(1, 300))
    def test_every_job_is_exactly_one_shards(self, key: str, count: int) -> None:
        assert sum(Shard(index, count).takes(key) for index in range(count)) == 1

    @pytest.mark.parametrize("count", [2, 7, 64])
    def test_shares_are_alike(self, count: int) -> None:
        jobs = 200 * count
        shares = [0] * count
        for key in (f"{number:064x}" for number in range(jobs)):
            shares[next(i for i in range(count) if Shard(i, count).takes(key))] += 1
        # five standard deviations of a fair draw
        assert max(abs(share - 200) for share in shares) < 5 * 200**0.5

    def test_is_the_same_in_every_process(self) -> None:
        """Not Python's own hash, which differs from run to run."""
        keys = [f"{number:064x}" for number in range(40)]
        code = (
            "import sys; from vidkv.jobs.shards import Shard; "
            "print(*(int(Shard(1, 3).takes(key)) for key in sys.argv[1:]))"
        )
        environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(EXAMPLES.parents[1])}
        found = subprocess.check_output([sys.executable, "-c", code, *keys], text=True, env=environment)
        assert found.split() == [str(int(Shard(1, 3).takes(key))) for key in keys]

    def test_name_is_its_own(self) -> None:
        names = {Shard(i, n).name for n in range(1, 20) for i in range(n)}
        assert len(names) == sum(range(20))
        assert Shard(2, 8).name == "shard-2-of-8"


class TestEnvironment:
    @pytest.mark.parametrize(
        ("env", "wanted"),
        [
            ({}, None),
            ({"LOCAL_RANK": "1", "SLURM_JOB_ID": "7"}, None),
            ({"RANK": "3", "WORLD_SIZE": "4"}, Shard(3, 4)),
            (ARRAY, Shard(2, 4)),
            # --array=3-9:2
            (ARRAY | {"SLURM_ARRAY_TASK_MAX": "9", "SLURM_ARRAY_TASK_STEP": "2"}, Shard(1, 4)),
            (ARRAY | BATCH, Shard(2, 4)),
            (TASKS, Shard(2, 6)),
            (BATCH, Shard(0, 1)),
            # six tasks in each of four elements: the third task of the third
            (ARRAY | TASKS, Shard(14, 24)),
            (ARRAY | {"RANK": "0", "WORLD_SIZE": "2"}, Shard(0, 2)),
        ],
    )
    def test_launchers(self, env: dict[str, str], wanted: Shard | None) -> None:
        assert Shard.of_environment(env) == wanted
        if wanted:
            assert Shard.choose("auto", env) == Shard.choose(f"auto/{wanted.count}", env) == wanted

    def test_array_of_tasks_covers_everything_once(self) -> None:
        elements = [ARRAY | {"SLURM_ARRAY_TASK_ID": str(i)} for i in range(3, 7)]
        found = [
            Shard.of_environment(element | TASKS | {"SLURM_PROCID": str(task)})
            for element in elements
            for task in range(6)
        ]
        assert found == [Shard(i, 24) for i in range(24)]

    def test_kubernetes_needs_the_number_of_pods(self) -> None:
        assert Shard.choose("auto/8", {"JOB_COMPLETION_INDEX": "7"}) == Shard(7, 8)
        with pytest.raises(InputError, match=r"JOB_COMPLETION_INDEX=7.*auto/COUNT.*completions"):
            Shard.choose("auto", {"JOB_COMPLETION_INDEX": "7"})
        with pytest.raises(InputError, match=r"JOB_COMPLETION_INDEX=8.*auto/8"):
            Shard.choose("auto/8", {"JOB_COMPLETION_INDEX": "8"})

    @pytest.mark.parametrize(
        ("env", "named"),
        [
            ({"RANK": "1"}, "WORLD_SIZE is not"),
            ({"WORLD_SIZE": "4"}, "RANK is not"),
            ({"RANK": "4", "WORLD_SIZE": "4"}, "RANK=4"),
            ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK='one'"),
            ({"RANK": "", "WORLD_SIZE": "4"}, "RANK=''"),
            ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
            ({"RANK": "0", "WORLD_SIZE": "9999999"}, "WORLD_SIZE=9999999"),
            ({"RANK": "-1", "WORLD_SIZE": "4"}, "RANK='-1'"),
            ({"RANK": "9" * 5000, "WORLD_SIZE": "4"}, "RANK='999"),
            ({"SLURM_ARRAY_TASK_ID": "5"}, "SLURM_ARRAY_TASK_MIN is not set"),
            (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "x"}, "SLURM_ARRAY_TASK_COUNT='x'"),
            # --array=3,5,6
            (ARRAY | {"SLURM_ARRAY_TASK_COUNT": "3"}, "--array=0-2"),
            (ARRAY | {"SLURM_ARRAY_TASK_ID": "2"}, "SLURM_ARRAY_TASK_ID=2"),
            (ARRAY | {"SLURM_ARRAY_TASK_STEP": "0"}, "SLURM_ARRAY_TASK_ID=5"),
            (ARRAY | {"SLURM_ARRAY_TASK_STEP": "4"}, "SLURM_ARRAY_TASK_ID=5"),
            ({"SLURM_PROCID": "0"}, "SLURM_NTASKS is not"),
            # a batch script that forgot srun would do a sixth of the work
            ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, "srun"),
        ],
    )
    def test_contradictions_are_named(self, env: dict[str, str], named: str) -> None:
        with pytest.raises(InputError, match=named) as raised:
            Shard.of_environment(env)
        assert len(str(raised.value)) < 300

    def test_another_count_than_the_launchers(self) -> None:
        with pytest.raises(InputError, match=r"auto/8.*started 4"):
            Shard.choose("auto/8", {"RANK": "3", "WORLD_SIZE": "4"})


class TestLocalDevice:
    @pytest.mark.parametrize(
        ("env", "gpus", "wanted"),
        [
            ({}, 4, None),
            ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, 4, 2),
            ({"LOCAL_RANK": "2"}, 4, 2),
            ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}, 0, None),
            # alone on its host it may have all of them
            ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, 4, None),
            # a batch script is no task
            (BATCH, 4, None),
            (TASKS | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, 2, 1),
            (
                TASKS | {"SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"},
                4,
                None,
            ),
            (
                TASKS | {"SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"},
                4,
                0,
            ),
            # bound by SLURM
            (TASKS | {"SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"}, 1, None),
            (TASKS | {"SLURM_LOCALID": "1", "SLURM_GPUS_PER_TASK": "2"}, 2, None),
        ],
    )
    def test_everyone_takes_its_own(self, env: dict[str, str], gpus: int, wanted: int | None) -> None:
        assert local_device(env, gpus) == wanted

    @pytest.mark.parametrize(
        "env",
        [
            {"LOCAL_RANK": "2"},
            # all of them say so, not only the one that has none
            {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4"},
            TASKS | {"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "3"},
        ],
    )
    def test_too_many_processes(self, env: dict[str, str]) -> None:
        with pytest.raises(InputError, match="2 GPUs"):
            local_device(env, 2)

    def test_no_number(self) -> None:
        with pytest.raises(InputError, match="LOCAL_RANK='x'"):
            local_device({"LOCAL_RANK": "x"}, 2)


def test_accelerate_launch_sets_what_is_read(tmp_path: Path) -> None:
    """With --cpu it starts a single process and numbers nothing; for GPUs it starts torchrun's launcher."""
    script = tmp_path / "probe.py"
    script.write_text(
        "import json, os, pathlib\n"
        "env = {k: v for k, v in os.environ.items() if 'RANK' in k or 'WORLD_SIZE' in k}\n"
        "pathlib.Path(__file__).with_name(f'{os.getpid()}.json').write_text(json.dumps(env))\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    free = {k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD_SIZE" not in k}
    subprocess.run([*command, "--main_process_port", "0", str(script)], env=free, check=True, timeout=120)
    seen = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    shards = [Shard.choose("auto", env) for env in seen]
    assert sorted(shard.index for shard in shards) == [0, 1]
    assert {shard.count for shard in shards} == {2}
    assert sorted(str(local_device(env, 2)) for env in seen) == ["0", "1"]


class Slurm:
    """Programs that record how they are called, in place of a cluster's."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        self._program("srun", 'export SLURM_STEP_ID=0\nexec "$@"')
        self._program("vidkv", 'exit "${VIDKV_EXIT:-0}"')
        self._program("scontrol", "exit 1")

    def _program(self, name: str, then: str) -> None:
        path = self.folder / name
        path.write_text(
            f'#!/bin/sh\nenv | grep ^SLURM_ | tr "\\n" " " >>"{self.calls}"\n'
            f'echo "| {name} $*" >>"{self.calls}"\n{then}\n'
        )
        path.chmod(0o755)

    def submit(self, array: range, index: int, *arguments: str, code: int = 0) -> tuple[int, list[str]]:
        """Run one element of an array; returns its exit code and `VARIABLES | COMMAND` of what it called."""
        self.calls.write_text("")
        variables = BATCH | {
            "SLURM_ARRAY_TASK_ID": str(index),
            "SLURM_ARRAY_TASK_MIN": str(array[0]),
            "SLURM_ARRAY_TASK_MAX": str(array[-1]),
            "SLURM_ARRAY_TASK_COUNT": str(len(array)),
            "SLURM_ARRAY_JOB_ID": "77",
        }
        environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", "VIDKV_EXIT": str(code)} | variables
        command = ["bash", str(EXAMPLES / "slurm.sbatch"), *arguments]
        done = subprocess.run(command, env=environment, check=False, timeout=60)
        return done.returncode, self.calls.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    yield Slurm(tmp_path)


class TestSlurmScript:
    def options(self) -> dict[str, str]:
        lines = (EXAMPLES / "slurm.sbatch").read_text().splitlines()
        pairs = [
            line.removeprefix("#SBATCH --").partition("=") for line in lines if line.startswith("#SBATCH")
        ]
        return {name: value for name, _, value in pairs}

    def test_is_a_shell_script(self) -> None:
        subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sbatch")], check=True)
        assert (EXAMPLES / "slurm.sbatch").read_text().startswith("#!/bin/bash\n")

    def test_asks_for_preemption_and_time_to_save(self) -> None:
        options = self.options()
        assert "requeue" in options
        assert options["open-mode"] == "append"
        name, _, seconds = options["signal"].partition("@")
        # B: would send it to this script alone, which does not pass it on
        assert name == "TERM"
        assert int(seconds) >= 15

    def test_its_elements_are_all_shards(self, slurm: Slurm) -> None:
        first, _, last = self.options()["array"].partition("-")
        array = range(int(first), int(last) + 1)
        shards = []
        for index in array:
            code, (_, call) = slurm.submit(array, index, "my jobs.jsonl", "/shared/out")
            variables, _, command = call.partition(" | ")
            assert code == 0
            assert command == "vidkv render my jobs.jsonl --out /shared/out --shard auto"
            env = dict(pair.split("=", 1) for pair in variables.split())
            shards.append(Shard.choose("auto", env))
        assert shards == [Shard(i, len(array)) for i in range(len(array))]

    def test_defaults(self, slurm: Slurm) -> None:
        _, (_, call) = slurm.submit(range(8), 0)
        assert call.endswith("vidkv render jobs.jsonl --out /shared/renders --shard auto")

    @pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (2, False), (143, True)])
    def test_what_was_stopped_is_queued_again(self, slurm: Slurm, code: int, again: bool) -> None:
        ended, calls = slurm.submit(range(8), 5, code=code)
        assert ended == code
        assert any(call.endswith("scontrol requeue 77_5") for call in calls) is again


class TestKubernetesJob:
    @pytest.fixture
    def job(self) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text())
        return found

    def test_its_pods_are_all_shards(self, job: dict[str, Any]) -> None:
        spec = job["spec"]
        assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
        (container,) = spec["template"]["spec"]["containers"]
        command = container["command"]
        assert command[:2] == ["vidkv", "render"]
        text = command[command.index("--shard") + 1]
        count = spec["completions"]
        shards = [Shard.choose(text, {"JOB_COMPLETION_INDEX": str(i)}) for i in range(count)]
        assert shards == [Shard(i, count) for i in range(count)]

    def test_all_files_are_on_the_shared_volume(self, job: dict[str, Any]) -> None:
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        (mount,) = container["volumeMounts"]
        assert [volume["name"] for volume in pod["volumes"]] == [mount["name"]]
        command = container["command"]
        for path in (command[2], command[command.index("--out") + 1]):
            assert path.startswith(mount["mountPath"] + "/")

    def test_a_preempted_pod_saves_and_starts_again(self, job: dict[str, Any]) -> None:
        spec = job["spec"]
        assert spec["template"]["spec"]["terminationGracePeriodSeconds"] >= 15
        # what the rules below require
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        disruption, unusable = spec["podFailurePolicy"]["rules"]
        assert disruption["action"] == "Ignore"
        assert disruption["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert unusable["action"] == "FailJob"
        assert unusable["onExitCodes"]["values"] == [2]
        names = [container["name"] for container in spec["template"]["spec"]["containers"]]
        assert unusable["onExitCodes"]["containerName"] in names
        assert spec["backoffLimitPerIndex"] > 0
