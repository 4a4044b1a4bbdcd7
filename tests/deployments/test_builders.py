"""From configs to Serve applications, without starting Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from deployments.builders import PACKAGES, build, build_app, check_packages
from deployments.cli import with_engine
from experts.config import AdapterConfig, VLLMExpertConfig
from orchestrator.config import BUILDER, load_config, parse_config

CONFIGS = sorted((Path(__file__).parents[2] / "deployments" / "configs").glob("*.yaml"))
SCRIPTED = {"name": "a", "engine": "scripted"}


def _deployment(application, name):
    nodes = [argument._bound_deployment for argument in application._bound_deployment.init_args[1:]]
    return next(node for node in nodes if node.name == name)


def test_each_config_entry_becomes_a_deployment():
    application = build(parse_config({"experts": [SCRIPTED, {**SCRIPTED, "name": "b"}]}))
    assert application._bound_deployment.name == "ingress"
    assert _deployment(application, "expert-a").num_replicas == 1
    assert _deployment(application, "expert-b").num_replicas == 1


def test_deployment_options_reach_serve():
    options = {
        "autoscaling": {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 7},
        "num_cpus": 0.5,
        "memory_gib": 1.5,
        "max_ongoing_requests": 11,
        "max_queued_requests": 22,
        "health_check_period_s": 3,
        "health_check_timeout_s": 4,
    }
    application = build(parse_config({"experts": [{**SCRIPTED, "deployment": options}]}))
    deployment = _deployment(application, "expert-a")
    autoscaling = deployment._deployment_config.autoscaling_config
    assert (autoscaling.max_replicas, autoscaling.target_ongoing_requests) == (3, 7)
    assert deployment.ray_actor_options["num_cpus"] == 0.5
    assert deployment.ray_actor_options["memory"] == 1.5 * 2**30
    assert deployment.max_ongoing_requests == 11
    assert deployment.max_queued_requests == 22


def test_the_placement_of_an_engine_holds_all_that_its_replica_asks_for():
    options = {
        "num_cpus": 2,
        "memory_gib": 1.5,
        "ray_actor_options": {"resources": {"big": 1}},
    }
    entry = {"name": "a", "engine": "vllm", "model": "some/model", "device": "cpu"}
    application = build(parse_config({"experts": [{**entry, "deployment": options}]}))
    deployment = _deployment(application, "expert-a")
    (bundle,) = deployment._replica_config.placement_group_bundles
    assert bundle == {"CPU": 2, "big": 1, "memory": 1.5 * 2**30}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_serve_configs_that_hold_ours(path):
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert [application.import_path for application in schema.applications] == [BUILDER]
    config = load_config(path)
    assert "auto" in config.routes
    # What the ingress gets.
    assert parse_config(config.model_dump(mode="json", by_alias=True)) == config


@pytest.mark.parametrize("name", ["cpu-embedded", "remote-apis"])
def test_configs_without_gpu_build(name):
    path = next(path for path in CONFIGS if path.stem == name)
    args = yaml.safe_load(path.read_text())["applications"][0]["args"]
    application = build_app(args)
    assert len(application._bound_deployment.init_args) == 1 + len(load_config(path).experts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["single-gpu", "multi-gpu"])
def test_gpu_experts_are_accepted_by_ray_serve_llm(name):
    pytest.importorskip("vllm")
    from deployments.vllm_server import llm_config

    path = next(path for path in CONFIGS if path.stem == name)
    for entry in load_config(path).experts:
        assert isinstance(entry, VLLMExpertConfig)
        made = llm_config(entry, entry.model, {})
        engine = made.get_engine_config()
        wanted = entry.engine_kwargs.get("tensor_parallel_size", 1)
        assert len(engine.placement_bundles) == wanted
        assert all(bundle["GPU"] == 1 for bundle in engine.placement_bundles)


@pytest.mark.parametrize(
    ("engine_kwargs", "executor", "variable"),
    [
        ({}, "uni", "0"),
        ({"tensor_parallel_size": 2}, "mp", None),
        ({"distributed_executor_backend": "mp"}, "mp", None),
    ],
)
def test_engines_on_cpus_have_one_process_unless_split(engine_kwargs, executor, variable):
    pytest.importorskip("vllm")
    from deployments.vllm_hooks import keep_executor
    from deployments.vllm_server import llm_config, vllm_environment

    entry = VLLMExpertConfig(
        name="base", engine="vllm", model="some/model", device="cpu", engine_kwargs=engine_kwargs
    )
    made = llm_config(entry, entry.model, {})
    keep_executor(made)
    chosen = made.get_engine_config().get_initialization_kwargs()
    assert chosen["distributed_executor_backend"] == executor
    assert vllm_environment(entry).get("VLLM_ENABLE_V1_MULTIPROCESSING") == variable


def test_cloud_adapters_are_left_to_ray_serve_llm():
    pytest.importorskip("vllm")
    from deployments.vllm_server import llm_config

    adapter = AdapterConfig(name="sql", path="s3://bucket/adapters/sql")
    entry = VLLMExpertConfig(name="base", engine="vllm", model="some/model", adapters=(adapter,))
    made = llm_config(entry, entry.model, {})
    assert made.lora_config.dynamic_lora_loading_path == "s3://bucket/adapters"
    assert made.engine_kwargs["enable_lora"] is True


def test_local_models_move_to_another_engine():
    config = with_engine(load_config(), "transformers")
    (entry,) = config.experts
    assert entry.engine == "transformers"
    assert config.cards().keys() == load_config().cards().keys()


def test_engines_on_gpus_move_to_the_cpu():
    entry = {"name": "a", "engine": "vllm", "model": "some/model", "device": "gpu"}
    found = with_engine(parse_config({"experts": [entry, SCRIPTED | {"name": "b"}]}), "vllm")
    moved = found.experts[0]
    assert isinstance(moved, VLLMExpertConfig)
    assert moved.device == "cpu"
    assert _deployment(build(found), "expert-a").ray_actor_options.get("num_gpus", 0) == 0


def test_the_five_packages_come_from_one_place():
    check_packages()
    assert set(PACKAGES) == {"deployments", "evals", "experts", "orchestrator", "routers"}
