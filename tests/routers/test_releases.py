from __future__ import annotations

import shutil

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


def test_a_rollback_may_name_an_older_release(artefacts, tmp_path):
    folder = tmp_path / "router"
    names = [publish(artefact, folder) for artefact in (*artefacts, artefacts[0])]
    assert rollback(folder, to=names[0]) == names[0] == current_release(folder).name
    with pytest.raises(RouterError, match=f"no release {names[1]!r} before {names[0]!r}"):
        rollback(folder, to=names[1])


def test_a_publication_that_failed_does_not_block_the_next(artefacts, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    folder = tmp_path / "router"
    with monkeypatch.context() as broken:
        broken.setattr(shutil, "copytree", full)
        with pytest.raises(OSError, match="no space left"):
            publish(artefacts[0], folder)
    assert release_names(folder) == []
    assert publish(artefacts[0], folder).startswith("0001-")


def test_stray_files_are_no_releases(artefacts, tmp_path):
    folder = tmp_path / "router"
    first = publish(artefacts[0], folder)
    for stray in (".DS_Store", "notes.txt", "old-copy"):
        (folder / "releases" / stray).touch()
    second = publish(artefacts[1], folder)
    assert release_names(folder) == [first, second]
    assert second.startswith("0002-")
    assert rollback(folder) == first


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
    assert (
        CliRunner().invoke(main, ["release", "publish", folder, str(artefacts[0])]).exit_code == 0
    )
    first = release_names(tmp_path / "router")[0]
    named = CliRunner().invoke(main, ["release", "rollback", folder, "--to", first])
    assert (named.exit_code, named.output) == (0, f"{folder} now uses {first}\n")
    missing = CliRunner().invoke(main, ["release", "rollback", folder, "--to", "0009-gone"])
    assert missing.exit_code == 2
    assert "no release '0009-gone' before" in missing.output
    again = CliRunner().invoke(main, ["release", "rollback", folder])
    assert again.exit_code == 2
    assert "no release before" in again.output
    assert CliRunner().invoke(main, ["release", "list", str(tmp_path)]).exit_code == 2
