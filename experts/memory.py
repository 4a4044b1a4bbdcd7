"""How much memory there is for models."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory this process may still use: the machine's, or its container's if less.

    Args:
        cgroup: Where the kernel says what its container has.
    """
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (cgroup / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):
        return machine
    # Files that were read count as used, but the kernel gives their memory up.
    cached = int(dict(line.split() for line in lines).get("inactive_file", 0))
    return min(machine, limit - used + cached)
