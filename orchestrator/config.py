"""The one config file. Strict: an unknown key is an error. Reads files, never the environment.

A file is either a bare Collegium config or a Ray Serve config whose application holds one as its
``args``, so that ``collegium serve --config FILE`` and ``serve deploy FILE`` take the same file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from experts.config import (
    EnvironmentName,
    ExpertConfig,
    LatentExpertConfig,
    RetrieverExpertConfig,
    all_cards,
    cards_of,
)
from experts.errors import ExpertConfigError
from experts.library.manifest import Library
from experts.paths import PACKAGE_PREFIX, resolve_path
from experts.types import ExpertCard
from orchestrator.learning.config import ExperimentConfig, LearningConfig, ShadowConfig
from orchestrator.memory.cache import CacheConfig
from orchestrator.memory.config import MemoryConfig, SQLiteMemoryConfig
from orchestrator.memory.sessions import SessionsConfig
from orchestrator.policies import PolicyConfig, UtilityPolicy
from orchestrator.pool import Conversation
from orchestrator.strategies.fallback import FallbackStrategy
from orchestrator.strategies.registry import AnyStrategy
from orchestrator.strict import StrictModel, default_type

__all__ = [
    "ArtefactRouterConfig",
    "BudgetConfig",
    "CollegiumConfig",
    "ConfigError",
    "EmbedderConfig",
    "EmbeddingRouteConfig",
    "LimitsConfig",
    "RayConfig",
    "RouteConfig",
    "ServerConfig",
    "StaticRouterConfig",
    "from_args",
    "load_config",
    "parse_config",
    "validation_lines",
]

BUILDER = "deployments.builders:build_app"
EMBEDDED_CONFIG = Path(__file__).parent / "embedded.yaml"

RouteName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]


class ConfigError(Exception):
    """The config cannot be used. The message says where and what to do, a line per problem."""


class ArtefactRouterConfig(StrictModel):
    """A learned router, as ``collegium train`` wrote it."""

    type: Literal["artefact"] = "artefact"
    """Which kind of router."""
    path: str = Field(min_length=1)
    """The artefact folder: a path, relative ones to the config file, or ``package:NAME/FOLDER``; or
    a folder of releases (``collegium release``), whose release in use is taken up while the service
    runs."""
    reload_s: float = Field(default=5.0, gt=0)
    """Seconds between two looks for a new release."""


class StaticRouterConfig(StrictModel):
    """The same quality for every query: for pools nobody has measured yet."""

    type: Literal["static"]
    """Which kind of router."""
    quality: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(min_length=1)
    """Expected score of each expert, in [0, 1]."""


RouterConfig = Annotated[
    ArtefactRouterConfig | StaticRouterConfig,
    Field(discriminator="type"),
    default_type("artefact"),
]


class RouteConfig(StrictModel):
    """A name users can put in ``model``: router, policy, strategy, and whom to choose from."""

    description: str = ""
    """What it is for, in a sentence; shown in ``/v1/models``."""
    router: str
    """Name of a router from ``routers``."""
    policy: PolicyConfig = UtilityPolicy()
    """How predicted quality and cost become an order of experts."""
    conversation: Conversation = Conversation()
    """What the router sees of a conversation; a type alone may stand for it."""
    strategy: AnyStrategy = FallbackStrategy()
    """How the chosen experts' answers become one."""
    experts: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the experts to choose from; none means all that the router knows."""
    learning: LearningConfig | None = None
    """How feedback corrects the router's predictions; none leaves them alone."""
    shadow: ShadowConfig | None = None
    """A second route that is compared with this one behind users' backs."""


class EmbedderConfig(StrictModel):
    """A name users can put in ``model`` of ``POST /v1/embeddings``."""

    encoder: str = Field(min_length=1)
    """Whose vectors, such as ``minilm-int8``, ``multilingual`` or
    ``sentence-transformers:PATH``."""
    description: str = ""
    """What it is good at, in a sentence; shown in ``/v1/models``."""


class EmbeddingRouteConfig(StrictModel):
    """How ``auto`` chooses among embedders."""

    router: str
    """Name of a router from ``routers``, trained on a table whose models are embedders."""
    embedders: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the embedders to choose from; none means all that the router knows."""


class LimitsConfig(StrictModel):
    """What one ingress replica accepts."""

    max_body_bytes: int = Field(default=4 << 20, ge=1024)
    """Largest request body in bytes; larger ones get 413."""
    max_in_flight: int = Field(default=512, ge=1)
    """Requests in work at the same time; further ones get 429 with ``Retry-After``."""
    timeout_s: float = Field(default=300.0, gt=0)
    """Seconds for one request, all attempts together."""


class BudgetConfig(StrictModel):
    """What each API key may spend, by the experts' prices; all requests' if there are no keys."""

    usd_per_day: float = Field(gt=0)
    """US dollars from one midnight UTC to the next; further requests get 429."""


class ServerConfig(StrictModel):
    """The HTTP side."""

    host: str = "127.0.0.1"
    """Address to listen on. Only loopback by default; whoever opens it should set keys."""
    port: int = Field(default=8000, ge=0, le=65535)
    """TCP port to listen on."""
    api_keys_env: EnvironmentName | None = None
    """Environment variable with the accepted API keys, separated by commas; none asks for none."""
    limits: LimitsConfig = LimitsConfig()
    """How much one ingress replica accepts, and for how long."""
    budget: BudgetConfig | None = None
    """What each API key may spend; none sets no limit."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What the ingress logs; ``info`` has one line per decision, without the prompt."""


class RayConfig(StrictModel):
    """How Ray Serve runs on the machine ``collegium serve`` starts; a cluster has its own."""

    ingress_replicas: int = Field(default=1, ge=1)
    """Replicas of the ingress; each holds all routers."""
    ingress_autoscaling: dict[str, Any] | None = None
    """Ray Serve's ``autoscaling_config`` of the ingress. Excludes ``ingress_replicas``."""
    ha_proxy: bool = True
    """Let HAProxy, which ships with ray[serve], take the connections: several times the speed."""
    throughput_mode: bool = True
    """Run replicas in Serve's own event loop, with gRPC between them: half the time per hop."""
    dashboard: bool = True
    """Start Ray's dashboard, on loopback."""
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    """TCP port of Ray's dashboard."""
    object_store_mib: int = Field(default=100, ge=80)
    """Shared memory of Ray's object store in MiB; answers do not pass through it."""

    @model_validator(mode="after")
    def _one_way_to_scale(self) -> RayConfig:
        # Not model_fields_set: replicas get the whole config, with its defaults written out.
        if self.ingress_autoscaling is not None and self.ingress_replicas != 1:
            raise ValueError(
                f"ingress_replicas ({self.ingress_replicas}) and ingress_autoscaling exclude each "
                "other; leave one out"
            )
        return self


class CollegiumConfig(StrictModel):
    """Everything the service needs to know."""

    experts: tuple[ExpertConfig, ...] = Field(min_length=1)
    """Who can answer."""
    routers: dict[RouteName, RouterConfig] = Field(default_factory=dict)
    """Who predicts which expert answers well, by name."""
    routes: dict[RouteName, RouteConfig] = Field(default_factory=dict)
    """Names users can put in ``model``; ``auto`` is the one for requests without a model."""
    experiments: dict[RouteName, ExperimentConfig] = Field(default_factory=dict)
    """Names users can put in ``model`` too, each for one of two routes, to find the better one."""
    embedders: dict[RouteName, EmbedderConfig] = Field(default_factory=dict)
    """Who turns texts into vectors, by name; without ``embedding_route`` the first one is
    ``auto``."""
    embedding_route: EmbeddingRouteConfig | None = None
    """How ``auto`` chooses among embedders."""
    server: ServerConfig = ServerConfig()
    """Address, keys and limits of the HTTP side."""
    memory: MemoryConfig = SQLiteMemoryConfig()
    """Where decisions, feedback and other things that outlive a request are kept."""
    cache: CacheConfig | None = None
    """Which answers are given again; none gives none."""
    sessions: SessionsConfig | None = None
    """What a conversation's earlier turns are worth; none decides each request by itself."""
    ray: RayConfig = RayConfig()
    """How Ray Serve runs on a single machine."""

    def cards(self) -> dict[str, ExpertCard]:
        """The cards of all experts, adapters included, by name, in config order."""
        return all_cards(self.experts)

    @property
    def fingerprint(self) -> str:
        """A short hash of the whole config, sent with answers as ``system_fingerprint``."""
        text = json.dumps(_ordered(self.model_dump()), sort_keys=True)
        return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]

    @field_validator("experts")
    @classmethod
    def _unique_names(cls, experts: tuple[ExpertConfig, ...]) -> tuple[ExpertConfig, ...]:
        seen: set[str] = set()
        entries = [entry.name for entry in experts]
        for entry in experts:
            if entries.count(entry.name) > 1:
                # Deployments are called like entries, also those that are no expert themselves.
                raise ValueError(f"expert {entry.name!r} is defined twice; names must differ")
            try:
                names = [card.name for card in cards_of(entry)]
            except ValidationError as error:
                lines = "; ".join(validation_lines(error))
                raise ValueError(f"expert {entry.name!r}: {lines}") from None
            if entry.name not in names:  # that of a latent engine names its deployment
                names.append(entry.name)
            for name in names:
                if name in seen:
                    raise ValueError(f"expert {name!r} is defined twice; names must differ")
                seen.add(name)
        return experts

    @model_validator(mode="after")
    def _readers_exist(self) -> CollegiumConfig:
        retrievers = [e for e in self.experts if isinstance(e, RetrieverExpertConfig)]
        names = self.cards().keys() - {entry.name for entry in retrievers}
        for entry in retrievers:
            if entry.reader is not None and entry.reader not in names:
                raise ValueError(
                    f"the reader {entry.reader!r} of expert {entry.name!r} is no expert that is no "
                    f"retriever itself; known: {', '.join(map(repr, sorted(names))) or 'none'}"
                )
        return self

    @model_validator(mode="after")
    def _embedders_hold(self) -> CollegiumConfig:
        for name in self.embedders:
            taken = self.routes.keys() | self.experiments.keys() | self.cards().keys()
            if name == "auto" or name in taken:
                raise ValueError(
                    f"{name!r} names an embedder and a route, experiment or expert; rename one"
                    if name != "auto"
                    else "no embedder may be called 'auto': that is the choice among them"
                )
        route = self.embedding_route
        if route is None:
            return self
        if route.router not in self.routers:
            known = ", ".join(map(repr, self.routers)) or "none"
            raise ValueError(
                f"embedding_route uses the unknown router {route.router!r}; known: {known}"
            )
        for name in route.embedders or ():
            if name not in self.embedders:
                raise ValueError(
                    f"embedding_route uses the unknown embedder {name!r}; "
                    f"known: {', '.join(map(repr, self.embedders)) or 'none'}"
                )
        return self

    @model_validator(mode="after")
    def _references_hold(self) -> CollegiumConfig:
        names = self.cards()
        for route_name, route in self.routes.items():
            if route_name in names:
                raise ValueError(f"{route_name!r} names a route and an expert; rename one")
            if route.router not in self.routers:
                known = ", ".join(map(repr, self.routers)) or "none"
                raise ValueError(
                    f"route {route_name!r} uses the unknown router {route.router!r}; known: {known}"
                )
            listed = route.experts or ()
            for expert in listed:
                if listed.count(expert) > 1:
                    raise ValueError(f"route {route_name!r} lists the expert {expert!r} twice")
                if expert not in names:
                    raise ValueError(
                        f"route {route_name!r} uses the unknown expert {expert!r}; "
                        f"known: {', '.join(map(repr, names))}"
                    )
            if missing := route.policy.uncalibrated:
                raise ValueError(
                    f"the policy {route.policy.type!r} of route {route_name!r} has no "
                    f"{missing!r}; 'collegium calibrate' finds it on an outcome table"
                )
            for expert in route.policy.named_experts:
                if expert not in (listed or names):
                    raise ValueError(
                        f"the policy of route {route_name!r} names {expert!r}, which is none of "
                        f"the route's experts: {', '.join(map(repr, listed or names))}"
                    )
            for expert in route.strategy.named_experts:
                if expert not in names:
                    raise ValueError(
                        f"the strategy of route {route_name!r} names the unknown expert "
                        f"{expert!r}; known: {', '.join(map(repr, names))}"
                    )
            if listed:
                route.strategy.check_experts(route_name, listed, self.experts)
            if route.shadow is not None:
                _check_shadow(route_name, route.shadow, self.routes, names)
        for experiment_name, experiment in self.experiments.items():
            if experiment_name in names or experiment_name in self.routes:
                raise ValueError(
                    f"{experiment_name!r} names an experiment and an expert or a route; rename one"
                )
            _check_arms(experiment_name, experiment, self.routes)
        for router_name, router in self.routers.items():
            for expert in router.quality if isinstance(router, StaticRouterConfig) else ():
                if expert not in names:
                    raise ValueError(
                        f"router {router_name!r} rates the unknown expert {expert!r}; "
                        f"known: {', '.join(map(repr, names))}"
                    )
        return self


def _check_shadow(
    name: str, shadow: ShadowConfig, routes: Iterable[str], experts: Iterable[str]
) -> None:
    if shadow.route == name or shadow.route not in routes:
        raise ValueError(
            f"the shadow of route {name!r} must be another route, got {shadow.route!r}; known: "
            f"{', '.join(map(repr, routes))}"
        )
    if shadow.judge not in experts:
        raise ValueError(
            f"the shadow of route {name!r} names the unknown expert {shadow.judge!r}; known: "
            f"{', '.join(map(repr, experts))}"
        )


def _check_arms(name: str, experiment: ExperimentConfig, routes: Iterable[str]) -> None:
    for arm in (experiment.a, experiment.b):
        if arm not in routes:
            raise ValueError(
                f"experiment {name!r} names the unknown route {arm!r}; known: "
                f"{', '.join(map(repr, routes)) or 'none'}"
            )
    if experiment.a == experiment.b:
        raise ValueError(f"experiment {name!r} compares {experiment.a!r} with itself")


def load_config(source: Path | str | None = None) -> CollegiumConfig:
    """Read a config file; the embedded experts' config if there is none.

    Raises:
        ConfigError: The file is missing, is no YAML, or does not satisfy the schema.
    """
    path = Path(source) if source is not None else EMBEDDED_CONFIG
    content = _read(path)
    return from_args(_unwrap_serve_config(content, path), base=path.parent, name=str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeysLoader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # ValueError: undecodable bytes, or a date that does not exist.
        raise ConfigError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: must hold a mapping with at least the key 'experts'")
    return content


def from_args(args: dict[str, Any], *, base: Path, name: str) -> CollegiumConfig:
    """The config that an application's ``args`` are or point to.

    Args:
        args: A config as a mapping, or ``{config_file: FILE}`` with settings that replace the
            file's own top-level ones.
        base: Folder from which relative paths are taken.
        name: What to call the source in messages.

    Raises:
        ConfigError: It cannot be used; a line per problem.
    """
    if "config_file" not in args:
        return parse_config(args, base=base, name=name)
    file = _config_file(args, base, name)
    rest = {key: value for key, value in args.items() if key != "config_file"}
    return parse_config({**_read(file), **rest}, base=file.parent, name=str(file))


def _config_file(args: dict[str, Any], base: Path, name: str) -> Path:
    reference = str(args["config_file"])
    try:
        return resolve_path(reference if ":" in reference else str(base / reference))
    except ExpertConfigError as error:
        raise ConfigError(f"{name}: config_file: {error}") from error


def parse_config(
    content: dict[str, Any], *, base: Path | None = None, name: str = "config"
) -> CollegiumConfig:
    """Check a config given as a mapping; relative artefact paths are taken from ``base``.

    Raises:
        ConfigError: It does not satisfy the schema; a line per problem.
    """
    content = _with_libraries(content, base or Path(), name)
    try:
        config = CollegiumConfig.model_validate(content)
    except ValidationError as error:
        lines = [f"{name}: {line}" for line in validation_lines(error)]
        raise ConfigError("\n".join(lines)) from error
    except RecursionError as error:
        raise ConfigError(f"{name}: is nested too deeply") from error
    return _absolute_paths(config, base) if base else config


def validation_lines(error: ValidationError) -> list[str]:
    """One line per problem: the dotted path of the field, and what is wrong with it."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        where = ".".join(str(part) for part in problem["loc"])
        message = " ".join(problem["msg"].removeprefix("Value error, ").split())
        lines.append(f"{where}: {message}" if where else message)
    return lines


def _unwrap_serve_config(content: dict[str, Any], path: Path) -> dict[str, Any]:
    if "applications" not in content:
        return content
    applications = content["applications"]
    if not isinstance(applications, list):
        raise ConfigError(f"{path}: applications: must be a list of Ray Serve applications")
    ours = [a for a in applications if isinstance(a, dict) and a.get("import_path") == BUILDER]
    if len(ours) != 1:
        raise ConfigError(
            f"{path}: is a Ray Serve config, but {len(ours)} of its applications have "
            f"import_path {BUILDER!r}; exactly one must"
        )
    config = _mapping(ours[0].get("args"), f"{path}: args of the application {BUILDER!r}")
    http = _mapping(content.get("http_options"), f"{path}: http_options")
    server = _mapping(config.get("server"), f"{path}: server")
    if "config_file" in config and "server" not in config:
        # Settings here replace the file's own top-level ones, and there is more in its server than
        # host and port.
        file = _config_file(config, path.parent, str(path))
        server = _mapping(_read(file).get("server"), f"{file}: server")
    for key in ("host", "port"):
        if key in http:
            server.setdefault(key, http[key])
    return {**config, "server": server} if server else config


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: must be a mapping, got {value!r:.60}")
    return dict(value or {})


class _UniqueKeysLoader(yaml.SafeLoader):
    """YAML without the trap that the last of several equal keys wins silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, if no key occurs twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} occurs twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _ordered(value: Any) -> Any:
    """Plain data with sets in a fixed order, which Python's differ in from process to process."""
    if isinstance(value, dict):
        return {str(key): _ordered(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_ordered(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return value if isinstance(value, str | int | float | None) else str(value)


def _with_libraries(content: dict[str, Any], base: Path, name: str) -> dict[str, Any]:
    """A config whose experts list the adapters of the libraries that they name."""
    experts = content.get("experts")
    if not isinstance(experts, list | tuple):
        return content
    try:
        return {**content, "experts": [_with_library(entry, base) for entry in experts]}
    except ExpertConfigError as error:
        raise ConfigError(f"{name}: experts: {error}") from error


def _with_library(entry: Any, base: Path) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("library"), str):
        return entry
    model, listed = entry.get("model"), entry.get("adapters") or []
    reference: str = entry["library"]
    if reference.startswith(PACKAGE_PREFIX):
        library = Library(resolve_path(reference))
    else:
        library = Library(base / Path(reference).expanduser())
    named = {adapter.get("name") for adapter in listed if isinstance(adapter, dict)}
    adapters = [
        {
            "name": one.name,
            "path": str(library.path(one.path).resolve()),
            "description": one.description,
        }
        for one in library.adapters(str(model)).values()
        if one.name not in named
    ]
    # Other machines have the config without the library's folder.
    rest = {key: value for key, value in entry.items() if key != "library"}
    return {**rest, "adapters": [*listed, *adapters]}


def _absolute_paths(config: CollegiumConfig, base: Path) -> CollegiumConfig:
    def absolute(path: str) -> str:
        # Not Path.expanduser: it fails for users that there are not.
        return str((base / os.path.expanduser(path)).resolve())

    routers = {
        name: router.model_copy(update={"path": absolute(router.path)})
        if isinstance(router, ArtefactRouterConfig) and ":" not in router.path
        else router
        for name, router in config.routers.items()
    }
    memory = config.memory
    if isinstance(memory, SQLiteMemoryConfig) and memory.path:
        memory = memory.model_copy(update={"path": absolute(memory.path)})
    experts = tuple(_with_absolute_folder(entry, absolute) for entry in config.experts)
    return config.model_copy(update={"routers": routers, "experts": experts, "memory": memory})


def _with_absolute_folder(entry: ExpertConfig, absolute: Callable[[str], str]) -> ExpertConfig:
    """An expert whose index or artefact, if it has one, is found from anywhere."""
    if isinstance(entry, RetrieverExpertConfig) and ":" not in entry.index:
        return entry.model_copy(update={"index": absolute(entry.index)})
    if isinstance(entry, LatentExpertConfig) and ":" not in entry.artefact:
        return entry.model_copy(update={"artefact": absolute(entry.artefact)})
    return entry
