"""How processes find their place and meet: what arguments, the environment and a cluster say, and errors."""

import concurrent.futures
import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from many_processes import free_port

from elastic_lm import meeting
from elastic_lm.cli import main as cli
from elastic_lm.meeting import Place, find_place, meet, start_processes
from elastic_lm.processes import all_or_none, bytes_of_all, bytes_of_first, on_host, wait_for_all

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[07-10],other",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.0.0.7:3491",
}
GKE = {"TPU_WORKER_HOSTNAMES": "localhost,127.0.0.1", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Sets variables, and none of those that the machine of the tests may have."""
    for name in (
        *("ELASTIC_LM_COORDINATOR", "ELASTIC_LM_PROCESSES", "ELASTIC_LM_PROCESS", "JAX_COORDINATOR_ADDRESS"),
        *("KUBERNETES_SERVICE_HOST", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES", *SLURM, *MPI, *GKE),
    ):
        monkeypatch.delenv(name, raising=False)

    def put(variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def found(*given: Any) -> Place | None:
    return find_place(*(*given, None, None, None)[:3], timeout=5)


def test_one_process_needs_nothing(surroundings: Callable) -> None:
    assert found() is None
    assert found(None, 1) is None
    surroundings(SLURM)
    assert found(None, 1) is None  # alone, whatever the cluster says
    assert start_processes(processes=1) == 1


def test_arguments_go_before_variables(surroundings: Callable) -> None:
    surroundings({"ELASTIC_LM_COORDINATOR": "here:1", "ELASTIC_LM_PROCESSES": "3", "ELASTIC_LM_PROCESS": "2"})
    assert found() == Place("here:1", 3, 2)
    assert found("there:2", 4, 0) == Place("there:2", 4, 0)
    surroundings({"ELASTIC_LM_PROCESSES": "many"})
    with pytest.raises(ValueError, match="ELASTIC_LM_PROCESSES='many': must be a whole number"):
        found()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("here:1", 2, 2), "process=2: must be a number from 0 to 1, of processes=2"),
        (
            ("here:1", 2, None),
            r"process=None: is not given: name coordinator \(HOST:PORT of process 0\), proc",
        ),
        ((None, 2, 1), "coordinator=None: is not given"),
        (("here", 2, 1), "coordinator='here': must be HOST:PORT"),
        (("here:0", 2, 1), "coordinator='here:0': must be HOST:PORT"),
        (("here:1", 0, 1), "processes=0: must be at least 1"),
        ((None, 1, 1), "process=1: is the number of one among processes=1, from 0"),
    ],
)
def test_wrong_arguments_are_refused(surroundings: Callable, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        found(*given)


def test_clusters_are_found_by_jax(surroundings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings(SLURM)
    port = 4097 % 4096 + 65536 - 4096
    assert found() == Place(f"node07:{port}", 8, 5, devices=(1,))
    # One task has all devices of its machine.
    surroundings({"SLURM_STEP_TASKS_PER_NODE": "1(x8)"})
    assert found() == Place(f"node07:{port}", 8, 5)
    assert found("mine:77") == Place("mine:77", 8, 5)


def test_mpi_is_found(surroundings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    surroundings(MPI)
    assert found() == Place(f"10.0.0.7:{8192 // 4096 % 4096 + 65536 - 4096}", 4, 3, devices=(0,))
    monkeypatch.delenv("OMPI_MCA_orte_hnp_uri")  # as Open MPI 5
    assert found("mine:77") == Place("mine:77", 4, 3)
    with pytest.raises(ValueError, match="coordinator=None: OMPI_COMM_WORLD_SIZE=4, and nothing says where"):
        found()


def test_tpu_workers_are_found(surroundings: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from jax._src.clusters import cloud_tpu_cluster, cluster

    for module in (cloud_tpu_cluster, cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
    surroundings({**GKE, "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"})
    surroundings({"MEGASCALE_COORDINATOR_ADDRESS": "localhost"})
    assert found() == Place("localhost:8482", 2, 1)
    surroundings({"TPU_WORKER_HOSTNAMES": "localhost"})  # one machine
    assert found() is None


def test_commands_of_one_process_refuse_several(
    surroundings: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    surroundings(SLURM)
    assert cli.main(["export", "--from", "nothing", "--to", "nowhere"]) == 2
    told = (
        "elastic-lm export: error: export runs as one process, and SLURM_NTASKS=8 says that there are more: "
    )
    assert capsys.readouterr().err.startswith(told)
    surroundings({"ELASTIC_LM_PROCESSES": "1"})
    assert cli.main(["export", "--from", "nothing", "--to", "nowhere"]) == 2
    assert "runs as one process" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "sign"),
    [
        (GKE, "TPU_WORKER_HOSTNAMES=localhost,127.0.0.1"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "TPU_PROCESS_ADDRESSES=a:1,b:1"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_NUM_SLICES=2"),
    ],
)
def test_commands_of_one_process_refuse_workers_of_tpus(
    surroundings: Callable, capsys: pytest.CaptureFixture[str], variables: dict[str, str], sign: str
) -> None:
    surroundings(variables)
    assert cli.main(["generate", "--model", "nothing", "--prompt", "a"]) == 2
    assert f"generate runs as one process, and {sign} says that there are more" in capsys.readouterr().err


def test_a_tpu_machine_is_asked_for_others(
    surroundings: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jax._src import cloud_tpu_init

    monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(meeting, "_may_have_tpus", lambda: True)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for said, several in (("w0:0:10.0.0.1,w1:1:10.0.0.2", True), ("w0:0:10.0.0.1", False)):
        monkeypatch.setattr(meeting, "_metadata", lambda key, said=said: said)
        assert cli.main(["generate", "--model", "nothing", "--prompt", "a"]) == 2
        assert ("this machine's TPU slice says that there are more" in capsys.readouterr().err) == several


def test_a_wrong_place_is_one_line(surroundings: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--config", "ee_tuning", "--workdir", "w", "--coordinator", "here:1"]
    assert cli.main([*command, "--processes", "2", "--process", "2"]) == 2
    told = "elastic-lm train: error: process=2: must be a number from 0 to 1, of processes=2\n"
    assert capsys.readouterr().err == told
    assert cli.main([*command, "--processes", "0"]) == 2
    assert capsys.readouterr().err.startswith("elastic-lm train: error: --processes 0: must be at least 1")


def answers(places: list[Place], seconds: float = 10.0) -> list[str]:
    """What every process is told, each being a thread here; "" = go."""

    def one(place: Place) -> str:
        try:
            meet(place, time.monotonic() + seconds)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(one, places))


def test_all_meet() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert answers([Place(address, 3, i) for i in (2, 0, 1)]) == [""] * 3
    assert answers([Place(address, 2, i) for i in (0, 1)]) == [""] * 2  # the port is free at once


def test_a_missing_process_is_named_to_all() -> None:
    address = f"127.0.0.1:{free_port()}"
    told = answers([Place(address, 4, i) for i in (0, 2)], seconds=1.0)
    assert told[0].startswith(f"processes 1, 3 of 4 did not come to {address} in time; start them with")
    assert told[1] == told[0]


def test_an_unreachable_coordinator_is_named() -> None:
    address = f"127.0.0.1:{free_port()}"
    for place in (Place(address, 2, 1), Place("no.such.host.invalid:7", 2, 1)):
        (told,) = answers([place], seconds=0.5)
        assert told.startswith(f"--coordinator {place.coordinator}: process 1 cannot reach process 0 there (")


def test_a_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        (told,) = answers([Place(f"127.0.0.1:{port}", 2, 0)], seconds=1.0)
    assert told.startswith(f"--coordinator 127.0.0.1:{port}: port {port} of this machine cannot be used (")


def test_processes_that_disagree_are_told() -> None:
    address = f"127.0.0.1:{free_port()}"
    told = answers([Place(address, 2, 0), Place(address, 3, 1)])
    assert set(told) == {"--processes 2 in process 0, and 3 in process 1: give all of them the same number"}
    told = answers([Place(address, 3, 0), Place(address, 3, 1), Place(address, 3, 1)])
    assert set(told) == {"--process 1: two processes have this number; give each its own, from 0"}


def test_other_versions_and_other_programs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    versions = iter(["old", "new", "old", "new"])
    monkeypatch.setattr("elastic_lm.meeting._versions", lambda: next(versions))
    told = answers([Place(f"127.0.0.1:{port}", 2, i) for i in (1, 0)])
    assert "runs" in told[0]
    assert told[0].endswith("install the same versions everywhere")

    monkeypatch.setattr("elastic_lm.meeting._versions", lambda: "same")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(answers, [Place(f"127.0.0.1:{port}", 2, 0)])
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", json.dumps({"greeting": "else"}).encode() + b"\n"):
            say(port, said)
        assert answers([Place(f"127.0.0.1:{port}", 2, 1)]) == [""]
        assert first.result() == [""]


def say(port: int, data: bytes) -> None:
    """Another program that happens to speak to the port."""
    for _ in range(100):
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
                connection.sendall(data)
            return
        except OSError:
            time.sleep(0.02)


def test_one_process_gathers_nothing() -> None:
    tree = {"a": np.arange(3), "b": [np.ones(2)]}
    assert on_host(tree)["a"].tolist() == [0, 1, 2]
    assert bytes_of_all(b"x") == [b"x"]
    assert bytes_of_first(lambda: b"y") == b"y"
    wait_for_all("nobody")
    with pytest.raises(KeyError), all_or_none():
        raise KeyError
