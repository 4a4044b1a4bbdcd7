from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.config import TransformersExpertConfig
from experts.library.manifest import Library, LibraryExpert
from orchestrator.config import (
    ArtefactRouterConfig,
    BudgetConfig,
    CollegiumConfig,
    ConfigError,
    load_config,
    parse_config,
)
from orchestrator.memory.config import SQLiteMemoryConfig
from tests.orchestrator.support import config_content

MINIMAL = {"experts": [{"name": "a", "engine": "scripted"}]}


def write(folder: Path, content: Any) -> Path:
    path = folder / "config.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    path.write_text(text, encoding="utf-8")
    return path


def error_of(content: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(content)
    return str(caught.value)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The usual config with the value at a dotted path replaced."""
    content: Any = yaml.safe_load(yaml.safe_dump(config_content()))
    *folders, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = content
    for part in folders:
        place = place.setdefault(part, {}) if isinstance(place, dict) else place[part]
    place[last] = value
    return dict(content)


def test_a_minimal_config_has_defaults():
    config = parse_config(MINIMAL)
    assert config.server.host == "127.0.0.1"
    assert list(config.cards()) == ["a"]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("expert", [], "expert: Extra inputs are not permitted"),
        ("experts", [], "experts: "),
        ("experts.0.engine", "magic", "'vllm', 'transformers', 'openai', 'scripted'"),
        ("experts.0.name", "two words", "experts.0.scripted.name: "),
        ("experts.0.prize", 1, "experts.0.scripted.prize: Extra"),
        ("experts.0.input_usd_per_mtok", -1, "input_usd_per_mtok"),
        ("experts.0.input_usd_per_mtok", float("inf"), "finite"),
        ("experts.0.input_usd_per_mtok", float("nan"), "input_usd_per_mtok"),
        ("routers.table.quality.small", 1.5, "routers.table.static.quality.small: "),
        ("routers.table.quality.small", float("nan"), "routers.table.static.quality.small: "),
        ("routers.table.kind", "static", "routers.table.static.kind: Extra"),
        ("routes.auto.policy.cost_quality", 2, "routes.auto.policy.utility.cost_quality: "),
        ("routes.auto.strategy", {"type": "oracle"}, "'single', 'fallback'"),
        ("routes.auto.strategy", {"type": "fallback", "max_attempts": 0}, "max_attempts"),
        ("routes.auto.experts", [], "routes.auto.experts: "),
        ("routes.with space", {"router": "table"}, "routes.with space"),
        ("server.port", 70000, "server.port: "),
        ("server.api_keys_env", "not a name", "server.api_keys_env: "),
        ("server.limits.max_in_flight", 0, "server.limits.max_in_flight: "),
        ("server.limits.timeout_s", float("inf"), "server.limits.timeout_s: "),
        ("ray.object_store_mib", 1, "ray.object_store_mib: "),
    ],
)
def test_wrong_values_are_refused_with_their_place(path, value, said):
    assert said in error_of(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("experts.1.name", "small", "expert 'small' is defined twice"),
        ("routes.small", {"router": "table"}, "'small' names a route and an expert"),
        ("routes.auto.router", "tabel", "unknown router 'tabel'; known: 'table'"),
        ("routes.auto.experts", ["tiny"], "'tiny'; known: 'small', 'medium', 'large'"),
        ("routes.auto.experts", ["small", "small"], "route 'auto' lists the expert 'small' twice"),
        ("routers.table.quality", {"tiny": 1}, "router 'table' rates the unknown expert 'tiny'"),
        ("ray", {"ingress_replicas": 2, "ingress_autoscaling": {}}, "ingress_replicas (2)"),
    ],
)
def test_rules_across_fields_name_the_values(path, value, said):
    assert said in error_of(changed(path, value))


def test_embedders_share_the_name_space_of_experiments():
    content = changed("experiments.ab", {"a": "auto", "b": "auto-cheap"})
    assert parse_config(content).experiments
    content["embedders"] = {"ab": {"encoder": "hashing"}}
    assert "'ab' names an embedder and a route, experiment or expert" in error_of(content)


def test_adapters_share_the_name_space_of_experts():
    expert = {"name": "a", "engine": "vllm", "model": "m", "adapters": [{"name": "a", "path": "p"}]}
    assert "expert 'a' is defined twice" in error_of({"experts": [expert]})


def test_every_problem_has_its_own_line():
    content = changed("server.port", -1)
    content["routes"]["auto"]["typo"] = 1
    lines = error_of(content).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("config: ") for line in lines)


def test_fields_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse_config(MINIMAL).server.port = 1


def models(schema: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("CollegiumConfig", schema), *schema["$defs"].items()]


@pytest.mark.parametrize(("name", "model"), models(CollegiumConfig.model_json_schema()))
def test_every_field_is_documented(name, model):
    bare = [field for field, entry in model["properties"].items() if not entry.get("description")]
    assert not bare
    assert model["description"]


def test_relative_artefact_paths_start_at_the_config_file(tmp_path):
    content = changed("routers.knn", {"type": "artefact", "path": "routers/knn"})
    router = load_config(write(tmp_path, content)).routers["knn"]
    assert isinstance(router, ArtefactRouterConfig)
    assert router.path == str(tmp_path.resolve() / "routers/knn")


def test_a_router_without_type_is_an_artefact_and_a_memory_a_file(tmp_path):
    content = changed("routers.knn", {"path": "routers/knn"})
    config = load_config(write(tmp_path, {**content, "memory": {"path": "m.db"}}))
    home = tmp_path.resolve()
    assert config.routers["knn"] == ArtefactRouterConfig(path=str(home / "routers/knn"))
    assert config.memory == SQLiteMemoryConfig(path=str(home / "m.db"))


def test_a_tilde_is_the_home_of_whoever_starts_the_service(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    retriever = {"name": "docs", "engine": "retriever", "index": "~/index"}
    content = {
        "experts": [retriever],
        "routers": {"knn": {"path": "~/knn"}, "other": {"path": "~nobody at all/knn"}},
        "memory": {"path": "~/m.db"},
    }
    config = load_config(write(tmp_path, content)).model_dump()
    assert config["experts"][0]["index"] == "/home/me/index"
    assert config["routers"]["knn"]["path"] == "/home/me/knn"
    assert config["memory"]["path"] == "/home/me/m.db"
    assert config["routers"]["other"]["path"] == str(tmp_path.resolve() / "~nobody at all/knn")


@pytest.mark.parametrize("path", ["package:routers/embedded/auto", "/opt/coe"])
def test_other_artefact_paths_stay(tmp_path, path):
    content = changed("routers.coe", {"type": "artefact", "path": path})
    router = load_config(write(tmp_path, content)).routers["coe"]
    assert isinstance(router, ArtefactRouterConfig)
    assert router.path == path


def serve_config(args: Any, **more: Any) -> dict[str, Any]:
    ours = {"name": "c", "import_path": "deployments.builders:build_app", "args": args}
    return {"applications": [{"name": "other", "import_path": "a:b"}, ours], **more}


def test_a_serve_config_holds_ours(tmp_path):
    http = {"host": "0.0.0.0", "port": 9000, "request_timeout_s": 5}
    content = serve_config(config_content(server={"port": 8001}), http_options=http)
    config = load_config(write(tmp_path, content))
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8001)


def test_a_serve_config_keeps_the_server_of_the_file_it_points_to(tmp_path):
    server = {"api_keys_env": "KEYS", "budget": {"usd_per_day": 3}, "port": 8001}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_content(server=server)))
    http = {"host": "0.0.0.0", "port": 9000}
    content = serve_config({"config_file": "c.yaml"}, http_options=http)
    found = load_config(write(tmp_path, content)).server
    assert (found.api_keys_env, found.budget) == ("KEYS", BudgetConfig(usd_per_day=3))
    assert (found.host, found.port) == ("0.0.0.0", 8001)
    content = serve_config({"config_file": "c.yaml", "server": {}}, http_options=http)
    replaced = load_config(write(tmp_path, content)).server
    assert (replaced.api_keys_env, replaced.port) == (None, 9000)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"applications": []}, "0 of its applications"),
        ({"applications": None}, "applications: must be a list"),
        ({"applications": 5}, "applications: must be a list"),
        ({"applications": "abc"}, "applications: must be a list"),
        (serve_config("abc"), "args"),
        (serve_config(MINIMAL, http_options=5), "http_options: must be a mapping"),
        (serve_config({**MINIMAL, "server": 5}), "server: must be a mapping"),
        (serve_config(None), "experts: Field required"),
    ],
)
def test_broken_serve_configs_are_refused(tmp_path, content, said):
    with pytest.raises(ConfigError, match=said):
        load_config(write(tmp_path, content))


def test_two_applications_of_ours_are_one_too_many(tmp_path):
    content = serve_config(MINIMAL)
    content["applications"].append(content["applications"][1])
    with pytest.raises(ConfigError, match="2 of its applications"):
        load_config(write(tmp_path, content))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("experts: [", "is not valid YAML"),
        ("experts: {", "is not valid YAML"),
        ("a: b: c", "mapping values are not allowed here"),
        ("\tx: 1", "is not valid YAML"),
        ("a: 2020-13-45", "is not valid YAML"),
        ("a: &x [*y]", "is not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("[" * 5000, "is not valid YAML"),
        ("server: {}\nserver: {}", "the key 'server' occurs twice"),
        ("- a", "must hold a mapping"),
        ("", "must hold a mapping"),
        ("plain", "must hold a mapping"),
    ],
)
def test_malformed_yaml_gives_one_clear_line(tmp_path, text, said):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


def test_bytes_that_are_no_text_give_one_clear_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(path)


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_files_that_cannot_be_read_are_named(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / name)


def test_merged_yaml_keys_may_repeat(tmp_path):
    text = "experts:\n- &a {name: a, engine: scripted}\n- {<<: *a, name: b}\n"
    assert list(load_config(write(tmp_path, text)).cards()) == ["a", "b"]


def test_the_fingerprint_changes_with_the_config_only():
    one, same = parse_config(config_content()), parse_config(config_content())
    assert one.fingerprint == same.fingerprint
    assert one.fingerprint != parse_config(changed("server.port", 1234)).fingerprint
    assert one.fingerprint.startswith("fp_")


def test_the_fingerprint_is_the_same_in_every_process():
    code = (
        "from orchestrator.config import parse_config\n"
        "print(parse_config({'experts': [{'name': 'a', 'engine': 'scripted',"
        " 'capabilities': ['chat', 'tools', 'choice', 'images', 'logprobs']}]}).fingerprint)"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(found) == 1


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=4)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)
experts = st.fixed_dictionaries(
    {"name": st.sampled_from(["a", "b"]), "engine": st.sampled_from(["scripted", "openai", "x"])},
    optional={
        key: anything
        for key in ("rules", "capabilities", "context_length", "input_usd_per_mtok", "deployment")
    },
)
mappings = st.fixed_dictionaries(
    {},
    optional={
        "experts": st.lists(experts | anything, max_size=3) | anything,
        "routers": st.dictionaries(st.sampled_from(["r", ""]), anything, max_size=2) | anything,
        "routes": st.dictionaries(st.sampled_from(["auto", "a"]), anything, max_size=2) | anything,
        "server": anything,
        "ray": anything,
        "applications": anything,
        "config_file": anything,
    },
)


@settings(max_examples=200, deadline=None)
@given(mappings)
def test_whatever_a_mapping_holds_only_config_errors_escape(content):
    with suppress(ConfigError):
        assert parse_config(content).fingerprint


@settings(max_examples=100, deadline=None)
@given(mappings | anything)
def test_whatever_a_file_holds_only_config_errors_escape(tmp_path_factory, content):
    with suppress(ConfigError):
        load_config(write(tmp_path_factory.mktemp("config"), content))


def test_a_config_takes_all_adapters_of_a_library(tmp_path):
    folder = tmp_path / "library"
    library = Library.at(folder)
    for name, base in (("maths", "smol"), ("code", "smol"), ("other", "big")):
        (folder / name).mkdir()
        library.experts[name] = LibraryExpert(
            name=name, base=base, path=name, description=f"About {name}."
        )
    library.save()
    file = tmp_path / "collegium.yaml"
    entry = "{name: base, engine: transformers, model: %s, library: library, adapters: [%s]}"
    file.write_text(f"experts: [{entry % ('smol', '{name: code, path: elsewhere}')}]\n")
    found = load_config(file).experts[0]
    assert isinstance(found, TransformersExpertConfig)
    assert [(a.name, a.path, a.description) for a in found.adapters] == [
        ("code", "elsewhere", ""),
        ("maths", str(folder / "maths"), "About maths."),
    ]
    file.write_text(f"experts: [{entry % ('tiny', '')}]\n")
    with pytest.raises(
        ConfigError, match="has no adapter of 'tiny'; it has experts of 'smol', 'big'"
    ):
        load_config(file)
    file.write_text("experts: [{name: b, engine: transformers, model: m, library: gone}]\n")
    with pytest.raises(ConfigError, match=r"holds no library\.yaml"):
        load_config(file)
