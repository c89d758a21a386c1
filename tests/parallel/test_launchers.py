"""Each launcher's environment, as the real one sets it, gives the process's place; half of one is an error that says what to do.

Slurm's and Open MPI 4's variables are those of slurm 22.05 and mpirun 4.1.4; Open MPI 5's those of jax issue 14576; xpk's of its
GPU workloads; Kubernetes' of an Indexed Job with a headless service; torchrun's of torch.distributed.elastic.
"""

import re

import pytest

from jaxlm.parallel import launchers
from jaxlm.parallel.launchers import LaunchError, Place, find_place, first_host, port_of

SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "gpu[07-09]-ib",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09]-ib",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
# What a batch script itself sees: it is one process, and no task of a step.
SLURM_SCRIPT = {
    name: value for name, value in (SLURM | {"SLURM_PROCID": "0"}).items() if "STEP" not in name
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_MCA_orte_hnp_uri": "1429340160.0;tcp://10.96.0.1,10.148.0.1:33435;tcp6://[fd00::2]:51179",
    "PMIX_NAMESPACE": "1429340161",
}
ON_TWO_NODES = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
OPEN_MPI_5 = {
    name: value for name, value in ON_TWO_NODES.items() if name != "OMPI_MCA_orte_hnp_uri"
} | {"PMIX_NAMESPACE": "prterun-node1-10017@1"}
TORCHRUN = {
    "WORLD_SIZE": "4",
    "RANK": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
XPK = {
    "JOB_COMPLETION_INDEX": "1",
    "NNODES": "2",
    "NODE_RANK": "1",
    "JAX_COORDINATOR_ADDRESS": "run-slice-job-0-0.run",
    "JAX_COORDINATOR_PORT": "6002",
}
POD = {"JOB_COMPLETION_INDEX": "3", "HOSTNAME": "train-3.pods.default.svc.cluster.local"}

slurm_port, mpi_port = port_of("1234.0"), port_of("1429340161")
PLACES = {
    "Slurm": (SLURM, Place("Slurm", 6, 5, f"gpu07-ib:{slurm_port}", 1, 2)),
    "Open MPI, one machine": (OPEN_MPI, Place("Open MPI", 4, 3, f"127.0.0.1:{mpi_port}", 3, 4)),
    "Open MPI, two": (ON_TWO_NODES, Place("Open MPI", 4, 3, f"10.96.0.1:{mpi_port}", 1, 2)),
    "Open MPI, IPv6": (
        ON_TWO_NODES | {"OMPI_MCA_orte_hnp_uri": "15.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"},
        Place("Open MPI", 4, 3, f"[fe80::b9b:ac5d]:{mpi_port}", 1, 2),
    ),
    "mpirun in a Slurm job": (
        SLURM_SCRIPT | OPEN_MPI_5,
        Place("Open MPI", 4, 3, f"gpu07-ib:{port_of('prterun-node1-10017@1')}", 1, 2),
    ),
    "torchrun": (TORCHRUN, Place("torchrun", 4, 2, "node1:29501", 0, 2)),
    "torchrun by srun": (SLURM | TORCHRUN, Place("torchrun", 4, 2, "node1:29501", 0, 2)),
    "Kubeflow": (
        {
            name: value
            for name, value in TORCHRUN.items()
            if not name.startswith(("LOCAL", "TORCH"))
        },
        Place("torchrun", 4, 2, "node1:29500"),
    ),
    "xpk on GPUs": (XPK, Place("xpk", 2, 1, "run-slice-job-0-0.run:6002", 0, 1)),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_launcher_says_which_process_this_is(name):
    environ, place = PLACES[name]
    assert find_place(environ) == place


def test_an_indexed_job_is_found_with_the_number_of_its_pods():
    place = find_place(POD, num_processes=8)
    assert place == Place("Kubernetes", 8, 3, "train-0.pods.default.svc.cluster.local:8476")


def test_no_launcher_and_a_launcher_of_one_process_are_alone():
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert find_place({}) is None
    assert find_place(SLURM | one) is None  # `srun --pty`, salloc's shell
    assert find_place(SLURM_SCRIPT | {"SLURM_NTASKS": "1"}) is None
    for environ in (SLURM_SCRIPT, POD, TORCHRUN):
        assert find_place(environ, num_processes=1) is None


def test_flags_need_no_launcher_and_replace_what_it_says():
    flags = dict(coordinator="a:1", num_processes=2, process_id=1)
    assert find_place({}, **flags) == Place("flags", 2, 1, "a:1")
    assert find_place(SLURM | TORCHRUN, **flags) == Place("flags", 2, 1, "a:1")
    assert find_place(SLURM, coordinator="b:9").coordinator == "b:9"


def test_processes_of_one_job_agree_on_a_port_and_jobs_differ():
    places = [find_place(SLURM | {"SLURM_PROCID": str(i)}) for i in range(6)]
    assert len({place.coordinator for place in places}) == 1
    assert {place.process_id for place in places} == set(range(6))
    assert port_of("1234.0") != port_of("1234.1")
    assert all(61440 <= port_of(str(job)) <= 65535 for job in range(100))


WRONG = {
    "srun forgotten": (SLURM_SCRIPT, {}, "not started by srun", "srun python"),
    "half of Slurm": (
        {k: v for k, v in SLURM.items() if k != "SLURM_PROCID"},
        {},
        "SLURM_PROCID is not set",
        "unset",
    ),
    "no number": (TORCHRUN | {"RANK": "two"}, {}, "RANK='two' is no number", "--coordinator"),
    "half of torchrun": (
        {"WORLD_SIZE": "2"},
        {},
        "RANK is not set; MASTER_PORT is not set",
        "unset",
    ),
    "two that disagree": (
        OPEN_MPI | TORCHRUN,
        {},
        "process 3 of 4; torchrun: process 2 of 4",
        "one l",
    ),
    "Open MPI 5 on two machines": (OPEN_MPI_5, {}, "does not say where rank 0", "--coordinator"),
    "a pod among unknown many": (POD, {}, "does not say how many", "--num_processes"),
    "a pod without a service": (
        POD | {"HOSTNAME": "train-3-x7k2p"},
        {"num_processes": 4},
        "headless service",
        "--coordinator",
    ),
    "some flags": ({}, {"num_processes": 2}, "--num_processes=2", "--coordinator=… --process_id=…"),
    "a number too large": (
        {},
        {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
        "process_id 2: 0 to 1",
        "",
    ),
    "a coordinator without a port": (
        {},
        {"coordinator": "a", "num_processes": 2, "process_id": 0},
        "HOST:PORT",
        "",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_half_of_an_environment_is_an_error_that_says_what_to_change(name):
    environ, flags, found, change = WRONG[name]
    with pytest.raises(LaunchError, match=re.escape(found)) as error:
        find_place(environ, **flags)
    assert change in str(error.value)


def test_the_first_host_of_slurms_lists():
    lists = {
        "node001": "node001",
        "node001,host2": "node001",
        "node[001-015],host2": "node001",
        "node[007,010-015],host2": "node007",
        "gpu[07-09,12]-ib,login": "gpu07-ib",
        "rack[1-2]n[3-4]": "rack1n3",
    }
    assert {text: first_host(text) for text in lists} == lists


def test_processes_of_one_machine_share_its_gpus(monkeypatch):
    share = lambda index, visible: launchers.share_of_gpus(
        Place("Slurm", 8, index, "a:1", index, 4), {"CUDA_VISIBLE_DEVICES": visible}
    )
    assert [share(i, "0,1,2,3") for i in range(4)] == [[0], [1], [2], [3]]
    assert share(1, "0,1,2,3,4,5,6,7") == [2, 3]
    assert share(3, "5") is None  # the launcher has bound it
    with pytest.raises(LaunchError, match="4 processes and 3 GPUs"):
        share(0, "0,1,2")
    whole_machine = Place("Slurm", 2, 1, "a:1", 0, 1)
    assert launchers.share_of_gpus(whole_machine, {"CUDA_VISIBLE_DEVICES": "0,1"}) is None


def test_workers_of_a_tpu_slice_are_counted_where_there_are_chips(monkeypatch):
    """On GKE by variables, on a TPU VM by its metadata; the pods around them are Kubernetes' affair."""
    gke = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1", "JOB_COMPLETION_INDEX": "1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "has_tpu_chips", lambda: True)
        said = {"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2", "tpu-env": ""}
        patch.setattr(launchers, "tpu_metadata", said.get)
        assert find_place(gke) == Place("GKE's TPUs", 4, None, "")
        assert find_place(gke | {"MEGASCALE_NUM_SLICES": "2"}).num_processes == 8
        assert find_place({}) == Place("the TPU VM", 2, None, "")
        said["tpu-env"] = "ZONE: 'a'\nMEGASCALE_NUM_SLICES: '4'\n"
        assert find_place({}).num_processes == 8
        assert find_place({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
        assert find_place({"TPU_SKIP_MDS_QUERY": "1"}) is None
        assert find_place({"JAX_PLATFORMS": "cpu"}) is None
    monkeypatch.setattr(launchers, "has_tpu_chips", lambda: False)
    assert find_place({"TPU_WORKER_HOSTNAMES": "a,b"}) is None
