"""Which place a launcher gave this process among those of one run, read from the environment that it set.

    Slurm         srun             SLURM_STEP_NODELIST SLURM_STEP_NUM_TASKS SLURM_PROCID SLURM_LOCALID    (man srun)
    Open MPI      mpirun           OMPI_COMM_WORLD_SIZE _RANK _LOCAL_RANK _LOCAL_SIZE, 4.x also OMPI_MCA_orte_hnp_uri
    torchrun      torchrun, Kubeflow   WORLD_SIZE RANK LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
    xpk           xpk on GPUs      NNODES NODE_RANK JAX_COORDINATOR_ADDRESS JAX_COORDINATOR_PORT
    Kubernetes    an Indexed Job   JOB_COMPLETION_INDEX HOSTNAME; how many there are, nobody says: --num_processes
    TPU           GKE or a TPU VM  TPU_WORKER_HOSTNAMES TPU_WORKER_ID MEGASCALE_*, or the VM's metadata: jax reads these

Each launcher is a function of the environment alone that returns a `Place`, or None where there is nothing of it. What is
half there is an error: a process that took itself for the only one would train a model of its own over the others'.
"""

from __future__ import annotations

import glob
import importlib.util
import re
import socket
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """A process among those of one run.

    launcher: who says so. coordinator: 'host:port' of process 0, '' if jax finds it out (TPU). process_id: 0 to
    num_processes - 1; None where jax finds it out. local_id, local_count: among the processes of this machine; count 0: unknown.
    """

    launcher: str
    num_processes: int
    process_id: int | None
    coordinator: str
    local_id: int = 0
    local_count: int = 0


class LaunchError(ValueError):
    """The environment or the flags do not say which process this is; the message says what to change."""


def find_place(
    environ: Environment,
    *,
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place | None:
    """The place of this process; None if it is alone.

    coordinator, num_processes, process_id: the flags. All of them need no launcher, num_processes=1 is alone, and what is
    given of them replaces what the launcher says.

    Raises:
      LaunchError: for a launcher that says half of it, two that disagree, or numbers that do not fit.
    """
    if num_processes == 1 and not process_id:
        return None
    if coordinator and num_processes is not None and process_id is not None:
        return _checked(Place("flags", num_processes, process_id, coordinator))
    flags = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    given = {name: value for name, value in flags.items() if value not in ("", None)}
    found = [place for find in LAUNCHERS.values() if (place := find(environ, given))]
    if not found:
        if given:
            raise LaunchError(
                f"found: {_flags(given)}, and no launcher's environment ({', '.join(LAUNCHERS)})\n"
                f"expected: all of --coordinator=HOST:PORT --num_processes=N --process_id=I\n"
                f"change: add {_flags(dict.fromkeys(flags.keys() - given.keys(), '…'))}"
            )
        return None
    place = replace(_innermost(found), **given)
    return _checked(place) if place.num_processes > 1 else None


TPU_ON_GKE, TPU_VM = "GKE's TPUs", "the TPU VM"
TPU_FILES = (
    "/dev/accel*",
    "/dev/vfio/[0-9]*",
)  # what the kernel shows of chips up to v4, and since v5

# The launchers that may be around another: `mpirun` in a Slurm job, TPU workers and torchrun in Kubernetes' pods. The
# numbers of those around it are of machines or pods, and may well be others.
AROUND = {
    TPU_ON_GKE: ("xpk", "Kubernetes"),
    "torchrun": ("Slurm", "xpk", "Kubernetes"),
    "Open MPI": ("Slurm", "xpk", "Kubernetes"),
    "xpk": ("Kubernetes",),
}


def _innermost(found: list[Place]) -> Place:
    around = {outer for place in found for outer in AROUND.get(place.launcher, ())}
    inner = [place for place in found if place.launcher not in around]
    if len({(place.num_processes, place.process_id) for place in inner}) > 1:
        says = "; ".join(
            f"{place.launcher}: process {place.process_id} of {place.num_processes}"
            for place in inner
        )
        raise LaunchError(
            f"found: launchers that disagree: {says}\n"
            "expected: one of them\n"
            "change: start with one launcher, or say it all with --coordinator --num_processes --process_id"
        )
    return inner[0]


def _checked(place: Place) -> Place:
    problems = []
    number, total = place.process_id, place.num_processes
    if total < 1:
        problems.append(f"num_processes {total}: 1 or more")
    if number is not None and not 0 <= number < total:
        problems.append(f"process_id {number}: 0 to {total - 1}, as there are {total} processes")
    if place.coordinator and not re.fullmatch(r".+:\d+", place.coordinator):
        problems.append(
            f"coordinator {place.coordinator!r}: HOST:PORT, of the machine of process 0"
        )
    if problems:
        raise LaunchError(f"found ({place.launcher}): " + "; ".join(problems))
    return place


def _flags(given: Mapping[str, object]) -> str:
    return " ".join(f"--{name}={value}" for name, value in sorted(given.items()))


# ---------------------------------------------------------------- the launchers


def find_slurm(environ: Environment, given: Mapping[str, object]) -> Place | None:
    """A task of `srun`. A job without a step has several tasks and this is none of them: `srun` was forgotten."""
    if "SLURM_JOB_ID" not in environ:
        return None
    job, tasks = environ["SLURM_JOB_ID"], environ.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_NUM_TASKS" not in environ:
        if tasks == "1" or any(
            inner in environ for inner in ("OMPI_COMM_WORLD_SIZE", "WORLD_SIZE")
        ):
            return None
        raise LaunchError(
            f"found: Slurm job {job} of {tasks} tasks, but this process is not started by srun\n"
            "expected: one process for each task\n"
            "change: start it as `srun python -m jaxlm…`, or alone with --num_processes=1"
        )
    wanted = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    numbers = _need("Slurm", environ, wanted, ("SLURM_STEP_NODELIST",))
    first, step = first_host(environ["SLURM_STEP_NODELIST"]), environ.get("SLURM_STEP_ID", "0")
    return Place(
        "Slurm",
        numbers["SLURM_STEP_NUM_TASKS"],
        numbers["SLURM_PROCID"],
        f"{first}:{port_of(f'{job}.{step}')}",
        numbers["SLURM_LOCALID"],
        tasks_here(environ),
    )


def first_host(nodelist: str) -> str:
    """The first of Slurm's compressed list: 'gpu[07-09,12]-ib,login' -> 'gpu07-ib'."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def tasks_here(environ: Environment) -> int:
    """How many tasks of the step run on this node, from '4(x2),3' and the node's number; 0 if Slurm does not say."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else 0


def find_open_mpi(environ: Environment, given: Mapping[str, object]) -> Place | None:
    """A rank of `mpirun`. Version 5 no longer says where rank 0 is: on one machine, by Slurm, or by --coordinator."""
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    names = ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    numbers = _need("Open MPI", environ, [f"OMPI_COMM_WORLD_{name}" for name in names])
    size, rank, local_size, local_rank = numbers.values()
    job = environ.get("PMIX_NAMESPACE") or environ.get("OMPI_MCA_ess_base_jobid", "")
    # Of 4.x: '1531576320.0;tcp://10.96.0.1,10.148.0.1:34911' or '…;tcp6://[fe80::b9b]:43370', where mpirun itself runs.
    uri = re.search(
        r"tcp://([0-9.]+)|tcp6://(\[[0-9a-fA-F:]+)", environ.get("OMPI_MCA_orte_hnp_uri", "")
    )
    if size == local_size:
        host = "127.0.0.1"
    elif nodes := environ.get("SLURM_JOB_NODELIST"):
        host = first_host(nodes)
    elif uri:
        host = uri[1] or f"{uri[2]}]"
    elif "coordinator" in given:
        host = ""
    else:
        raise LaunchError(
            f"found: Open MPI, rank {rank} of {size} on several machines, which does not say where rank 0 runs\n"
            "change: add --coordinator=HOST:PORT, the machine of rank 0"
        )
    return Place("Open MPI", size, rank, f"{host}:{port_of(job)}", local_rank, local_size)


def find_torchrun(environ: Environment, given: Mapping[str, object]) -> Place | None:
    """The place that torchrun's variables say; None where it did not start this process."""
    if "WORLD_SIZE" not in environ:
        return None
    numbers = _need("torchrun", environ, ("WORLD_SIZE", "RANK", "MASTER_PORT"), ("MASTER_ADDR",))
    # torchrun's agent itself listens on MASTER_PORT.
    port = numbers["MASTER_PORT"] + (environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")
    local_id, local_count = (
        int(environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    where = f"{environ['MASTER_ADDR']}:{port}"
    return Place("torchrun", numbers["WORLD_SIZE"], numbers["RANK"], where, local_id, local_count)


def find_xpk(environ: Environment, given: Mapping[str, object]) -> Place | None:
    """The place that xpk's variables say; None where it did not start this process."""
    if "JAX_COORDINATOR_ADDRESS" not in environ or "NNODES" not in environ:
        return None
    numbers = _need("xpk", environ, ("NNODES", "NODE_RANK"))
    host, _, port = environ["JAX_COORDINATOR_ADDRESS"].partition(":")
    where = f"{host}:{port or environ.get('JAX_COORDINATOR_PORT', PORT)}"
    return Place("xpk", numbers["NNODES"], numbers["NODE_RANK"], where, 0, 1)


def find_kubernetes(environ: Environment, given: Mapping[str, object]) -> Place | None:
    """A pod of an Indexed Job with a headless service: pod I is called JOB-I, and JOB-0.SERVICE is found by its name.

    (kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication)
    """
    if "JOB_COMPLETION_INDEX" not in environ:
        return None
    index = _need("Kubernetes", environ, ("JOB_COMPLETION_INDEX",))["JOB_COMPLETION_INDEX"]
    if any(inner in environ for inner in ("TPU_WORKER_HOSTNAMES", "NNODES", "WORLD_SIZE")):
        return None  # they count, and Kubernetes does not
    if "num_processes" not in given:
        raise LaunchError(
            f"found: Kubernetes, pod {index} of an Indexed Job, which does not say how many there are\n"
            "change: add --num_processes=N, the job's `completions`; alone: --num_processes=1"
        )
    pod, _, domain = environ.get("HOSTNAME", socket.gethostname()).partition(".")
    job = pod.removesuffix(f"-{index}")
    domain = domain or socket.getfqdn().partition(".")[2]
    if "coordinator" not in given and (job == pod or not domain):
        raise LaunchError(
            f"found: Kubernetes, pod {index} called {pod!r} in the domain {domain!r}\n"
            f"expected: a pod JOB-{index} in the domain of a headless service (the pod template's `subdomain`)\n"
            "change: give the Job a headless service, or add --coordinator=HOST:PORT of pod 0"
        )
    return Place("Kubernetes", int(str(given["num_processes"])), index, f"{job}-0.{domain}:{PORT}")


def find_tpu(environ: Environment, given: Mapping[str, object]) -> Place | None:
    """A worker of a TPU slice, or of several; which one it is, jax's own detection finds out."""
    platforms = environ.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in platforms.split(",") or not has_tpu_chips():
        return None
    names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    slices, launcher = environ.get("MEGASCALE_NUM_SLICES"), TPU_ON_GKE
    if names is None and environ.get("TPU_SKIP_MDS_QUERY") is None:
        names, launcher = tpu_metadata("worker-network-endpoints"), TPU_VM
        if said := re.search(r"MEGASCALE_NUM_SLICES: '(\d+)'", tpu_metadata("tpu-env") or ""):
            slices = said[1]
    if not names:
        return None
    return Place(launcher, len(names.split(",")) * int(slices or 1), None, "")


def has_tpu_chips() -> bool:
    """Whether libtpu is installed and the kernel shows chips."""
    return any(map(glob.glob, TPU_FILES)) and importlib.util.find_spec("libtpu") is not None


def tpu_metadata(key: str) -> str | None:
    """An attribute of a TPU VM from Google's metadata server; None on a machine that has no such server."""
    url = f"http://metadata.google.internal/computeMetadata/v1/instance/attributes/{key}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as reply:
            return reply.read().decode()
    except OSError:
        return None


# The inner ones first.
LAUNCHERS: dict[str, Callable[[Environment, Mapping[str, object]], Place | None]] = {
    "TPU": find_tpu,
    "Open MPI": find_open_mpi,
    "torchrun": find_torchrun,
    "Slurm": find_slurm,
    "xpk": find_xpk,
    "Kubernetes": find_kubernetes,
}

PORT = 8476  # of a machine that one run has for itself


def port_of(job: str) -> int:
    """A port above Linux's ephemeral ones that all processes of a job agree on, and that two jobs seldom share."""
    return 61440 + zlib.crc32(job.encode()) % 4096


def _need(
    launcher: str,
    environ: Environment,
    numbers: tuple[str, ...] | list[str],
    texts: tuple[str, ...] = (),
) -> dict[str, int]:
    """The numbers among the variables, or one error with all that are missing or are no numbers."""
    problems = [f"{name} is not set" for name in (*numbers, *texts) if name not in environ]
    problems += [
        f"{name}={environ[name]!r} is no number"
        for name in numbers
        if name in environ and not environ[name].isdecimal()
    ]
    if problems:
        present = [f"{n}={environ[n]}" for n in (*numbers, *texts) if n in environ]
        raise LaunchError(
            f"found: half of {launcher}'s variables ({', '.join(present)})\n"
            f"expected: all of them; {'; '.join(problems)}\n"
            "change: start with the launcher, unset what is left of it, or say it all with --coordinator "
            "--num_processes --process_id"
        )
    return {name: int(environ[name]) for name in numbers}


def share_of_gpus(place: Place, environ: Environment) -> list[int] | None:
    """Which of this machine's NVIDIA GPUs are this process's, where several processes share it; None: all that it sees.

    Raises:
      LaunchError: the processes of the machine cannot share its GPUs evenly.
    """
    if place.local_count < 2:
        return None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    total = len(visible.split(",")) if visible else len(glob.glob("/dev/nvidia[0-9]*"))
    if visible == "" or total <= 1:  # none, or the launcher has shared them out already
        return None
    if total % place.local_count:
        raise LaunchError(
            f"found: {place.local_count} processes and {total} GPUs on this machine\n"
            "change: start one process a machine, or one for each GPU"
        )
    each = total // place.local_count
    return list(range(place.local_id * each, (place.local_id + 1) * each))
