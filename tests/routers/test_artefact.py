from __future__ import annotations

import json

import numpy as np
import pytest

import routers.registry
from routers.artefact import Manifest, load_artefact, read_manifest, save_artefact
from routers.base import RouterError
from routers.coe import CoERouter
from routers.encoders import HashingEncoder
from routers.registry import get_router_class, load_router, registered_routers
from routers.testing import example_table


@pytest.fixture
def artefact(tmp_path):
    CoERouter(encoder="hashing").fit(example_table()).save(tmp_path / "coe")
    return tmp_path / "coe"


def _edit(artefact, **changes):
    file = artefact / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _message(action):
    with pytest.raises(RouterError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_manifest_tells_where_the_router_comes_from(artefact):
    manifest = read_manifest(artefact)
    assert manifest.method == "coe"
    assert manifest.models == ["cook", "generalist", "lawyer"]
    assert manifest.categories == ["cooking", "general", "law"]
    assert manifest.encoder is not None
    assert manifest.encoder.name == "hashing"
    assert manifest.table_sha256 == example_table().sha256
    assert manifest.split == "train"
    assert manifest.params["C"] == 10.0
    assert manifest.metrics["held_out_rows"] == 60
    assert manifest.created_with


def test_folder_holds_arrays_and_manifest_only(artefact):
    names = sorted(path.name for path in artefact.iterdir())
    assert names == ["arrays.safetensors", "manifest.json"]
    assert [path.name for path in artefact.parent.iterdir()] == ["coe"]


def test_load_router_finds_the_class(artefact):
    assert isinstance(load_router(artefact), CoERouter)


def test_missing_files_are_named(artefact, tmp_path):
    assert "manifest.json is missing" in _message(lambda: load_router(tmp_path / "none"))
    (artefact / "arrays.safetensors").unlink()
    assert "arrays.safetensors is missing" in _message(lambda: load_router(artefact))


def test_changed_arrays_are_refused(artefact):
    file = artefact / "arrays.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert "does not match the hash" in _message(lambda: load_router(artefact))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "knnn"}, "unknown router 'knnn'; known: 'bert', 'best_single', "),
        ({"method": "os:system"}, "unknown router 'os:system'; known:"),
        (
            {"method": "random"},
            "unknown parameter 'encoder' of RandomRouter; known: 'random_state'",
        ),
        ({"format_version": 2}, "has format version 2"),
        ({"models": []}, "models: List should have at least 1 item"),
        ({"models": ["one"]}, "array 'quality' has shape (3, 3), not (3, 1)"),
        ({"params": {"D": 1}}, "unknown parameter 'D' of CoERouter; known: 'encoder', 'C'"),
        ({"params": {"C": -1}}, "The 'C' parameter of CoERouter must be"),
        ({"encoder": None}, "encoder is missing"),
        ({"encoder": {"name": "hashing", "revision": "0"}}, "revision '0', but here is 'hashing'"),
        ({"encoder": {"name": "bert", "revision": "0"}}, "unknown encoder 'bert'; known:"),
        ({"state": {}}, "state 'temperature' is missing or not a number"),
    ],
)
def test_wrong_manifests_are_refused_in_one_line(artefact, changes, message):
    _edit(artefact, **changes)
    assert message in _message(lambda: load_router(artefact))


def test_broken_json_is_refused(artefact):
    (artefact / "manifest.json").write_text("{")
    assert "Invalid JSON" in _message(lambda: load_router(artefact))


def test_arrays_with_nan_are_refused(tmp_path):
    save_artefact(tmp_path / "a", Manifest(method="x", models=["m"]), {"q": np.array([np.nan])})
    loaded = load_artefact(tmp_path / "a", method="x")
    assert "not finite" in _message(lambda: loaded.array("q", (1,)))
    assert "is missing" in _message(lambda: loaded.array("r", (1,)))


def test_another_encoder_may_not_stand_in(artefact):
    class Newer(HashingEncoder):
        revision = "2"

    assert "train it again" in _message(lambda: CoERouter.load(artefact, encoder=Newer()))


def test_saving_replaces_an_artefact_but_nothing_else(artefact, tmp_path):
    before = (artefact / "manifest.json").read_bytes()
    CoERouter(encoder="hashing", C=1.0).fit(example_table()).save(artefact)
    assert (artefact / "manifest.json").read_bytes() != before
    other = tmp_path / "precious"
    other.mkdir()
    (other / "file").write_text("mine")
    assert "is not an artefact" in _message(lambda: load_router(artefact).save(other))
    assert (other / "file").read_text() == "mine"


def test_failed_save_leaves_the_old_artefact(artefact):
    before = sorted((path.name, path.read_bytes()) for path in artefact.iterdir())
    manifest = Manifest(method="coe", models=["m"], metrics={"bad": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        save_artefact(artefact, manifest, {})
    assert sorted((path.name, path.read_bytes()) for path in artefact.iterdir()) == before
    assert [path.name for path in artefact.parent.iterdir()] == ["coe"]


def test_unknown_names_list_the_known_ones():
    message = _message(lambda: get_router_class("knnn"))
    assert message.startswith("unknown router 'knnn'; known: 'bert', 'best_single', ")
    assert message.endswith(", 'uniroute' (or give \"module:Class\")")


def test_module_and_class_name_a_router_of_ones_own():
    assert get_router_class("routers.coe:CoERouter") is CoERouter
    assert "cannot import router" in _message(lambda: get_router_class("no_such_module:X"))
    assert "is not a router" in _message(lambda: get_router_class("pathlib:Path"))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package on the path that registers two routers, one under a name of ours."""
    package = tmp_path / "site" / "theirs-1.0.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[collegium.routers]\ntheirs = routers.baselines:RandomRouter\ncoe = evil:Router\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    routers.registry._installed.cache_clear()
    yield
    routers.registry._installed.cache_clear()


@pytest.mark.usefixtures("installed")
def test_installed_packages_register_routers():
    assert get_router_class("theirs").__name__ == "RandomRouter"
    assert get_router_class("coe") is CoERouter, "names of ours cannot be taken over"
    assert list(registered_routers())[-1] == "theirs"
