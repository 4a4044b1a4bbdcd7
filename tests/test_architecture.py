"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ["torch", "ray", "vllm", "transformers", "redis", "sklearn", "pyarrow", "onnxruntime"]
IMPORT_LIMIT_S = 0.5

_PROBE = """
import json, sys, time
started = time.perf_counter()
import orchestrator, routers, experts, evals
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "modules": list(sys.modules)}))
"""


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_import_contracts_hold():
    from importlinter.cli import EXIT_STATUS_SUCCESS, lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml")) == EXIT_STATUS_SUCCESS


def test_imports_are_light():
    probes = [json.loads(_run(sys.executable, "-c", _PROBE).stdout) for _ in range(5)]
    assert min(probe["seconds"] for probe in probes) < IMPORT_LIMIT_S
    assert not set(HEAVY) & set(probes[0]["modules"])


@pytest.mark.parametrize("module", ["orchestrator.cli", "orchestrator.config", "orchestrator.core"])
def test_module_leaves_heavy_libraries_out(module):
    probe = f"import sys, json, {module}; print(json.dumps(list(sys.modules)))"
    assert not set(HEAVY) & set(json.loads(_run(sys.executable, "-c", probe).stdout))
