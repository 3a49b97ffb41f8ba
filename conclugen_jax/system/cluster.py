"""Which of several processes this one is, by the environment."""

import dataclasses
import os
import re
from collections.abc import Mapping

from conclugen_jax.errors import ConclugenError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


@dataclasses.dataclass(frozen=True)
class Place:
    """A process among all.

    Attributes:
      address: HOST:PORT of process 0.
      count: number of processes.
      index: number of this process, from 0.
      devices: numbers of its devices on this machine; ``None``: all.
    """

    address: str
    count: int
    index: int
    devices: list[int] | None = None

    @property
    def host(self) -> str:
        """Return the host of process 0, without the brackets of an IPv6 address."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Return the port of process 0."""
        return int(self.address.rpartition(":")[2])


def from_environment() -> Place:
    """Return the place of this process by our three variables, or else by those of Slurm or Open MPI.

    Raises:
      ConclugenError: the variables are missing, incomplete or contradictory.
    """
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    if given[COUNT] is None and given[INDEX] is None:
        place = _of_slurm(os.environ) or _of_open_mpi(os.environ)
        if place is None:
            raise ConclugenError(
                f"--distributed=auto: no cluster here; set {ADDRESS}=HOST:PORT of process 0, {COUNT} and {INDEX}, start it "
                "by Slurm (srun) or Open MPI (mpirun), or leave --distributed off"
            )
        return _checked(dataclasses.replace(place, address=given[ADDRESS] or place.address))
    for name, value in given.items():
        if value is None or (name != ADDRESS and not value.isdecimal()):
            raise ConclugenError(
                f"{name} is {value or 'not set'}; --distributed=auto needs {ADDRESS}=HOST:PORT of process 0, {COUNT} and "
                f"{INDEX}, from 0"
            )
    return _checked(Place(given[ADDRESS], int(given[COUNT]), int(given[INDEX])))


def _of_slurm(environment: Mapping[str, str]) -> Place | None:
    """Return the place of a task of ``srun``; like JAX, take one device a task and a port that follows from the job."""
    names = "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"
    if not all(name in environment for name in names):
        return None
    job, nodes, count, index, local = (environment[name] for name in names)
    host = re.sub(r"^([^,\[]*)(?:\[([^,\-\]]*))?.*", r"\1\2", nodes)  # of "node[007-012,015],other": node007
    return Place(f"{host}:{_port(int(job))}", int(count), int(index), [int(local)])


def _of_open_mpi(environment: Mapping[str, str]) -> Place | None:
    """Return the place of a process of ``mpirun``; its address is like ``1531576320.0;tcp://10.96.0.1,10.148.0.1:34911``."""
    contact = re.match(r"(\d+)\..*?(?:tcp://([^,:]+)|tcp6://(\[[^,\]]+))", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if contact is None:
        return None
    job, host, host6 = contact.groups()
    count, index, local = (int(environment[f"OMPI_COMM_WORLD_{name}"]) for name in ("SIZE", "RANK", "LOCAL_RANK"))
    return Place(f"{host or host6 + ']'}:{_port(int(job) // 4096)}", count, index, [local])


def _port(job: int) -> int:
    return 61440 + job % 4096


def _checked(place: Place) -> Place:
    host, _, port = place.address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConclugenError(f"{ADDRESS} is {place.address}; it must be HOST:PORT of process 0")
    if place.index >= place.count:
        raise ConclugenError(f"{INDEX} is {place.index} of {place.count} processes; they count from 0")
    return place
