"""Nodes of a cluster: network namespaces on one switch, whose links can be cut and restored."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.switch import Switch, Weather, mac

INTERFACE = "eth0"
# RFC 2544 sets this range aside for tests of networks; here it exists in these namespaces alone.
_ADDRESS = "198.18.0.{}"
_PREFIX = 24
_CLONE_NEWNET = 0x40000000  # linux/sched.h; os.setns came with Python 3.12


class Node:
    """A network namespace with one interface. It outlives its processes, as a machine does."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.address = _ADDRESS.format(index + 1)
        self.port = f"port{index}"
        """The switch's end of the cable."""
        self.plugged = True
        # cat ends with this process, however that ends, and the namespace with cat.
        self._holder = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        deadline = time.monotonic() + 10
        while os.path.samestat(os.stat("/proc/self/ns/net"), os.stat(self.namespace)):
            assert self._holder.poll() is None, "unshare --net failed: run `make faults`"
            assert time.monotonic() < deadline, "unshare --net made no namespace in 10 s"
            time.sleep(0.005)
        _run("ip", "link", "add", self.port, "type", "veth", "peer", "name", INTERFACE, "netns", self._holder.pid)
        _run("ip", "link", "set", self.port, "addrgenmode", "none")
        _run("ip", "link", "set", self.port, "up")
        self.run("ip", "link", "set", "lo", "up")
        # No addresses but ours: gloo takes the first one it finds.
        self.run("ip", "link", "set", INTERFACE, "address", mac(index), "addrgenmode", "none", "gso_max_segs", 1)
        self.run("ip", "address", "add", f"{self.address}/{_PREFIX}", "dev", INTERFACE)
        self.run("ip", "link", "set", INTERFACE, "up")

    @property
    def namespace(self) -> Path:
        return Path(f"/proc/{self._holder.pid}/ns/net")

    def inside(self, *command: object) -> list[str]:
        """The command that runs a command on this node."""
        return ["nsenter", f"--net={self.namespace}", *map(str, command)]

    def run(self, *command: object) -> None:
        _run(*self.inside(*command))

    def cut_link(self) -> None:
        _run("ip", "link", "set", self.port, "down")

    def restore_link(self) -> None:
        _run("ip", "link", "set", self.port, "up")

    def unplug(self) -> None:
        """Take the cable away for good, both ends."""
        _run("ip", "link", "delete", self.port)
        self.plugged = False

    def remove(self) -> None:
        self._holder.send_signal(signal.SIGKILL)
        self._holder.communicate()


class Network:
    """``size`` nodes on one switch."""

    def __init__(self, size: int) -> None:
        self.switch = Switch()
        self.nodes: list[Node] = []
        for index in range(size):
            self.nodes.append(self._add_node(index))

    def _add_node(self, index: int) -> Node:
        node = Node(index)
        self.switch.plug(index, node.port)
        return node

    def replace(self, index: int) -> Node:
        """A new node in the place of one that was unplugged."""
        self.switch.unplug(index)
        self.nodes[index].remove()
        self.nodes[index] = self._add_node(index)
        return self.nodes[index]

    def silence(self, index: int) -> None:
        """Lose every frame from and to a node, whose link stays up."""
        self.switch.silent |= {index}

    def clear_up(self) -> None:
        """Good weather, every link restored, and every node that was unplugged replaced."""
        self.switch.weather = Weather()
        self.switch.silent = frozenset()
        for node in list(self.nodes):
            if node.plugged:
                node.restore_link()
            else:
                self.replace(node.index)

    def close(self) -> None:
        self.switch.close()
        for node in self.nodes:
            node.remove()


@contextmanager
def open_network(size: int) -> Iterator[Network]:
    """A network that is gone in the end.

    Raises:
        AssertionError: this process is in a network namespace that others use.
    """
    routes = subprocess.run(["ip", "route"], check=True, capture_output=True, text=True).stdout
    assert not routes, "this network is in use; `make faults` runs these tests in a network namespace of their own"
    network = Network(size)
    try:
        yield network
    finally:
        network.close()


def enter(namespace: Path) -> None:
    """Move this thread, and the threads that it is to start, to a node."""
    with namespace.open() as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True)
