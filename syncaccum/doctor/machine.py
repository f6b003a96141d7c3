"""What a rank sees on its machine: versions, GPUs, and the address that gloo will take, found by gloo's own rules."""

from __future__ import annotations

import os
import platform
import socket
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed import ProcessGroupGloo

import syncaccum
from syncaccum.doctor.rank import ProblemError, Rank
from syncaccum.layer import native

_VARIABLE = "GLOO_SOCKET_IFNAME"


def gather_facts(us: Rank) -> None:
    """Not collective, and takes as long as the machine's resolver does."""
    us.host = us.network = socket.gethostname()
    with suppress(OSError):  # not Linux, or a sandbox
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        us.network = f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    us.python, us.torch, us.syncaccum = platform.python_version(), str(torch.__version__), syncaccum.__version__
    us.gpus, us.cuda, us.cpu = torch.cuda.device_count(), torch.version.cuda or "", native.which()
    if us.gpus:
        us.nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    if us.launcher == "mpi":
        from mpi4py import MPI

        # Open MPI's goes on after a comma, MPICH's after a line, and pads with tabs.
        us.mpi = " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split())
    find_address(us)


def find_address(us: Rank) -> None:
    """What gloo will bind to: the first interface that GLOO_SOCKET_IFNAME names, else what the hostname resolves to."""
    interfaces = _list_interfaces()
    if names := os.environ.get(_VARIABLE, ""):
        us.interface, us.address_reason = names.split(",")[0], f"{_VARIABLE}={names}"
        us.address = next(iter(interfaces.get(us.interface, [])), "")
        _check_interfaces(us, names.split(","), interfaces)
    else:
        _resolve_hostname(us, interfaces)
    us.is_loopback = us.address.startswith("127.") or us.address == "::1"


def _list_interfaces() -> dict[str, list[str]]:
    """Each with its addresses, IPv4 first, as gloo takes them."""
    try:
        import psutil
    except ImportError as error:
        raise ProblemError("psutil is not installed", "on every node: pip install syncaccum[doctor]") from error
    return {
        name: [a.address.partition("%")[0] for f in (socket.AF_INET, socket.AF_INET6) for a in found if a.family == f]
        for name, found in psutil.net_if_addrs().items()
    }


def _check_interfaces(us: Rank, names: list[str], interfaces: dict[str, list[str]]) -> None:
    usable = ", ".join(f"{name} ({addresses[0]})" for name, addresses in interfaces.items() if addresses)
    remedy = f"set {_VARIABLE} on this node to an interface that the others reach, of {usable}; or unset it"
    for name in names:
        try:
            ProcessGroupGloo.create_device(interface=name)  # gloo's own check, which would otherwise abort the job
        except RuntimeError:
            why = "gloo cannot use that interface, which has no address or is down"
            why = why if name in interfaces else "this machine has no such interface"
            us.add(f"{_VARIABLE} names {name!r}: {why}", remedy)


def _resolve_hostname(us: Rank, interfaces: dict[str, list[str]]) -> None:
    hostname = f"hostname {socket.gethostname()!r}"
    try:
        answers = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
        found = [str(address[0]) for *_, address in answers]
        why = f"the {hostname} resolves to {', '.join(found)}, which is no address of this machine"
    except (OSError, UnicodeError) as error:
        found, why = [], f"the {hostname} does not resolve ({error})"
    # All of 127.0.0.0/8 leads to one interface.
    where = {a.partition("%")[0]: "127.0.0.1" if a.startswith("127.") else a.partition("%")[0] for a in found}
    by_address = {address: name for name, addresses in interfaces.items() for address in addresses}
    us.address = next((address for address, known in where.items() if known in by_address), "")
    us.address_reason = f"{hostname} resolves to it"
    if not us.address:  # gloo's last resort works where all ranks share this machine, which is known later
        us.address, us.address_reason = "127.0.0.1", why
        remedy = f"set {_VARIABLE} to an interface of this node, or enter the hostname with its address in /etc/hosts"
        us.add(f"{why}: gloo falls back to loopback", remedy, "warning")
    us.interface = by_address.get(where.get(us.address, us.address), "")
