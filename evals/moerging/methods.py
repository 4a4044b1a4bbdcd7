"""Methods by name. Each says for every question how adapters are to be used.

Whole-adapter methods choose through the project's own routers and its strategy ``mix``, so what is
measured here is what a route does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from evals.moerging.setting import BASE_NAME, Question, Setting
from evals.moerging.taxonomy import Taxonomy
from experts.config import TokenRouterConfig
from experts.errors import ExpertConfigError
from experts.library.examiner import Examiner
from experts.lora import NO_ADAPTER, AdapterUse
from orchestrator.decision import Candidate, Decision
from orchestrator.strategies.mix import MixStrategy
from routers.base import Query
from routers.centroids import CentroidsRouter
from routers.combined import make_member

__all__ = ["ENCODER", "METHODS", "Chooser", "Method", "Ready", "bases_own", "methods"]

ENCODER = CentroidsRouter().encoder
"""What all routers read by, so that methods are compared and not encoders."""

Chooser = Callable[[int], AdapterUse]
"""From a question's position to how adapters are used for it."""


class Ready(NamedTuple):
    """A method that has learnt what it learns.

    Attributes:
        examiner: Hosts what it needs, and no more.
        choose: Says for a question how adapters are used.
    """

    examiner: Examiner
    choose: Chooser


@dataclass(frozen=True, slots=True)
class Method:
    """A way to use a library.

    Attributes:
        name: In reports.
        taxonomy: Its place among others; none for what is no method, such as the base alone.
        prepare: Given the setting and a seed, learns what there is to learn.
        needs: What the setting must have, see ``Setting.has``.
        seeded: Whether seeds change anything.
    """

    name: str
    taxonomy: Taxonomy | None
    prepare: Callable[[Setting, int], Ready]
    needs: tuple[str, ...] = ()
    seeded: bool = False

    def seeds(self, setting: Setting, most: int) -> range:
        """The seeds there are: of those that were made elsewhere, one for each folder."""
        if self.seeded:
            return range(most)
        made = [len(setting.folders(need)) for need in self.needs if "/" in need]
        return range(*made or [1])


def _base(setting: Setting, seed: int) -> Ready:
    return Ready(setting.host(), lambda place: NO_ADAPTER)


def _oracle(setting: Setting, seed: int) -> Ready:
    hosted = setting.host()

    def choose(place: int) -> AdapterUse:
        domain = setting.questions[place].domain
        return _mixed(hosted, {domain: 1.0} if domain in setting.adapters else {}, "outputs")

    return Ready(hosted, choose)


def _uniform(setting: Setting, seed: int) -> Ready:
    hosted = setting.host()
    use = _mixed(hosted, dict.fromkeys(setting.adapters, 1 / len(setting.adapters)), "outputs")
    return Ready(hosted, lambda place: use)


def _reference(name: str) -> Callable[[Setting, int], Ready]:
    def prepare(setting: Setting, seed: int) -> Ready:
        hosted, use = setting.host_reference(setting.references[name][seed])
        return Ready(hosted, lambda place: use)

    return prepare


def _token_router(**config: Any) -> Callable[[Setting, int], Ready]:
    """A token router of the engine.

    Args:
        **config: As under ``token_routers``; ``gates`` names those of the setting.
    """

    def prepare(setting: Setting, seed: int) -> Ready:
        gates = config.get("gates")
        found = {} if gates is None else {"gates": str(setting.gates[gates][seed])}
        router = {"name": "router", "adapters": tuple(setting.adapters), **config, **found}
        hosted = setting.host(TokenRouterConfig.model_validate(router))
        return Ready(hosted, lambda place: AdapterUse(router="router"))

    return prepare


def _lorahub(setting: Setting, seed: int) -> Ready:
    from experts.library.merging import lorahub_weights

    hosted = setting.host()
    uses: dict[str, AdapterUse] = {}

    def choose(place: int) -> AdapterUse:
        domain = setting.questions[place].domain
        if domain not in uses:
            shown = hosted.read([question.pair for question in setting.examples[domain]])
            weights = lorahub_weights(hosted, [*setting.adapters], shown, seed=seed)
            uses[domain] = _mixed(hosted, weights, "parameters")
        return uses[domain]

    return Ready(hosted, choose)


def _routed(
    router: str, strategy: MixStrategy | None = None, *, by_domain: bool = False
) -> Callable[[Setting, int], Ready]:
    """A router of the project that was fitted on the setting's table, and what follows from it.

    Args:
        router: Its name.
        strategy: How adapters are mixed; none takes the best.
        by_domain: Whether one choice is made for each domain, by its examples.
    """

    def prepare(setting: Setting, seed: int) -> Ready:
        assert setting.table is not None
        fitted = make_member(f"{router} encoder={ENCODER}").fit(setting.table)
        names = [BASE_NAME, *setting.adapters]
        hosted = setting.host()

        soups: dict[str, AdapterUse] = {}

        def by(asked: Sequence[Question]) -> AdapterUse:
            queries = [Query(one.prompt) for one in asked]
            quality = fitted.predict(queries, setting.table_models).quality.mean(axis=0)
            ranked = sorted(zip(names, map(float, quality), strict=True), key=lambda one: -one[1])
            if strategy is None:
                best = ranked[0][0]
                return _mixed(hosted, {} if best == BASE_NAME else {best: 1.0}, "outputs")
            decision = Decision(
                experts=tuple(name for name, _ in ranked),
                candidates=tuple(Candidate(name, quality=value) for name, value in ranked),
            )
            return _mixed(hosted, strategy.shares(decision), strategy.merging)

        def choose(place: int) -> AdapterUse:
            asked = setting.questions[place]
            if not by_domain:
                return by([asked])
            if asked.domain not in soups:
                soups[asked.domain] = by(setting.examples[asked.domain])
            return soups[asked.domain]

        return Ready(hosted, choose)

    return prepare


def bases_own(setting: Setting) -> list[bool]:
    """Which questions the router ``centroids`` leaves to the base: near no adapter's samples."""
    assert setting.table is not None
    fitted = CentroidsRouter(encoder=ENCODER).fit(setting.table)
    asked = [Query(question.prompt) for question in setting.questions]
    predicted = fitted.predict(asked, setting.table_models)
    return [bool(row.argmax() == 0) for row in predicted.quality]


def _mixed(hosted: Examiner, shares: Mapping[str, float], merging: str) -> AdapterUse:
    adapters = hosted.adapters
    if not shares:
        return NO_ADAPTER
    if merging == "parameters":
        return AdapterUse(((adapters.fused(shares), 1.0),))
    return AdapterUse(tuple((adapters.adapter(name), share) for name, share in shares.items()))


def _mix(**settings: Any) -> MixStrategy:
    return MixStrategy.model_validate({"type": "mix", "base": BASE_NAME, **settings})


_UNTRAINED = Taxonomy(granularity="task", selection="dense", aggregation="parameters")
_PER_QUERY = Taxonomy(routing_data="expert")
_PER_TOKEN = Taxonomy(granularity="step", depth="module", aggregation="outputs")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("base", None, _base),
        Method("oracle adapter", None, _oracle),
        Method("uniform merge", replace(_UNTRAINED, aggregation="outputs"), _uniform),
        Method("TIES", _UNTRAINED, _reference("ties"), ("references/ties",)),
        Method("DARE", _UNTRAINED, _reference("dare"), ("references/dare",)),
        Method("multitask", Taxonomy(training="custom", data="shared", granularity="task"),
               _reference("multitask"), ("references/multitask",)),
        Method("multitask MoE", replace(_PER_TOKEN, training="custom", data="shared",
               routing_data="expert"), _reference("multitask-moe"), ("references/multitask-moe",)),
        Method("LoraRetriever selection", _PER_QUERY, _routed("centroids"), ("table",)),
        Method("pilots", _PER_QUERY, _routed("pilots"), ("table",)),
        Method("ridge", _PER_QUERY, _routed("ridge"), ("table",)),
        Method("kNN", _PER_QUERY, _routed("knn"), ("table",)),
        Method("kmeans", _PER_QUERY, _routed("kmeans"), ("table",)),
        Method("coe", _PER_QUERY, _routed("coe"), ("table",)),
        Method("Nexus", replace(_PER_QUERY, data="shared"), _routed("nexus"), ("table",)),
        Method("LoraRetriever mixture", replace(_PER_QUERY, aggregation="outputs"),
               _routed("centroids", _mix(weights="uniform")), ("table",)),
        Method("LoraRetriever fusion", replace(_PER_QUERY, aggregation="parameters"),
               _routed("centroids", _mix(weights="uniform", merging="parameters")), ("table",)),
        Method("AdapterSoup", replace(_UNTRAINED, routing_data="target", selection="sparse",
               user_data="few-shot"), _routed("centroids", _mix(weights="uniform",
               merging="parameters"), by_domain=True), ("table", "examples")),
        Method("TTMM", replace(_PER_QUERY, training="custom", aggregation="parameters"),
               _routed("centroids", _mix(top_k=50)), ("table",)),
        Method("SMEAR-style", replace(_PER_QUERY, selection="dense", aggregation="parameters"),
               _routed("ridge", _mix(top_k=64, min_share=0.0, merging="parameters")), ("table",)),
        Method("Arrow", _PER_TOKEN, _token_router(method="arrow")),
        Method("SpectR", _PER_TOKEN, _token_router(method="spectr", top_k=4)),
        Method("PHATGOOSE", replace(_PER_TOKEN, training="custom", routing_data="expert"),
               _token_router(gates="phatgoose"), ("gates/phatgoose",)),
        Method("average activation", replace(_PER_TOKEN, routing_data="expert"),
               _token_router(gates="average"), ("gates/average",)),
        Method("DUME gates", replace(_PER_TOKEN, data="shared", routing_data="expert"),
               _token_router(gates="ridge"), ("gates/ridge",)),
        Method("DUME", replace(_PER_TOKEN, training="custom", data="shared",
               routing_data="expert"), _reference("upcycled"), ("references/upcycled",)),
        Method("LoraHub", replace(_UNTRAINED, routing_data="target", generalisation="out",
               user_data="few-shot"), _lorahub, ("examples",), seeded=True),
    )
}  # fmt: skip


def methods(setting: Setting, names: Sequence[str] | None) -> list[Method]:
    """The methods of these names, or all that the setting has what it takes for.

    Raises:
        ExpertConfigError: One is unknown, or lacks something.
    """
    for name in names or ():
        if name not in METHODS:
            known = ", ".join(map(repr, METHODS))
            raise ExpertConfigError(f"unknown method {name!r}; known: {known}")
        lacking = [need for need in METHODS[name].needs if not setting.has(need)]
        if lacking:
            raise ExpertConfigError(f"the method {name!r} needs {' and '.join(lacking)}")
    chosen = [METHODS[name] for name in names or METHODS]
    return [method for method in chosen if all(map(setting.has, method.needs))]
