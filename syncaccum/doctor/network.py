"""Which address and interface gloo will take on this machine, found by its own rules before it is asked to connect."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroupGloo

from syncaccum.doctor.findings import Finding

_VARIABLE = "GLOO_SOCKET_IFNAME"


@dataclass(frozen=True)
class Endpoint:
    """Where the peers of this rank will find it. Empty strings where that is unknown."""

    address: str = ""
    interface: str = ""
    reason: str = ""
    """Why this address."""

    @property
    def is_loopback(self) -> bool:
        return bool(self.address) and ipaddress.ip_address(self.address).is_loopback


def find_endpoint(
    environment: Mapping[str, str] = os.environ, resolve: Callable[..., list[Any]] = socket.getaddrinfo
) -> tuple[Endpoint, list[Finding]]:
    """What gloo will bind to: the first interface that GLOO_SOCKET_IFNAME names, else what the hostname resolves to.

    Args:
        environment: of this process.
        resolve: socket.getaddrinfo, or what stands for it.
    """
    names = environment.get(_VARIABLE, "")
    if names:
        return _find_by_interfaces(names.split(","))
    return _find_by_hostname(resolve)


def _find_by_interfaces(names: list[str]) -> tuple[Endpoint, list[Finding]]:
    findings = [
        Finding("problem", f"{_VARIABLE} names {name!r}: {why}", _name_interfaces())
        for name in names
        if (why := _find_fault(name))
    ]
    first = names[0]
    return Endpoint(_address_of(first), first, f"{_VARIABLE}={','.join(names)}"), findings


def _find_fault(interface: str) -> str:
    if interface not in _interfaces():
        return "this machine has no such interface"
    try:
        ProcessGroupGloo.create_device(interface=interface)  # gloo's own check, which would otherwise abort the job
    except RuntimeError:
        return "gloo cannot use that interface, which has no address or is down"
    return ""


def _name_interfaces() -> str:
    addresses = ((name, _address_of(name)) for name in _interfaces())
    usable = ", ".join(f"{name} ({a})" for name, a in addresses if a and not ipaddress.ip_address(a).is_link_local)
    return (
        f"set {_VARIABLE} on this node to an interface that the other nodes reach, of those it has: {usable}; or unset "
        "it, and gloo takes the address that the hostname resolves to"
    )


def _find_by_hostname(resolve: Callable[..., list[Any]]) -> tuple[Endpoint, list[Finding]]:
    hostname = socket.gethostname()
    try:
        candidates = resolve(hostname, None, type=socket.SOCK_STREAM)
    except OSError as error:
        return _fall_back(f"the hostname {hostname!r} does not resolve ({error})")
    for family, kind, _, _, address in candidates:
        if _can_bind(family, kind, address):
            host = address[0].partition("%")[0]
            return Endpoint(host, _interface_of(host), f"hostname {hostname!r} resolves to it"), []
    elsewhere = ", ".join(sorted({address[0] for *_, address in candidates}))
    return _fall_back(f"the hostname {hostname!r} resolves to {elsewhere}, which is no address of this machine")


def _fall_back(why: str) -> tuple[Endpoint, list[Finding]]:
    """gloo's own last resort. It only works where all ranks share this machine, and whether they do is known later."""
    finding = Finding(
        "warning",
        f"{why}: gloo falls back to loopback",
        f"set {_VARIABLE} to an interface of this node, or enter the hostname with the node's address in /etc/hosts",
    )
    return Endpoint("127.0.0.1", _interface_of("127.0.0.1"), why), [finding]


def _can_bind(family: int, kind: int, address: Any) -> bool:
    try:
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def identify_network() -> str:
    """The same for two processes exactly if one's loopback is the other's: on one machine, in one network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:  # not Linux, or a sandbox
        return socket.gethostname()


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _interface_of(address: str) -> str:
    """Which interface has this address, or any of its network where that is loopback's."""
    if ipaddress.ip_address(address).is_loopback:  # all of 127.0.0.0/8 leads to the one interface
        address = "::1" if ":" in address else "127.0.0.1"
    return next((name for name in _interfaces() if address in _addresses_of(name)), "")


def _address_of(interface: str) -> str:
    return next(iter(_addresses_of(interface)), "")


def _addresses_of(interface: str) -> list[str]:
    """IPv4 first, as gloo takes them; nothing where the system does not tell."""
    if sys.platform != "linux":
        return []
    import fcntl

    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            reply = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
            found.append(socket.inet_ntoa(reply[20:24]))
        except OSError:
            pass  # it has no IPv4 address
    return found + _ipv6_addresses_of(interface)


_SIOCGIFADDR = 0x8915  # linux/sockios.h; its reply is an ifreq with a sockaddr_in at 16, the address at 20


def _ipv6_addresses_of(interface: str) -> list[str]:
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:  # a kernel without IPv6
        return []
    fields = (line.split() for line in lines)
    return [str(ipaddress.IPv6Address(bytes.fromhex(address))) for address, *_, name in fields if name == interface]
