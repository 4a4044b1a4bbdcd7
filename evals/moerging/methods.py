"""Methods by name. Each says for every question how adapters are to be used.

Whole-adapter methods choose through the project's own routers and its strategy ``mix``, so what is
measured here is what a route does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evals.moerging.setting import BASE, Setting
from evals.moerging.taxonomy import Taxonomy
from experts.errors import ExpertConfigError
from experts.lora import NO_ADAPTER, AdapterUse
from orchestrator.decision import Candidate, Decision
from orchestrator.strategies.mix import MixStrategy
from routers.base import Query, TrainableRouter
from routers.centroids import CentroidsRouter

__all__ = ["METHODS", "Chooser", "Method", "bases_own", "methods"]

Chooser = Callable[[int], AdapterUse]
"""From a question's position to how adapters are used for it."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way to use a library.

    Attributes:
        name: In reports.
        taxonomy: Its place among others; none for what is no method, such as the base alone.
        prepare: Given the setting and a seed, learns what there is to learn and gives who chooses.
        needs: What the setting must have, see ``Setting.has``; none if nothing.
        seeded: Whether seeds change anything.
    """

    name: str
    taxonomy: Taxonomy | None
    prepare: Callable[[Setting, int], Chooser]
    needs: str | None = None
    seeded: bool = False


def _base(setting: Setting, seed: int) -> Chooser:
    return lambda place: NO_ADAPTER


def _named(setting: Setting, name: str) -> AdapterUse:
    return AdapterUse(((setting.examiner.adapters.adapter(name), 1.0),))


def _oracle(setting: Setting, seed: int) -> Chooser:
    def choose(place: int) -> AdapterUse:
        domain = setting.questions[place].domain
        return _named(setting, domain) if domain in setting.adapters else NO_ADAPTER

    return choose


def _uniform(setting: Setting, seed: int) -> Chooser:
    return _mixed(setting, dict.fromkeys(setting.adapters, 1 / len(setting.adapters)), "outputs")


def _reference(name: str) -> Callable[[Setting, int], Chooser]:
    def prepare(setting: Setting, seed: int) -> Chooser:
        use = _named(setting, name)
        return lambda place: use

    return prepare


def _token_router(name: str) -> Callable[[Setting, int], Chooser]:
    return lambda setting, seed: lambda place: AdapterUse(router=name)


def _lorahub(setting: Setting, seed: int) -> Chooser:
    from experts.library.merging import lorahub_weights

    uses: dict[str, AdapterUse] = {}

    def choose(place: int) -> AdapterUse:
        domain = setting.questions[place].domain
        if domain not in uses:
            weights = lorahub_weights(
                setting.examiner, [*setting.adapters], setting.shots(domain), seed=seed
            )
            uses[domain] = AdapterUse(((setting.examiner.adapters.fused(weights), 1.0),))
        return uses[domain]

    return choose


def _routed(
    router: str, strategy: MixStrategy | None = None, **options: Any
) -> Callable[[Setting, int], Chooser]:
    """A router of the project that was fitted on the setting's table, and what follows from it.

    Args:
        router: Its name.
        strategy: How adapters are mixed; none takes the best.
        **options: Of the router.
    """

    def prepare(setting: Setting, seed: int) -> Chooser:
        from routers.registry import get_router_class

        assert setting.table is not None
        made: TrainableRouter = get_router_class(router)(**options)
        fitted = made.fit(setting.table)
        names = [BASE, *setting.adapters]

        def choose(place: int) -> AdapterUse:
            query = Query(setting.questions[place].prompt)
            quality = fitted.predict([query], names).quality[0]
            ranked = sorted(zip(names, map(float, quality), strict=True), key=lambda one: -one[1])
            decision = Decision(
                experts=tuple(name for name, _ in ranked),
                candidates=tuple(Candidate(name, quality=value) for name, value in ranked),
            )
            if strategy is not None:
                shares, merging = strategy.shares(decision), strategy.merging
            else:
                shares = {} if ranked[0][0] == BASE else {ranked[0][0]: 1.0}
                merging = "outputs"
            return _mixed(setting, shares, merging)(place)

        return choose

    return prepare


def bases_own(setting: Setting) -> list[bool]:
    """Which questions the router ``centroids`` leaves to the base: near no adapter's samples."""
    assert setting.table is not None
    names = [BASE, *setting.adapters]
    fitted = CentroidsRouter().fit(setting.table)
    asked = [Query(question.prompt) for question in setting.questions]
    return [bool(row.argmax() == 0) for row in fitted.predict(asked, names).quality]


def _mixed(setting: Setting, shares: Mapping[str, float], merging: str) -> Chooser:
    adapters = setting.examiner.adapters
    if not shares:
        use = NO_ADAPTER
    elif merging == "parameters":
        use = AdapterUse(((adapters.fused(shares), 1.0),))
    else:
        parts = [(adapters.adapter(name), share) for name, share in shares.items()]
        use = AdapterUse(tuple(parts))
    return lambda place: use


def _mix(**settings: Any) -> MixStrategy:
    return MixStrategy.model_validate({"type": "mix", "base": BASE, **settings})


_UNTRAINED = Taxonomy(granularity="task", selection="dense", aggregation="parameters")
_PER_QUERY = Taxonomy(routing_data="expert")
_PER_TOKEN = Taxonomy(granularity="step", depth="module", aggregation="outputs")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("base", None, _base),
        Method("oracle adapter", None, _oracle),
        Method("uniform merge", replace(_UNTRAINED, aggregation="outputs"), _uniform),
        Method("TIES", _UNTRAINED, _reference("ties"), "references/ties"),
        Method("DARE", _UNTRAINED, _reference("dare"), "references/dare"),
        Method("multitask", Taxonomy(training="custom", data="shared", granularity="task"),
               _reference("multitask"), "references/multitask"),
        Method("multitask MoE", replace(_PER_TOKEN, training="custom", data="shared",
               routing_data="expert"), _token_router("multitask"), "mixtures/multitask"),
        Method("LoraRetriever selection", _PER_QUERY, _routed("centroids"), "table"),
        Method("pilots", _PER_QUERY, _routed("pilots"), "table"),
        Method("ridge", _PER_QUERY, _routed("ridge"), "table"),
        Method("kNN", _PER_QUERY, _routed("knn"), "table"),
        Method("Nexus", replace(_PER_QUERY, data="shared"), _routed("nexus"), "table"),
        Method("LoraRetriever mixture", replace(_PER_QUERY, aggregation="outputs"),
               _routed("centroids", _mix(weights="uniform")), "table"),
        Method("LoraRetriever fusion", replace(_PER_QUERY, aggregation="parameters"),
               _routed("centroids", _mix(weights="uniform", merging="parameters")), "table"),
        Method("TTMM", replace(_PER_QUERY, training="custom", aggregation="parameters"),
               _routed("centroids", _mix(top_k=50)), "table"),
        Method("SMEAR-style", replace(_PER_QUERY, selection="dense", aggregation="parameters"),
               _routed("ridge", _mix(top_k=64, min_share=0.0, merging="parameters")), "table"),
        Method("Arrow", _PER_TOKEN, _token_router("arrow")),
        Method("SpectR", _PER_TOKEN, _token_router("spectr")),
        Method("PHATGOOSE", replace(_PER_TOKEN, training="custom", routing_data="expert"),
               _token_router("phatgoose"), "gates/phatgoose"),
        Method("average activation", replace(_PER_TOKEN, routing_data="expert"),
               _token_router("average"), "gates/average"),
        Method("DUME gates", replace(_PER_TOKEN, data="shared", routing_data="expert"),
               _token_router("ridge"), "gates/ridge"),
        Method("LoraHub", replace(_UNTRAINED, routing_data="target", generalisation="out",
               user_data="few-shot"), _lorahub, "examples", seeded=True),
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
        needs = METHODS[name].needs
        if needs is not None and not setting.has(needs):
            raise ExpertConfigError(f"the method {name!r} needs {needs}")
    chosen = [METHODS[name] for name in names or METHODS]
    return [method for method in chosen if method.needs is None or setting.has(method.needs)]
