"""How the processes that run one program together find their places, and meet before jax connects them.

jax connects them (`jax.distributed`). What goes wrong before, such as a coordinator that nobody reaches or a
process that is missing, ends a process of jax's with a stack trace of its C++ code. Therefore the processes
meet here first, over a plain connection to the same address, and learn in words what does not fit.

The command line imports this module for its help, so that what is heavy is imported late.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from elastic_lm.config.checks import is_whole, require

COORDINATOR, PROCESSES, PROCESS = "ELASTIC_LM_COORDINATOR", "ELASTIC_LM_PROCESSES", "ELASTIC_LM_PROCESS"
JAX_COORDINATOR, JAX_BIND = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"
TIMEOUT = 300.0  # seconds until all processes must have come
THREADS = 16  # of XLA on CPUs, at least
AGAIN = 0.2  # seconds between two tries to reach the coordinator
LONGEST = 4096  # bytes of a message at the meeting
GREETING = "elastic_lm 1"
HOSTS, SLICES = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"), "MEGASCALE_NUM_SLICES"


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among all of them.

    Attributes:
      coordinator: HOST:PORT at which process 0 is met.
      processes: how many there are.
      process: which one this is, from 0.
      devices: local numbers of the devices that it may use; None = all that it sees.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None = None


def start_processes(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    timeout: float = TIMEOUT,
) -> int:
    """Connects the processes that run this program together; call it before anything that uses jax.

    What is not given is read from the variables ELASTIC_LM_COORDINATOR, ELASTIC_LM_PROCESSES and
    ELASTIC_LM_PROCESS. Without them jax finds out by itself on Cloud TPU, GKE, Slurm and Open MPI. Where
    there is one process, nothing happens. Every process must run the same program with the same arguments.

    Args:
      coordinator: HOST:PORT, the address of process 0 that all others reach, with a free port.
      processes: how many there are; 1 = this one alone, whatever the cluster says.
      process: which one this is, from 0.
      timeout: seconds until all of them must have come.

    Returns:
      The number of processes.

    Raises:
      OSError: the port is taken, the coordinator cannot be reached, or processes are missing when the time is
        over; names them.
      ValueError: an argument is wrong, processes disagree about their number, two have the same, or jax was
        used before.

    Example:
      ```python
      import elastic_lm as el

      assert el.start_processes(processes=1) == 1  # with more of them, each runs this line
      ```
    """
    place = find_place(coordinator, processes, process, timeout)
    if place is None or place.processes == 1:
        return 1

    import jax

    if jax.distributed.is_initialized():
        return jax.process_count()
    _require_unused_backend()
    deadline = time.monotonic() + timeout
    meet(place, deadline)

    # On CPUs gloo carries what processes tell each other, and programs run one after the other: of two at
    # once, one process could begin the one, and another process the other, and both would wait.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if str(getattr(jax.config, "jax_platforms", "")).startswith("cpu"):
        # Threads of XLA; one that waits for another process may not keep the rest of a program from running.
        os.environ.setdefault("NPROC", str(max(THREADS, os.cpu_count() or 1)))
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=None if place.devices is None else list(place.devices),
        cluster_detection_method="deactivate",
        initialization_timeout=max(30, int(deadline - time.monotonic())),
    )
    return jax.process_count()


def find_place(
    coordinator: str | None, processes: int | None, process: int | None, timeout: float
) -> Place | None:
    """What `start_processes` was told, what the variables say, or what jax finds; None = one process.

    Raises:
      ValueError: something is missing or wrong; names it.
    """
    coordinator = coordinator or os.environ.get(COORDINATOR) or os.environ.get(JAX_COORDINATOR)
    processes = _number(PROCESSES) if processes is None else processes
    process = _number(PROCESS) if process is None else process
    require(timeout > 0, "timeout", timeout, "must be seconds above 0")
    require(processes is None or is_whole(processes, 1), "processes", processes, "must be at least 1")
    if processes == 1:
        require(process in (None, 0), "process", process, "is the number of one among processes=1, from 0")
        return None

    detected = None
    if None in (coordinator, processes, process):
        detected = _detected(coordinator, timeout)
        if detected is None and coordinator is None and processes is None and process is None:
            return None
    if detected is not None:
        place = dataclasses.replace(
            detected,
            coordinator=coordinator or detected.coordinator,
            processes=detected.processes if processes is None else processes,
            process=detected.process if process is None else process,
        )
    else:
        given = {"coordinator": coordinator, "processes": processes, "process": process}
        for name, value in given.items():
            fix = "is not given: name coordinator (HOST:PORT of process 0), processes and process, or none"
            require(value is not None, name, value, fix)
        place = Place(str(coordinator), int(processes or 0), int(process or 0))

    last = place.processes - 1
    fix = f"must be a number from 0 to {last}, of processes={place.processes}"
    require(is_whole(place.process, 0, last), "process", place.process, fix)
    _address(place.coordinator)
    return place


def more_than_one() -> str:
    """How the environment says that this is one of several processes, in words; "" = it does not.

    Nothing is asked over a network, and jax is not imported. ELASTIC_LM_PROCESSES=1 overrules a cluster.
    """
    if os.environ.get(PROCESSES) == "1":
        return ""
    for name, also in (
        (PROCESSES, ()),
        ("SLURM_NTASKS", ("SLURM_STEP_NODELIST", "SLURM_PROCID")),
        ("OMPI_COMM_WORLD_SIZE", ()),
    ):
        text = os.environ.get(name, "")
        if text.isdigit() and int(text) > 1 and all(other in os.environ for other in also):
            return f"{name}={text}"
    for name in HOSTS:
        if "," in (text := os.environ.get(name, "")):
            return f"{name}={text[:40]}"
    slices = _number_or_0(SLICES)
    return f"{SLICES}={slices}" if slices > 1 else ""


def slice_of_several() -> str:
    """How a Cloud TPU VM says that it is one of several of a slice, in words; "" = it does not.

    Its metadata server is asked, on machines that have TPUs.
    """
    if any(os.environ.get(name) for name in (PROCESSES, *HOSTS)) or "TPU_SKIP_MDS_QUERY" in os.environ:
        return ""
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not _may_have_tpus():
        return ""
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return "this machine's TPU slice" if running_in_cloud_tpu_vm and _has_workers() else ""


def _number(variable: str) -> int | None:
    """A whole number from the environment; None = it is not set."""
    text = os.environ.get(variable)
    if not text:
        return None
    require(text.isdigit(), variable, text, "must be a whole number")
    return int(text)


def _address(coordinator: str) -> tuple[str, int]:
    """Host and port of HOST:PORT."""
    host, colon, port = coordinator.rpartition(":")
    right = bool(colon and host and port.isdigit() and 0 < int(port) < 65536)
    require(right, "coordinator", coordinator, "must be HOST:PORT, the address of process 0 and a free port")
    return host.strip("[]"), int(port)


def _require_unused_backend() -> None:
    from jax._src import xla_bridge

    if xla_bridge.backends_are_initialized():
        raise ValueError("start_processes() comes too late: call it before anything that uses jax's devices")


def _detected(coordinator: str | None, timeout: float) -> Place | None:
    """The place that a cluster gives this process, by jax's detection; None = it is alone."""
    if not _in_cluster():
        return None
    from jax._src import clusters

    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            coordinator, None, None, None, None, max(1, int(timeout))
        )
    except Exception as error:
        raise ValueError(
            f"this is a process of a cluster whose others jax cannot find ({' '.join(str(error).split())}); "
            "give --coordinator HOST:PORT, --processes and --process, or --processes 1 to run alone"
        ) from error
    address, processes, process, devices = found
    if address is None or processes is None or process is None:
        # Open MPI 5 no longer says where its first process is.
        require(
            not more_than_one() or coordinator is not None,
            "coordinator",
            coordinator,
            f"{more_than_one()}, and nothing says where process 0 is: give HOST:PORT, or --processes 1",
        )
        processes, process = _number("OMPI_COMM_WORLD_SIZE"), _number("OMPI_COMM_WORLD_RANK")
        if coordinator is None or processes is None or process is None:
            return None
        return Place(coordinator, processes, process)
    # jax gives every process one GPU. One that is alone on its machine has all of them.
    alone = _tasks_per_node() == {1}
    return Place(address, processes, process, None if devices is None or alone else tuple(devices))


def _may_have_tpus() -> bool:
    """Whether there are devices as TPUs are seen; where there are none, jax is not imported to find out."""
    return any(map(os.path.exists, ("/dev/accel0", "/dev/vfio")))


def _in_cluster() -> bool:
    """Whether there is reason to ask jax, which may ask a server of the cluster."""
    if more_than_one():
        return True
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return not any(os.environ.get(name) for name in HOSTS)
    return bool(slice_of_several())


def _number_or_0(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else 0


def _has_workers() -> bool:
    """Whether the server of a Cloud TPU VM knows of other machines. Colab has TPUs and no such server."""
    if "," in _metadata("worker-network-endpoints"):
        return True
    slices = re.search(r"MEGASCALE_NUM_SLICES\W+(\d+)", _metadata("tpu-env"))
    return slices is not None and int(slices[1]) > 1


def _metadata(key: str) -> str:
    """What the metadata server of a Google Cloud VM says; "" = there is none."""
    import http.client
    import urllib.request

    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    place = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(place, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _tasks_per_node() -> set[int]:
    """The numbers of tasks that Slurm has put on a machine, from text like "8(x2),4"; empty = not Slurm."""
    text = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = [part.partition("(")[0] for part in text.split(",")]
    return {int(count) for count in counts if count.isdigit()}


def meet(place: Place, deadline: float) -> None:
    """Waits until all processes have come and agree on how many they are.

    Args:
      place: of this process.
      deadline: on `time.monotonic`, by which they must have come.

    Raises:
      OSError: the port is taken, process 0 cannot be reached, or processes are missing.
      ValueError: they disagree.
    """
    if place.process == 0:
        _receive(place, deadline)
    else:
        _greet(place, deadline)


def _receive(place: Place, deadline: float) -> None:
    """Process 0: takes the greetings of all others, and tells each of them whether all is well."""
    _, port = _address(place.coordinator)
    try:
        server = _server(port)
    except OSError as error:
        raise OSError(
            f"--coordinator {place.coordinator}: port {port} of this machine cannot be used "
            f"({error.strerror}): another program has it, or an earlier run still does; choose another port"
        ) from error

    here: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as open_:
        open_.enter_context(server)
        trouble = ""
        while not trouble and len(here) < place.processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = [i for i in range(1, place.processes) if i not in here]
                trouble = _missing(place, missing)
                break
            open_.enter_context(connection)
            greeting = _read(connection, 5.0)
            if greeting is None or greeting.get("greeting") != GREETING:
                _say(connection, {"error": f"process 0 is another version of elastic_lm ({GREETING})"})
                continue  # of another program
            trouble = _disagreement(place, greeting, here)
            if trouble:
                _say(connection, {"error": trouble})
            else:
                here[greeting["process"]] = connection
        for connection in here.values():
            _say(connection, {"error": trouble} if trouble else {"go": True})
        if trouble:
            raise (OSError if "did not come" in trouble else ValueError)(trouble)
        # Those who came leave first, so that the port is free at once.
        for connection in here.values():
            _read(connection, 2.0)


def _missing(place: Place, missing: list[int]) -> str:
    named = ", ".join(map(str, missing[:8])) + (" and others" if len(missing) > 8 else "")
    which = "process" if len(missing) == 1 else "processes"
    return (
        f"{which} {named} of {place.processes} did not come to {place.coordinator} in time; start them with "
        "the same --coordinator and --processes, or give them longer (--start-timeout)"
    )


def _disagreement(place: Place, greeting: Mapping[str, Any], here: Mapping[int, Any]) -> str:
    """What is wrong with a process that has come, in words; "" = nothing."""
    process, processes = greeting.get("process"), greeting.get("processes")
    if processes != place.processes:
        return (
            f"--processes {place.processes} in process 0, and {processes} in process {process}: give all of "
            "them the same number"
        )
    if not is_whole(process, 1, place.processes - 1) or process in here:
        return f"--process {process}: two processes have this number; give each its own, from 0"
    versions = _versions()
    if greeting.get("versions") != versions:
        return (
            f"process 0 runs {versions}, and process {process} {greeting.get('versions')}: install the same "
            "versions everywhere"
        )
    return ""


def _greet(place: Place, deadline: float) -> None:
    """Any other process: says which one it is, and waits for the word of process 0."""
    host, port = _address(place.coordinator)
    hello = {"greeting": GREETING, "process": place.process, "processes": place.processes}
    hello["versions"] = _versions()
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((host, port), timeout=min(left, 10.0))
        except OSError as error:  # process 0 may not have begun yet, and names may not be known yet
            reason = error.strerror or str(error)
            time.sleep(AGAIN)
            continue
        with connection:
            _say(connection, hello)
            # Process 0 answers when its own time is over, at the latest.
            answer = _read(connection, max(left, 1.0) + 5.0)
        if answer is None:  # another program, or the end of an earlier run
            reason = "it ended the connection"
            time.sleep(AGAIN)
            continue
        if "error" in answer:
            raise ValueError(str(answer["error"]))
        return
    raise OSError(
        f"--coordinator {place.coordinator}: process {place.process} cannot reach process 0 there "
        f"({reason}): start it, name its address and port everywhere, or give it longer (--start-timeout)"
    )


def _server(port: int) -> socket.socket:
    """A socket that takes connections from everywhere, as jax's own will."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _versions() -> str:
    import jax

    import elastic_lm

    return f"elastic-lm {elastic_lm.__version__} with jax {jax.__version__}"


def _say(connection: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection: socket.socket, seconds: float) -> dict[str, Any] | None:
    """A message; None = the other side has left, or says something else."""
    connection.settimeout(seconds)
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < LONGEST:
            piece = connection.recv(LONGEST)
            if not piece:
                return None
            text += piece
        message = json.loads(text)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
