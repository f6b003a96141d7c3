"""A switch in user space: each frame between nodes goes through it, late, out of order, or not at all.

What ``tc netem`` does, for kernels built without it, the same everywhere, and with one seed for all that is random.
"""

from __future__ import annotations

import heapq
import itertools
import random
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass

# From linux/if_ether.h and linux/if_packet.h; Python names neither.
_ALL_PROTOCOLS = 0x0003
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
# Frames come and go with the kernel's note on the checksum and the segments that the sender's stack left to the
# hardware. There is none: without the note the receiver would drop them as damaged.
_NOTE = struct.calcsize("<BBHHHH")
_LONGEST = _NOTE + 14 + 65536

_IDLE = 0.05  # seconds in which the thread notices that it is to end
_SEED = 0


@dataclass(frozen=True)
class Weather:
    """What befalls each frame between any two nodes.

    ``early`` is the share of frames that are not delayed, and overtake those that are; netem's ``reorder``.
    """

    delay: float = 0.0
    loss: float = 0.0
    early: float = 0.0


class Switch:
    """Carries frames between the ports that are plugged in, until closed. Nodes' addresses are ``mac(index)``."""

    def __init__(self) -> None:
        self.weather = Weather()
        self.silent: frozenset[int] = frozenset()
        """Nodes that no frame comes from or gets to, although their link is up."""
        self._ports: dict[int, socket.socket] = {}
        self._random = random.Random(_SEED)
        self._due: list[tuple[float, int, int, bytes]] = []
        self._order = itertools.count()
        self._poll = select.epoll()
        self._open = True
        self._thread = threading.Thread(target=self._carry, name="switch", daemon=True)
        self._thread.start()

    def plug(self, index: int, interface: str) -> None:
        """Connect node ``index``, whose other end of the cable is this interface."""
        port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        port.setblocking(False)
        port.bind((interface, _ALL_PROTOCOLS))
        self._ports[index] = port
        self._poll.register(port, select.EPOLLIN)

    def unplug(self, index: int) -> None:
        port = self._ports.pop(index)
        self._poll.unregister(port)
        port.close()

    def close(self) -> None:
        self._open = False
        self._thread.join()
        for index in list(self._ports):
            self.unplug(index)
        self._poll.close()

    # --- in the switch's own thread

    def _carry(self) -> None:
        while self._open:
            wait = self._due[0][0] - time.monotonic() if self._due else _IDLE
            for descriptor, _ in self._poll.poll(min(max(wait, 0.0), _IDLE)):
                self._take_in(descriptor)
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, target, frame = heapq.heappop(self._due)
                self._send(target, frame)

    def _take_in(self, descriptor: int) -> None:
        source, port = next(
            ((i, p) for i, p in list(self._ports.items()) if p.fileno() == descriptor),
            (-1, None),
        )
        if port is None:  # unplugged meanwhile
            return
        while True:
            try:
                frame, address = port.recvfrom(_LONGEST)
            except OSError:  # nothing more to read, or the link is down
                return
            if address[2] != socket.PACKET_OUTGOING:
                for target in self._targets(source, frame[_NOTE : _NOTE + 6]):
                    self._post(source, target, frame)

    def _targets(self, source: int, destination: bytes) -> list[int]:
        if destination[0] & 1:  # to everyone: a node asks who has an address
            return [index for index in self._ports if index != source]
        return [index for index in self._ports if index != source and mac_bytes(index) == destination]

    def _post(self, source: int, target: int, frame: bytes) -> None:
        weather = self.weather
        if self.silent & {source, target} or self._random.random() < weather.loss:
            return
        delay = 0.0 if self._random.random() < weather.early else weather.delay
        heapq.heappush(self._due, (time.monotonic() + delay, next(self._order), target, frame))

    def _send(self, target: int, frame: bytes) -> None:
        port = self._ports.get(target)
        # A frame that was on its way when its node fell silent does not arrive either.
        if port is None or target in self.silent:
            return
        try:
            port.send(frame)
        except OSError:  # the link is down or its queue is full: lost, as on any network
            return


def mac_bytes(index: int) -> bytes:
    """A locally administered address (second bit of the first byte) with the node's number."""
    return bytes([2, 0, 0, 0, 0, index])


def mac(index: int) -> str:
    return mac_bytes(index).hex(":")
