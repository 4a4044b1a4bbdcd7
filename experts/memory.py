"""How much memory there is for models."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_bytes"]


def available_bytes() -> int:
    """Memory this process may still use: the machine's, or its container's if less."""
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":", 1) for line in file)
    machine = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        container = int(limit.read_text()) - int(used.read_text())
    except (OSError, ValueError):
        return machine
    return min(machine, container)
