"""How long one decision takes among 32 experts, on one CPU thread, by encoder.

    OMP_NUM_THREADS=1 python -m benchmarks.decision_latency --data DIR [--out OUT]

``DIR`` holds the table ``mmlu_pro``; its 32 models become experts with prices, and routers learn
its training rows. Timed are, with prompts that no cache knows: the router's prediction alone;
prediction, costs and policy, which the goals are for; and ``Orchestrator.decide``, which also makes
the pool and hands the prediction to a thread; and once more prediction, costs and policy, of
prompts whose vectors are known. CPU time is what the process spent; wall time grows with whatever
else runs on the machine. Also checks that decisions do not depend on the batch.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.encoders import texts_of
from benchmarks.pages import command_line, parser_of, write
from experts.types import ChatRequest, Message
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator
from orchestrator.costs import ExpectedCosts
from orchestrator.options import RoutingOptions
from orchestrator.policies import UtilityPolicy
from orchestrator.pool import estimated_tokens
from routers.base import Query
from routers.combined import make_member
from routers.encoders import forget_vectors
from routers.fitted import FittedRouter
from routers.outcomes import OutcomeTable

# Router to the p50 that is wanted for a prompt of 20 tokens, and of 256 and more.
GOALS_MS = {
    "coe": (6.0, 30.0),
    "coe ngrams=false": (6.0, 30.0),
    "kmeans": (6.0, 30.0),
    "coe encoder=minilm-int8": (6.0, 30.0),
    "coe encoder=multilingual": (6.0, 30.0),
    "coe encoder=static": (1.0, 1.0),
    "coe encoder=static ngrams=false": (1.0, 1.0),
    "coe encoder=characters ngrams=false": (1.0, 1.0),
}
KNOWN_GOAL_MS = 0.2
LENGTHS = (20, 256, 1000)
WARM_UP = 20
BATCHED = 100
# Between quality and cost, so that costs matter for the decisions that are compared.
COST_QUALITY = 0.7


def orchestrator_for(router: FittedRouter) -> Orchestrator:
    """The router's models as experts that differ in price, on one route."""
    names = router.models
    config = parse_config(
        {
            "experts": [
                {"name": name, "engine": "scripted", "output_usd_per_mtok": 0.1 * (1 + number)}
                for number, name in enumerate(names)
            ],
            "routers": {"table": {"type": "static", "quality": dict.fromkeys(names, 0.5)}},
            "routes": {"auto": {"router": "table"}},
        }
    )
    return Orchestrator(config, experts={}, routers={"table": router})


async def measure(
    router: FittedRouter, orchestrator: Orchestrator, texts: list[str]
) -> dict[str, dict[str, float]]:
    """Milliseconds by what is done."""
    costs = ExpectedCosts.of([orchestrator.cards[name] for name in router.models])
    policy = UtilityPolicy(cost_quality=COST_QUALITY)
    clocks: dict[str, list[tuple[float, float]]] = {
        "predict": [], "choose": [], "known": [], "decide": []
    }  # fmt: skip

    def choose(text: str, what: str) -> None:
        started = _clocks()
        quality = router.predict([Query(text)], router.models).quality
        if what == "choose":
            clocks["predict"].append(_since(started))
        policy.choices(router.models, quality, costs.usd([estimated_tokens(text)]))
        clocks[what].append(_since(started))

    for what in ("choose", "known"):
        if what == "choose":
            forget_vectors()
        for text in texts:
            choose(text, what)
    forget_vectors()
    for text in texts:
        request = ChatRequest(model="auto", messages=[Message(role="user", content=text)])
        started = _clocks()
        await orchestrator.decide(request, options=RoutingOptions(cost_quality=COST_QUALITY))
        clocks["decide"].append(_since(started))
    found = {}
    for what, times in clocks.items():
        wall, cpu = np.array(times[WARM_UP:]).T * 1000
        p50, p90 = np.percentile(wall, [50, 90])
        found[what] = {"p50": float(p50), "p90": float(p90), "cpu_p50": float(np.median(cpu))}
    return found


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _clocks()
    return wall - started[0], cpu - started[1]


def batch_difference(router: FittedRouter, texts: list[str]) -> tuple[float, int]:
    """Greatest difference of a quality alone and in a batch, and how many decisions differ."""
    queries = [Query(text) for text in texts]
    forget_vectors()
    together = router.predict(queries, router.models).quality
    forget_vectors()
    alone = np.concatenate([router.predict([q], router.models).quality for q in queries[::-1]])
    alone = alone[::-1]
    policy = UtilityPolicy(cost_quality=COST_QUALITY)
    costs = np.tile(np.linspace(0.03, 1.0, len(router.models)), (len(texts), 1))
    first, second = (policy.choices(router.models, quality, costs) for quality in (alone, together))
    return float(np.abs(alone - together).max()), int((first != second).sum())


def markdown(command: str, results: dict[str, Any]) -> str:
    """All tables as a page."""
    lines = ["# Latency of a decision", "", f"`{command}`", ""]
    lines += [
        f"{results['models']} experts, {results['repetitions']} prompts each, in ms. "
        "Predict: the router alone. Choose: prediction, costs and policy. Decide: "
        "`Orchestrator.decide`, with the pool and a hop to the router's thread. CPU: median of "
        "what the process spent, without waiting for other processes, which the goal is held to. "
        f"Known: choose again, the vector in memory; its goal is {KNOWN_GOAL_MS} ms. "
        f"Load average at the start and end: {results['load'][0]:.1f}, {results['load'][1]:.1f}.",
        "",
        "| router | tokens | predict p50, p90 | CPU | choose p50, p90 | CPU | goal | met "
        "| known p50, p90 | CPU | decide p50, p90 | CPU |",
        "|---|--:|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    clocks_of = ("predict", "choose", "known", "decide")
    for row in results["rows"]:
        predict, choose, known, decide = (
            f"{at['p50']:.2f}, {at['p90']:.2f} | {at['cpu_p50']:.2f}"
            for at in (row["ms"][what] for what in clocks_of)
        )
        goal = row["goal_ms"]
        met = "yes" if row["ms"]["choose"]["cpu_p50"] <= goal else "no"
        lines.append(
            f"| `{row['router']}` | {row['tokens']} | {predict} | {choose} | "
            f"{goal:g} | {met} | {known} | {decide} |"
        )
    lines += ["", f"Alone and in a batch of {BATCHED}, 20 tokens each:", ""]
    lines += ["| router | greatest difference of a quality | decisions that differ |"]
    lines += ["|---|--:|--:|"]
    for name, (difference, differ) in results["batches"].items():
        lines.append(f"| `{name}` | {difference:g} | {differ} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, and write it where wanted."""
    parser = parser_of(__doc__)
    parser.add_argument("--routers", nargs="+", choices=list(GOALS_MS), default=list(GOALS_MS))
    parser.add_argument("--repetitions", type=int, default=200)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    table = OutcomeTable.load(arguments.data / "mmlu_pro")
    texts = {n: texts_of(n, arguments.repetitions + WARM_UP) for n in LENGTHS}
    rows, batches = [], {}
    for name in tqdm(arguments.routers, delay=2):
        router = make_member(name).fit(table)
        orchestrator = orchestrator_for(router)
        for tokens in LENGTHS:
            rows.append(
                {
                    "router": name,
                    "tokens": tokens,
                    "ms": asyncio.run(measure(router, orchestrator, texts[tokens])),
                    "goal_ms": GOALS_MS[name][tokens > 20],
                }
            )
        batches[name] = batch_difference(router, texts[20][:BATCHED])
    results = {
        "models": len(table.models),
        "repetitions": arguments.repetitions,
        "load": [load_before, os.getloadavg()[0]],
        "rows": rows,
        "batches": batches,
    }
    page = markdown(command_line(), results)
    print(page)
    write(arguments.out, page, results)


if __name__ == "__main__":
    main()
