from __future__ import annotations

import pytest
from filelock import FileLock, Timeout

from experts.errors import ExpertConfigError
from experts.library import manifest
from experts.library.manifest import MANIFEST, Library, LibraryExpert, Provenance


def _expert(name, **fields):
    return LibraryExpert(name=name, base="some/base", path="?", **fields)


def _files(folder):
    (folder / "weights").write_text("numbers")


@pytest.fixture
def library(tmp_path):
    return Library.at(tmp_path / "library")


def test_list_survives_writing_and_reading(library, tmp_path):
    samples = tmp_path / "some.jsonl"
    samples.write_text('{"prompt": "é", "answer": "b"}\n')
    source = Provenance(source="https://example.org/é", licence="MIT")
    listed = library.take_in(_expert("one", provenance=source), _files, samples)
    library.take_in(_expert("two", kind="model", description="Ω"), _files, None)
    again = Library(library.folder)
    assert again.experts == library.experts
    assert again.experts["one"] == listed
    assert again.path(listed.path).joinpath("weights").read_text() == "numbers"
    assert again.path(listed.samples).read_text() == samples.read_text()
    assert [expert.name for expert in again.of("some/base")] == ["one", "two"]
    assert again.bases() == ["some/base"]


def test_removed_expert_takes_its_files_and_no_others(library, tmp_path):
    library.take_in(_expert("one"), _files, None)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    library.experts["two"] = _expert("two").model_copy(update={"path": str(outside)})
    library.experts["three"] = _expert("three").model_copy(update={"path": "../elsewhere"})
    library.save()
    for name in ("one", "two", "three"):
        library.remove(name)
    assert not (library.folder / "adapters/one").exists()
    assert outside.exists()
    assert Library(library.folder).experts == {}
    with pytest.raises(ExpertConfigError, match="has no expert 'one'; it has none"):
        library.remove("one")


def test_what_others_changed_since_the_list_was_read_stays_changed(library):
    """Tests of adapters take minutes; meanwhile others come and go."""
    stale = [Library(library.folder) for _ in range(4)]
    library.take_in(_expert("one"), _files, None)
    stale[0].take_in(_expert("two"), _files, None)
    stale[1].put(_expert("three"))
    assert [*Library(library.folder).experts] == ["one", "two", "three"]
    stale[2].remove("two")
    assert [*Library(library.folder).experts] == ["one", "three"]

    def overwrite(folder):
        raise AssertionError("files of another expert were overwritten")

    with pytest.raises(ExpertConfigError, match="has an expert 'one' already"):
        stale[3].take_in(_expert("one"), overwrite, None)


def test_one_process_at_a_time_changes_the_list(tmp_path, monkeypatch):
    write, written = manifest._write, []

    def alone(file, experts):
        with pytest.raises(Timeout):
            FileLock(file.with_name("library.yaml.lock")).acquire(blocking=False)
        written.append([expert.name for expert in experts])
        write(file, experts)

    monkeypatch.setattr(manifest, "_write", alone)
    library = Library.at(tmp_path / "library")
    library.take_in(_expert("one"), _files, None)
    library.put(_expert("two"))
    library.remove("one")
    assert written == [[], ["one"], ["one", "two"], ["two"]]
    assert Library.at(library.folder).experts == library.experts
    with FileLock(library.folder / "library.yaml.lock", blocking=False):
        pass


def test_name_is_taken_once(library):
    library.take_in(_expert("one"), _files, None)
    with pytest.raises(ExpertConfigError, match="has an expert 'one' already"):
        library.take_in(_expert("one"), _files, None)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("format_version: 2\nexperts: []", "format_version"),
        ("- 1", "valid dictionary"),
        ("a: [", "cannot read"),
        ("experts: [{name: a, base: b, path: c}, {name: a, base: b, path: c}]", "two experts"),
        ("experts: [{name: ../a, base: b, path: c}]", r"experts\.0\.name"),
        ("experts: [{name: a, base: b, path: c, colour: red}]", r"experts\.0\.colour"),
    ],
)
def test_malformed_list_is_refused(tmp_path, text, match):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ExpertConfigError, match=match):
        Library(tmp_path)


def test_folder_without_a_list_says_how_to_begin(tmp_path):
    with pytest.raises(ExpertConfigError, match="'collegium library add' begins one"):
        Library(tmp_path)
