"""A run of several processes: their start, the places where they wait for one another, and their end.

    with processes.joined(…flags…):          before any device is touched
        with processes.main_first("data"):   process 0 makes what all read, the others wait
            …
        if processes.is_main():              what is written or printed once
            …

All processes run the same jitted programs in the same order; process 0 alone prints and writes, except checkpoints, of which
each process writes its shards. If one of them ends before the run does, the others end with the exit status PEER_LOST
within the heartbeat timeout: they would wait for it forever. The same command on all goes on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.exits import FAILED, PEER_LOST, RunError, message_of
from jaxlm.parallel.launchers import (
    TPU_ON_GKE,
    TPU_VM,
    LaunchError,
    Place,
    find_place,
    share_of_gpus,
)
from jaxlm.private import redact

log = logging.getLogger("jaxlm")

_FOREVER_MS = 365 * 86_400_000
_TOGETHER_MS = 10_000
_counts: Counter[str] = Counter()


@contextlib.contextmanager
def joined(**options: Any) -> Iterator[Place | None]:
    """`start` and, around what is run, an end without a hang: options as of `start`."""
    try:
        place = start(**options)
    except LaunchError as error:
        sys.exit(str(error))
    if place is None:
        yield None
        return
    watch = _Watch()
    try:
        yield place
        watch.close()
        jax.distributed.shutdown()
    except RunError as error:
        watch.end_together()
        _end(error, error.status)
    except SystemExit as error:
        _end(error, error.code if isinstance(error.code, int) else FAILED)
    except BaseException as error:
        _end(error, FAILED)


def start(
    *,
    coordinator: str = "",
    num_processes: int | None = None,
    process_id: int | None = None,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 30,
) -> Place | None:
    """Joins the other processes of the run, if there are any; afterwards `jax.devices()` are those of all of them.

    coordinator, num_processes, process_id: where no launcher says it (see `launchers`).
    initialization_timeout: seconds to wait for the others. heartbeat_timeout: seconds after which a silent one is gone.

    Returns this process's place, None if it is alone.

    Raises:
      LaunchError: neither flags nor the environment say which process this is, or the coordinator's port is taken.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    place = find_place(os.environ, **given)  # type: ignore[arg-type]
    if place is None:
        return None
    if not os.environ.get("JAX_CPU_COLLECTIVES_IMPLEMENTATION"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    number = "a process" if place.process_id is None else f"process {place.process_id}"
    say = f"{place.launcher}: {number} of {place.num_processes}"
    if not place.process_id:
        log.info("%s, coordinator %s", say, place.coordinator or "found by jax")
    timer = threading.Timer(
        initialization_timeout,
        _leave,
        (
            f"{say}, but not all came together at {place.coordinator or 'the coordinator'} within "
            f"{initialization_timeout} s: are all of them started, with the same numbers, and can they reach that "
            f"address? (--initialization_timeout, --coordinator; exit status {PEER_LOST})\n",
            PEER_LOST,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            initialization_timeout=initialization_timeout + 60,  # where XLA would abort
            heartbeat_timeout_seconds=heartbeat_timeout,
            **_arguments(place),
        )
    except RuntimeError as error:
        if "RPC server" not in str(error):
            raise
        raise LaunchError(
            f"{say}, which cannot listen at {place.coordinator}\n"
            "change: another run may have the port; give all processes another one by --coordinator=HOST:PORT"
        ) from error
    devices = jax.devices()  # the processes tell one another of theirs, so all must come here
    timer.cancel()
    if is_main():
        local = jax.local_device_count()
        log.info("%d processes, %d devices, %d of each", jax.process_count(), len(devices), local)
    else:
        log.setLevel(logging.WARNING)
    return place


def _arguments(place: Place) -> dict[str, Any]:
    found_by_jax = {TPU_ON_GKE: "gketpu", TPU_VM: "gcetpu"}
    if place.launcher in found_by_jax:
        return dict(cluster_detection_method=found_by_jax[place.launcher])
    return dict(
        coordinator_address=place.coordinator,
        num_processes=place.num_processes,
        process_id=place.process_id,
        local_device_ids=share_of_gpus(place, os.environ),
        cluster_detection_method="deactivate",
    )


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes."""
    return jax.process_index() == 0


def count() -> int:
    """How many processes the job has."""
    return jax.process_count()


def index() -> int:
    """The number of this process, from 0."""
    return jax.process_index()


def say_once(name: str, text: str) -> None:
    """Tells all processes that `hear` it. Of several that speak, the first is heard."""
    try:
        _client().key_value_set(f"jaxlm/{name}", text)
    except RuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def hear(name: str) -> str:
    """Waits for what `say_once` says, in a thread; '' if the run ends without a word."""
    try:
        return _client().blocking_key_value_get(f"jaxlm/{name}", _FOREVER_MS)
    except RuntimeError:
        return ""


def barrier(name: str) -> None:
    """Waits until all processes are here, however long it takes; no device is used. A process that is gone is an error."""
    if jax.process_count() == 1:
        return
    _counts[name] += 1
    _client().wait_at_barrier(f"jaxlm/{name}/{_counts[name]}", _FOREVER_MS)


def gather(name: str, text: str) -> list[str]:
    """What each process says, by its number; all must ask. No device is used."""
    if jax.process_count() == 1:
        return [text]
    _counts[name] += 1
    key, client = f"jaxlm/{name}/{_counts[name]}", _client()
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    return [
        client.blocking_key_value_get(f"{key}/{i}", _FOREVER_MS) for i in range(jax.process_count())
    ]


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """The block by process 0, then by the others at once: they find what it has made. No collective may be in it."""
    if not is_main():
        barrier(name)
    yield
    if is_main():
        barrier(name)


def meet(mesh: jax.sharding.Mesh) -> None:
    """Lets the devices of every group of the mesh exchange something once, all processes being here.

    Gloo, which is what CPUs have, connects a group when it is first used and gives up after 30 s: less than the time by
    which one process may be done compiling before another.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return
    barrier("meet")
    axes = [name for name, size in mesh.shape.items() if size > 1]
    groups = [g for n in range(1, len(axes) + 1) for g in itertools.combinations(axes, n)]
    sharding = NamedSharding(mesh, PartitionSpec(tuple(axes)))
    size = mesh.size
    ones = jax.make_array_from_callback((size,), sharding, lambda index: np.ones(size)[index])

    def exchange(x):
        return [jax.lax.psum(x, group) for group in groups]

    spec = sharding.spec
    exchanged = jax.shard_map(exchange, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    jax.block_until_ready(jax.jit(exchanged)(ones))


def fetch(tree: Any) -> Any:
    """`jax.device_get` of arrays that may lie on the devices of other processes; all processes must ask."""

    def get(x):
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.device_get(tree) if jax.process_count() == 1 else jax.tree.map(get, tree)


def is_peer_lost(error: BaseException | None) -> bool:
    """Whether an error says that another process is gone: of Gloo, NCCL or the coordination service, or caused by one."""
    while error is not None:
        if isinstance(error, (RuntimeError, ValueError)) and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


# What jaxlib raises as RuntimeError and, of Gloo on CPUs, as ValueError.
_LOST = re.compile(
    r"Gloo \w+ failed|NCCL|heartbeat timeout|coordination service|CoordinationService"
    r"|Connection (closed|reset) by peer|Barrier (failed|timed out)|Socket closed"
)


def _client() -> Any:
    from jax._src import distributed  # jax has no public name for it; Orbax takes it from here, too

    return distributed.global_state.client


class _Watch:
    """Ends this process as soon as the coordination service knows that another one is gone.

    XLA's own answer is to abort. A thread waits at a barrier that is complete when the run is, and that fails at once when
    a process is lost: the others' barrier lacks process 0 until it closes, and that of process 0 lacks the others.
    """

    def __init__(self):
        barriers = ["jaxlm/main has ended", "jaxlm/others have ended"]
        own, self.last = barriers if not is_main() else reversed(barriers)
        self.watching = True
        self.thread = threading.Thread(target=self._wait, args=(own,), daemon=True)
        self.thread.start()

    def _wait(self, name: str) -> None:
        try:
            _client().wait_at_barrier(name, _FOREVER_MS)
        except RuntimeError as error:
            if self.watching:
                _end(error, FAILED)

    def end_together(self) -> None:
        """All of the run ends by an error that is its own: waits a little for the others, so that each has its own status.

        One that is alone with its error leaves, and the others end because it is gone.
        """
        self.watching = False
        with contextlib.suppress(RuntimeError):
            _client().wait_at_barrier("jaxlm/ended by an error", _TOGETHER_MS)
            jax.distributed.shutdown()

    def close(self) -> None:
        """Waits for all processes to be here."""
        if is_main():
            _client().wait_at_barrier(self.last, _FOREVER_MS)
        self.thread.join()
        if not is_main():
            _client().wait_at_barrier(self.last, _FOREVER_MS)


def _end(error: BaseException, status: int) -> None:
    """Says why, and ends the process at once: jax's own way out would wait for processes that never come."""
    who = f"process {jax.process_index()} of {jax.process_count()}"
    if is_peer_lost(error):
        status = PEER_LOST
        text = (
            f"{who}: another process has ended or cannot be reached, so this one ends with status {status}; "
            f"the same command on all goes on from the newest checkpoint ({_first_line(error)})\n"
        )
    elif isinstance(error, SystemExit):
        text = f"{error.code}\n" if isinstance(error.code, str) else ""
    elif (message := message_of(error)) is not None:
        text = f"{who}: {message}\n"
    else:
        text = f"{who} failed:\n" + "".join(traceback.format_exception(error))
    _leave(text, status)


def _leave(text: str, status: int) -> None:
    with contextlib.suppress(OSError):
        os.write(2, redact(text).encode())  # at once: sys.stderr may be locked by another thread
        sys.stdout.flush()
    os._exit(status)


def _first_line(error: BaseException, shown: int = 200) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= shown else line[:shown] + "…"
