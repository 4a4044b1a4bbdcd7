"""Documents are true: their code runs, their tables are what the program says, no link is dead."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from experts.types import Mixture
from orchestrator.config import parse_config
from orchestrator.decision import Call, Decision, RequestContext
from orchestrator.http.generation import decision_headers

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")


def _fences(language: str) -> list[tuple[str, str]]:
    return [
        (page.name, code)
        for page in PAGES
        for info, code in FENCE.findall(page.read_text(encoding="utf-8"))
        if info == language
    ]


def _anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize(("page", "code"), _fences("python run"))
def test_python_example_runs(page, code, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


def test_config_example_is_valid():
    examples = [code for page, code in _fences("yaml") if page == "configuration.md"]
    assert examples
    for example in examples:
        parse_config(yaml.safe_load(example))


def test_generated_parts_are_up_to_date():
    command = [sys.executable, str(ROOT / "scripts" / "docs"), "--check"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_response_header_is_documented():
    decision = Decision(experts=("a",), route="auto", category="maths", confidence=1.0)
    calls = [Call("a", cost_usd=0.1, seconds=1.0)]
    mixture = Mixture({"b": 0.1}, "outputs")
    context = RequestContext(deadline=0.0, calls=calls, peers={"b": 0.1}, mixture=mixture)
    text = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    missing = [h for h in decision_headers(decision, context, debug=True) if f"`{h}`" not in text]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        linked = (page.parent / target) if target else page
        assert linked.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in _anchors(linked), f"{page.name} links to {target}#{anchor}"
