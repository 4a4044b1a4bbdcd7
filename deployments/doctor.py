"""What ``collegium doctor`` looks at; each finding is one row."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Callable
from typing import Any

from deployments.preflight import (
    check_memory,
    check_port,
    check_weights,
    needed_gib,
)
from experts.config import LatentExpertConfig, TransformersExpertConfig, VLLMExpertConfig
from experts.memory import available_bytes
from orchestrator.config import CollegiumConfig, ConfigError, load_config

__all__ = ["findings"]


def findings(file: str | None) -> list[dict[str, Any]]:
    """Check the machine for one config.

    Returns:
        Rows ``{what, ok, found}``; ``found`` says what to do where ``ok`` is false.
    """
    rows = [_python(), _installation()]
    try:
        config = load_config(file)
    except ConfigError as error:
        return [*rows, _row("config", False, str(error))]
    rows.append(_row("config", True, f"{len(config.cards())} experts, {len(config.routes)} routes"))
    rows += [_package(name, config) for name in _needed_packages(config)]
    rows += [
        _checked("weights", lambda: check_weights(config), "all local weights are there"),
        _checked("memory", lambda: check_memory(config), _memory(config)),
        _port("port", "server.port", config.server.host, config.server.port),
        _port("dashboard", "ray.dashboard_port", "127.0.0.1", config.ray.dashboard_port),
        _checked("routers", lambda: _open_routes(config), "all load, and go with their routes"),
    ]
    return rows


def _row(what: str, ok: bool, found: str) -> dict[str, Any]:
    return {"what": what, "ok": ok, "found": found}


def _checked(what: str, check: Callable[[], object], good: str) -> dict[str, Any]:
    try:
        check()
    except ConfigError as error:
        return _row(what, False, str(error))
    return _row(what, True, good)


def _python() -> dict[str, Any]:
    version = platform.python_version()
    good = sys.version_info[:2] == (3, 11)
    return _row("python", good, version if good else f"{version}; the pinned lists need 3.11")


def _installation() -> dict[str, Any]:
    from deployments.builders import check_packages

    return _checked("packages", check_packages, "the five packages come from one installation")


def _needed_packages(config: CollegiumConfig) -> list[str]:
    engines = {entry.engine for entry in config.experts}
    names = ["ray", "pydantic", "onnxruntime"]
    if engines & {"transformers", "vllm", "latent"}:
        names += ["torch", "transformers"]
    local = TransformersExpertConfig | LatentExpertConfig
    if any(isinstance(entry, local) for entry in config.experts):
        names.append("peft")
    if any(isinstance(entry, VLLMExpertConfig) for entry in config.experts):
        names.append("vllm")
    return names


def _package(name: str, config: CollegiumConfig) -> dict[str, Any]:
    if importlib.util.find_spec(name) is None:
        hint = "make serve" if name != "vllm" else "make serve, or --engine transformers"
        return _row(name, False, f"not installed; {hint} installs it")
    distributions = importlib.metadata.packages_distributions().get(name, [name])
    return _row(name, True, " ".join(f"{d} {importlib.metadata.version(d)}" for d in distributions))


def _memory(config: CollegiumConfig) -> str:
    available = available_bytes() / 2**30
    return f"{available:.1f} GiB available, at least {needed_gib(config):.1f} GiB needed"


def _port(what: str, setting: str, host: str, port: int) -> dict[str, Any]:
    return _checked(what, lambda: check_port(setting, host, port), f"{host}:{port} is free")


def _open_routes(config: CollegiumConfig) -> None:
    from orchestrator.core import Orchestrator, load_routers

    Orchestrator(config, {}, load_routers(config))
