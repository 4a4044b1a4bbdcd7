"""Cards, and the artefacts that are shipped with one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("pyarrow")

from evals.evaluate_cli import evaluate_command
from routers.artefact import TIMING, read_manifest
from routers.baselines import BestSingleRouter
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable
from routers.registry import load_router
from routers.testing import example_table

ROOT = Path(__file__).parents[2]
SHIPPED = ["auto", "domains"]


@pytest.fixture(scope="module")
def table_folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("card") / "table"
    example_table().write(folder)
    (folder / "README.md").write_text("# Made up\n\nOf words.\n\n## Licence\n\nNone.\n")
    return folder


def _card(router, table: Path, split: str = "test") -> str:
    artefact, card = table.parent / router.method, table.parent / "card.md"
    router.save(artefact)
    arguments = [str(artefact), "--table", str(table), "--split", split, "--card", str(card)]
    result = CliRunner().invoke(evaluate_command, arguments)
    assert result.exit_code == 0, result.output
    return card.read_text()


def test_card_says_what_it_is_made_from_and_how_well_it_does(table_folder):
    router = CoERouter(encoder="hashing").fit(OutcomeTable.load(table_folder))
    card = _card(router, table_folder)
    manifest = read_manifest(table_folder.parent / "coe")
    assert card.startswith("# coe\n\nTwo-step router:")
    for fact in (manifest.table_sha256, manifest.arrays_sha256, manifest.created_with):
        assert f"`{fact}`" in card
    assert "of the table it was fitted on" in card
    assert "names the true category" in card
    assert "\n| law | " in card
    assert card.endswith("### Made up\n\nOf words.\n\n#### Licence\n\nNone.\n")
    assert _card(router, table_folder) == card


@pytest.mark.parametrize("fence", ["```", "~~~~"])
def test_only_headings_of_the_readme_move_down(tmp_path, fence):
    table = tmp_path / "table"
    example_table().write(table)
    block = f"{fence}sh\n# a comment\n{fence[:3]}sh\n# another\n{fence}\n"
    (table / "README.md").write_text(f"# Made up\n\n{block}\n## Made by\n\n{block}\n## Licence\n")
    card = _card(BestSingleRouter().fit(OutcomeTable.load(table)), table)
    assert card.endswith(f"### Made up\n\n{block}\n#### Made by\n\n{block}\n#### Licence\n")


def test_card_of_a_router_without_categories(table_folder, tmp_path):
    other = tmp_path / "other" / "table"
    table = example_table(seed=1)
    table.write(other)
    card = _card(BestSingleRouter().fit(OutcomeTable.load(table_folder)), other)
    assert "of another table than it was fitted on" in card
    assert "names the true category" not in card
    assert "\n| law | " in card
    assert card.endswith("The outcome table has no README.md.\n")


def test_one_card_at_a_time(table_folder):
    arguments = ["a", "b", "--table", str(table_folder), "--card", "card.md"]
    result = CliRunner().invoke(evaluate_command, arguments)
    assert result.exit_code == 2
    assert "--card take one ARTEFACT at a time" in result.output


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_artefact_has_its_own_card(name):
    folder = ROOT / "routers" / "embedded" / name
    card, manifest = (folder / "README.md").read_text(encoding="utf-8"), read_manifest(folder)
    assert f"`{manifest.arrays_sha256}`" in card
    assert f"`{manifest.table_sha256}`" in card
    assert "Licences" in card
    assert "Limits" in card


def test_domain_table_gives_a_domain_its_own_prompts():
    table = OutcomeTable.load(ROOT / "evals" / "data" / "domains")
    domains = load_router(ROOT / "routers" / "embedded" / "domains").models
    assert table.models == domains
    best = table.scores("all").argmax(axis=1)
    assert [domains[j] for j in best] == table.prompts.categories
    assert (table.scores("all").sum(axis=1) == 1).all()
    readme = (ROOT / "evals" / "data" / "domains" / "README.md").read_text(encoding="utf-8")
    for domain in domains:
        counts = [
            str((table.with_prompts_of(split).categories or []).count(domain))
            for split in ("train", "validation", "test")
        ]
        assert f"| `{domain}` | {' | '.join(counts)} |" in readme


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "script"),
    [("auto", "train_embedded_router.sh"), ("domains", "train_domain_classifier.sh")],
)
def test_one_command_makes_the_shipped_artefact_again(tmp_path, name, script):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "evals").symlink_to(ROOT / "evals")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", str(tmp_path / "scripts" / script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    shipped = ROOT / "routers" / "embedded" / name
    for file in sorted(shipped.iterdir()):
        if file.name == TIMING:  # differs, is not shipped, and lies here after training here
            continue
        made = tmp_path / "routers" / "embedded" / name / file.name
        assert made.read_bytes() == file.read_bytes(), f"{file.name} differs"
