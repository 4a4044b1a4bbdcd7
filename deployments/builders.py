"""From a config to a Ray Serve application. Classes are decorated here, nowhere else."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.deployment import Application

from deployments.engine_server import EngineServer
from deployments.ingress import Ingress
from deployments.vllm_server import VLLMServer, llm_config, vllm_environment
from experts.config import DeploymentConfig, ExpertConfig, VLLMExpertConfig
from orchestrator.config import CollegiumConfig, ConfigError, from_args

__all__ = ["APPLICATION", "build_app", "check_packages"]

APPLICATION = "collegium"
PACKAGES = ("deployments", "evals", "experts", "orchestrator", "routers")

# Requests are counted and decisions logged by the ingress; Serve's own line per request and hop
# would say less and cost more.
_LOGGING = {"enable_access_log": False}


def check_packages() -> None:
    """Make sure that all five packages come from one installation.

    Their names are common words: another distribution may ship a package of the same name.

    Raises:
        ConfigError: One lies elsewhere; names both places.
    """
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != home:
            raise ConfigError(
                f"the package {name!r} should lie in {home / name}, but Python finds {found}; "
                "install collegium in an environment of its own"
            )


def build_app(args: dict[str, Any]) -> Application:
    """Build the application; the ``import_path`` of Ray Serve config files.

    Args:
        args: A Collegium config as a mapping, or ``{config_file: FILE}``, where FILE may be
            ``package:NAME/FILE``.

    Raises:
        ConfigError: The config cannot be used; a line per problem.
    """
    check_packages()
    return build(from_args(args, base=Path.cwd(), name="args"))


def build(config: CollegiumConfig) -> Application:
    """Build the application of a checked config."""
    engines = [_engine(entry) for entry in config.experts]
    autoscaling = config.ray.ingress_autoscaling
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="ingress",
        logging_config=_LOGGING,
        max_ongoing_requests=config.server.limits.max_in_flight + 64,
        ray_actor_options={"num_cpus": 0},
        **(
            {"autoscaling_config": autoscaling}
            if autoscaling
            else {"num_replicas": config.ray.ingress_replicas}
        ),
    )
    return ingress.bind(config.model_dump(mode="json", by_alias=True), *engines)


def _engine(entry: ExpertConfig) -> Application | None:
    if entry.deployment is None:
        return None
    data = entry.model_dump(mode="json")
    options = _options(entry.deployment)
    name = f"expert-{entry.name}"
    if not isinstance(entry, VLLMExpertConfig):
        return serve.deployment(EngineServer, name=name, **options).bind(data)
    if entry.device == "gpu":
        options = {**options, **_gpu_options(entry)}
    else:
        options["ray_actor_options"]["runtime_env"] = _with_environment(entry)
        # Ray Serve LLM puts its engine into the replica's placement group, and makes one that
        # outlives a crashed replica if there is none.
        cpus = max(entry.deployment.num_cpus, 0.001)
        options["placement_group_bundles"] = [{"CPU": cpus}]
    if bundles := options.get("placement_group_bundles"):
        bundles[0] = {**bundles[0], **_reserved(options["ray_actor_options"])}
    return serve.deployment(VLLMServer, name=name, **options).bind(data)


def _options(deployment: DeploymentConfig) -> dict[str, Any]:
    actor: dict[str, Any] = {
        "num_cpus": deployment.num_cpus,
        "num_gpus": deployment.num_gpus,
        **deployment.ray_actor_options,
    }
    if deployment.memory_gib:
        actor["memory"] = int(deployment.memory_gib * 2**30)
    return {
        "logging_config": _LOGGING,
        "ray_actor_options": actor,
        "max_ongoing_requests": deployment.max_ongoing_requests,
        "max_queued_requests": deployment.max_queued_requests,
        "health_check_period_s": deployment.health_check_period_s,
        "health_check_timeout_s": deployment.health_check_timeout_s,
        **(
            {"autoscaling_config": deployment.autoscaling}
            if deployment.autoscaling
            else {"num_replicas": deployment.num_replicas or 1}
        ),
    }


def _reserved(actor: dict[str, Any]) -> dict[str, float]:
    """What a replica asks for beside CPUs and GPUs: its placement group must hold it too."""
    memory = {"memory": actor["memory"]} if "memory" in actor else {}
    return {**(actor.get("resources") or {}), **memory}


def _with_environment(entry: VLLMExpertConfig) -> dict[str, Any]:
    runtime_env = dict(entry.deployment.ray_actor_options.get("runtime_env") or {})
    env_vars = {**vllm_environment(entry), **(runtime_env.get("env_vars") or {})}
    return {**runtime_env, "env_vars": env_vars}


def _gpu_options(entry: VLLMExpertConfig) -> dict[str, Any]:
    """Placement of a GPU engine, as Ray Serve LLM computes it from tensor and pipeline sizes."""
    from ray.serve.llm.deployment import LLMServer

    options: dict[str, Any] = LLMServer.get_deployment_options(llm_config(entry, entry.model, {}))
    environment = options["ray_actor_options"].get("runtime_env") or {}
    actor = {**_options(entry.deployment)["ray_actor_options"], **options["ray_actor_options"]}
    actor["runtime_env"] = {**environment, **_with_environment(entry)}
    # The placement group holds the GPUs; a replica that asked for one besides would wait forever.
    actor["num_gpus"] = 0
    return {**options, "ray_actor_options": actor}
