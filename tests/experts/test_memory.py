from __future__ import annotations

from pathlib import Path

from experts.memory import available_bytes

MIB = 2**20


def _cgroup(folder: Path, limit: str, used: int, cached: int) -> Path:
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - cached}\ninactive_file {cached}\n")
    return folder


def test_container_has_less_than_its_machine(tmp_path):
    assert available_bytes(_cgroup(tmp_path, str(5 * MIB), 2 * MIB, 0)) == 3 * MIB


def test_files_that_were_read_are_free_memory(tmp_path):
    """Else a container that has just read its weights would have no room for them."""
    assert available_bytes(_cgroup(tmp_path, str(5 * MIB), 5 * MIB, 4 * MIB)) == 4 * MIB


def test_without_a_limit_it_is_the_machines(tmp_path):
    machine = available_bytes(tmp_path)
    assert machine > 100 * MIB
    unlimited = available_bytes(_cgroup(tmp_path, "max", 5 * MIB, MIB))
    assert 0.5 * machine < unlimited < 2 * machine
