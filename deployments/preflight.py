"""What can be told to be wrong before anything is started."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from functools import cache

from experts.config import (
    ExpertConfig,
    LatentExpertConfig,
    RetrieverExpertConfig,
    TransformersExpertConfig,
    VLLMExpertConfig,
)
from experts.errors import ExpertConfigError
from experts.latent.artefact import read_latent
from experts.latent.config import MemberConfig
from experts.memory import available_bytes
from experts.paths import PACKAGE_PREFIX, resolve_path
from orchestrator.config import CollegiumConfig, ConfigError

__all__ = [
    "check_memory",
    "check_port",
    "check_weights",
    "needed_gib",
]

# What Ray with the ingress, and one engine's runtime, take without weights: a little less than was
# measured with the embedded experts (2.3 GiB in all on transformers, 4.4 to 5.4 on vLLM, which
# runs three processes), since a check that refuses what would work is worse than none.
RAY_GIB = 1.2
ENGINE_GIB = {"latent": 0.8, "transformers": 0.8, "vllm": 2.7}
BYTES_PER_PARAMETER = 2


def check_port(setting: str, host: str, port: int) -> None:
    """Make sure a port can be bound.

    Raises:
        ConfigError: It is taken, or this user must not bind it.
    """
    if port == 0:
        return
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                reason = "is taken by another process; stop that or choose another port"
            else:
                reason = f"cannot be bound ({error.strerror})"
            raise ConfigError(f"{setting}: port {port} on {host} {reason}") from error


def check_weights(config: CollegiumConfig) -> None:
    """Make sure that local weights, adapters and indexes exist; hubs are not asked.

    Raises:
        ConfigError: A path does not exist, or a latent collaboration is one of other experts.
    """
    for entry in config.experts:
        try:
            for reference in _references(entry):
                resolve_path(reference)
            if isinstance(entry, LatentExpertConfig):
                names = [member.name for member in entry.members]
                read_latent(resolve_path(entry.artefact), names)
        except ExpertConfigError as error:
            raise ConfigError(f"expert {entry.name!r}: {error}") from error


def _references(entry: ExpertConfig) -> list[str]:
    """What an entry names of this machine's files."""
    if isinstance(entry, RetrieverExpertConfig):
        return [entry.index]
    if isinstance(entry, LatentExpertConfig):
        models = [reference for member in entry.members for reference in _local(member.model)]
        adapters = [member.adapter for member in entry.members if member.adapter]
        return [entry.artefact, *models, *adapters]
    if isinstance(entry, VLLMExpertConfig | TransformersExpertConfig):
        adapters = [adapter.path for adapter in entry.adapters if "://" not in adapter.path]
        return [*_local(entry.model), *adapters]
    return []


def _local(model: str) -> list[str]:
    looks_local = model.startswith((PACKAGE_PREFIX, "/", "./", "../", "~"))
    return [model] if looks_local else []


def needed_gib(config: CollegiumConfig) -> float:
    """A low estimate of the memory the service needs on this machine, in GiB."""
    total = RAY_GIB
    for entry in config.experts:
        if isinstance(entry, TransformersExpertConfig) or (
            isinstance(entry, VLLMExpertConfig) and entry.device == "cpu"
        ):
            billions = entry.total_params_b or 0.0
            total += ENGINE_GIB[entry.engine] + billions * 1e9 * BYTES_PER_PARAMETER / 2**30
        elif isinstance(entry, LatentExpertConfig):
            total += ENGINE_GIB["latent"]
            if entry.device == "cpu":
                total += _members_gib(entry.members, entry.dtype)
    return total


# In this process torch would take half a GiB for as long as the service runs.
_COUNT = """
import json, sys
from experts.latent.config import MemberConfig
from experts.latent.members import needed_bytes
members = [MemberConfig(**member) for member in json.load(sys.stdin)]
print(sum(needed_bytes(members, sys.argv[1]).values()))
"""


@cache
def _members_gib(members: tuple[MemberConfig, ...], dtype: str) -> float:
    """Weights of a latent engine's members on this machine; of those on a hub nothing is known."""
    local = json.dumps([member.model_dump() for member in members if _local(member.model)])
    command = [sys.executable, "-c", _COUNT, dtype]
    counted = subprocess.run(command, input=local, capture_output=True, text=True, check=False)
    # Who loads them says what is wrong with them.
    return int(counted.stdout) / 2**30 if counted.returncode == 0 else 0.0


def check_memory(config: CollegiumConfig) -> None:
    """Make sure that the machine has the memory the service surely needs.

    Raises:
        ConfigError: It has not.
    """
    if not os.path.exists("/proc/meminfo"):
        return
    needed, available = needed_gib(config), available_bytes() / 2**30
    if needed > available:
        raise ConfigError(
            f"the service needs at least {needed:.1f} GiB of memory, {available:.1f} GiB are "
            "available; stop something, or serve fewer or smaller experts"
        )
