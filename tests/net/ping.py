"""ICMP echo: prints the round trip of each answered request in milliseconds. Usage: ping.py ADDRESS COUNT TIMEOUT_S."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071) of an even number of bytes."""
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def main() -> None:
    """Send the next request once the last was answered or given up."""
    address, count, timeout_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    identity = os.getpid() & 0xFFFF
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        for number in range(count):
            parts = (8, 0, 0, identity, number)
            request = struct.pack(">BBHHH", 8, 0, checksum(struct.pack(">BBHHH", *parts)), identity, number)
            started = time.perf_counter()
            raw.sendto(request, (address, 0))
            deadline = started + timeout_s
            while (left := deadline - time.perf_counter()) > 0:
                raw.settimeout(left)
                try:
                    answer = raw.recv(2048)
                except TimeoutError:
                    break
                header = (answer[0] & 15) * 4
                kind, _, _, found, sequence = struct.unpack_from(">BBHHH", answer, header)
                if (kind, found, sequence) == (0, identity, number):
                    print((time.perf_counter() - started) * 1000)
                    break


if __name__ == "__main__":
    main()
