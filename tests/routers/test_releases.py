from __future__ import annotations

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from routers.base import RouterError
from routers.baselines import BestSingleRouter, RandomRouter
from routers.releases import current_release, publish, release_names, rollback
from routers.testing import example_table


@pytest.fixture
def artefacts(tmp_path):
    table = example_table(per_split=20)
    paths = [tmp_path / "first", tmp_path / "second"]
    for router, path in zip((BestSingleRouter(), RandomRouter()), paths, strict=True):
        router.fit(table).save(path)
    return paths


def test_the_latest_release_is_in_use_and_a_rollback_goes_one_back(artefacts, tmp_path):
    folder = tmp_path / "router"
    names = [publish(artefact, folder) for artefact in (*artefacts, artefacts[0])]
    assert names == release_names(folder)
    assert current_release(folder).name == names[2]
    assert rollback(folder) == names[1]
    assert (current_release(folder) / "manifest.json").read_bytes() == (
        artefacts[1] / "manifest.json"
    ).read_bytes()
    assert rollback(folder) == names[0]
    with pytest.raises(RouterError, match="no release before"):
        rollback(folder)
    assert publish(artefacts[1], folder) > names[2], "numbers are not used twice"


def test_an_artefact_is_its_own_release(artefacts):
    assert current_release(artefacts[0]) == artefacts[0]
    with pytest.raises(RouterError, match="no release before"):
        rollback(artefacts[0])


def test_what_cannot_be_used_is_not_published(artefacts, tmp_path):
    (artefacts[0] / "arrays.safetensors").write_bytes(b"damaged")
    with pytest.raises(RouterError, match="does not match the hash"):
        publish(artefacts[0], tmp_path / "router")
    assert not (tmp_path / "router").exists()
    with pytest.raises(RouterError, match="holds something else"):
        publish(artefacts[1], artefacts[0])


def test_a_missing_release_is_named(artefacts, tmp_path):
    folder = tmp_path / "router"
    publish(artefacts[0], folder)
    (folder / "current").write_text("0009-gone\n")
    with pytest.raises(RouterError, match="'0009-gone', which is not among the releases: 0001-"):
        current_release(folder)


def test_the_command_publishes_lists_and_rolls_back(artefacts, tmp_path):
    folder = str(tmp_path / "router")
    for artefact in artefacts:
        done = CliRunner().invoke(main, ["release", "publish", folder, str(artefact)])
        assert done.exit_code == 0, done.output
    assert "now uses 0002-" in done.output
    assert CliRunner().invoke(main, ["release", "rollback", folder]).exit_code == 0
    listed = CliRunner().invoke(main, ["release", "list", folder]).output.splitlines()
    assert [line[:6] for line in listed] == ["* 0001", "  0002"]
    again = CliRunner().invoke(main, ["release", "rollback", folder])
    assert again.exit_code == 2
    assert "no release before" in again.output
    assert CliRunner().invoke(main, ["release", "list", str(tmp_path)]).exit_code == 2
