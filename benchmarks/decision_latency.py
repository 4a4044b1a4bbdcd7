"""How long one decision takes among 32 experts, on one CPU thread, by encoder.

    OMP_NUM_THREADS=1 python -m benchmarks.decision_latency --data DIR [--out OUT]

``DIR`` holds the table ``mmlu_pro``; its 32 models become experts with prices, and ``coe`` learns
its training rows with each encoder. Three things are timed with prompts that no cache knows: the
router's prediction alone; prediction, costs and policy, which the goals are for; and
``Orchestrator.decide``, which also makes the pool and hands the prediction to a thread. CPU time is
what the process spent; wall time grows with whatever else runs on the machine. Also checks that
decisions do not depend on the batch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.encoders import forget, texts_of
from experts.types import ChatRequest, Message
from orchestrator.config import parse_config
from orchestrator.core import Orchestrator
from orchestrator.policies import UtilityPolicy, expected_cost_usd, relative_costs
from routers.base import Query
from routers.coe import CoERouter
from routers.outcomes import OutcomeTable

# Encoder to the p50 that is wanted for a prompt of 20 tokens, and of 256 and more.
GOALS_MS = {
    "minilm-l2-int8": (6.0, 30.0),
    "minilm-int8": (6.0, 30.0),
    "multilingual": (6.0, 30.0),
    "static": (1.0, 1.0),
    "characters": (0.2, 0.2),
    "hashing": (0.2, 0.2),
    "surface": (0.2, 0.2),
}
LENGTHS = (20, 256, 1000)
WARM_UP = 20
BATCHED = 100
# Between quality and cost, so that costs matter for the decisions that are compared.
COST_QUALITY = 0.7


def orchestrator_for(router: CoERouter) -> Orchestrator:
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
    router: CoERouter, orchestrator: Orchestrator, encoder: str, texts: list[str]
) -> dict[str, dict[str, float]]:
    """Milliseconds by what is done."""
    cards = [orchestrator.cards[name] for name in router.models]
    policy = UtilityPolicy(COST_QUALITY)
    clocks: dict[str, list[tuple[float, float]]] = {"predict": [], "choose": [], "decide": []}
    forget(encoder)
    for text in texts:
        started = _clocks()
        quality = router.predict([Query(text)], router.models).quality[0]
        clocks["predict"].append(_since(started))
        costs = [expected_cost_usd(card, len(text) / 4) for card in cards]
        policy.choose(quality.tolist(), relative_costs(cards, costs))
        clocks["choose"].append(_since(started))
    forget(encoder)
    for text in texts:
        request = ChatRequest(model="auto", messages=[Message(role="user", content=text)])
        started = _clocks()
        await orchestrator.decide(request, cost_quality=COST_QUALITY)
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


def batch_difference(router: CoERouter, encoder: str, texts: list[str]) -> tuple[float, int]:
    """Greatest difference of a quality alone and in a batch, and how many decisions differ."""
    queries = [Query(text) for text in texts]
    forget(encoder)
    together = router.predict(queries, router.models).quality
    forget(encoder)
    alone = np.concatenate([router.predict([q], router.models).quality for q in queries[::-1]])
    alone = alone[::-1]
    policy = UtilityPolicy(COST_QUALITY)
    costs = np.linspace(0.03, 1.0, len(router.models)).tolist()
    differ = sum(
        policy.choose(a.tolist(), costs) != policy.choose(b.tolist(), costs)
        for a, b in zip(alone, together, strict=True)
    )
    return float(np.abs(alone - together).max()), differ


def markdown(command: str, results: dict[str, Any]) -> str:
    """All tables as a page."""
    lines = ["# Latency of a decision", "", f"`{command}`", ""]
    lines += [
        f"`coe` with {results['models']} experts, {results['repetitions']} prompts each, in ms. "
        "Predict: the router alone. Choose: prediction, costs and policy. Decide: "
        "`Orchestrator.decide`, with the pool and a hop to the router's thread. CPU: median of "
        "what the process spent, without waiting for other processes, which the goal is held to. "
        f"Load average at the start and end: {results['load'][0]:.1f}, {results['load'][1]:.1f}.",
        "",
        "| encoder | tokens | predict p50, p90 | CPU | choose p50, p90 | CPU | goal | met "
        "| decide p50, p90 | CPU |",
        "|---|--:|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for row in results["rows"]:
        predict, choose, decide = (
            f"{at['p50']:.2f}, {at['p90']:.2f} | {at['cpu_p50']:.2f}"
            for at in (row["ms"][what] for what in ("predict", "choose", "decide"))
        )
        goal = row["goal_ms"]
        met = "yes" if row["ms"]["choose"]["cpu_p50"] <= goal else "no"
        lines.append(
            f"| `{row['encoder']}` | {row['tokens']} | {predict} | {choose} | "
            f"{goal:g} | {met} | {decide} |"
        )
    lines += ["", f"Alone and in a batch of {BATCHED}, 20 tokens each:", ""]
    lines += ["| encoder | greatest difference of a quality | decisions that differ |"]
    lines += ["|---|--:|--:|"]
    for encoder, (difference, differ) in results["batches"].items():
        lines.append(f"| `{encoder}` | {difference:g} | {differ} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page, and write it where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoders", nargs="+", choices=list(GOALS_MS), default=list(GOALS_MS))
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    table = OutcomeTable.load(arguments.data / "mmlu_pro")
    texts = {n: texts_of(n, arguments.repetitions + WARM_UP) for n in LENGTHS}
    rows, batches = [], {}
    for encoder in tqdm(arguments.encoders, delay=2):
        router = CoERouter(encoder=encoder).fit(table)
        orchestrator = orchestrator_for(router)
        for tokens in LENGTHS:
            rows.append(
                {
                    "encoder": encoder,
                    "tokens": tokens,
                    "ms": asyncio.run(measure(router, orchestrator, encoder, texts[tokens])),
                    "goal_ms": GOALS_MS[encoder][tokens > 20],
                }
            )
        batches[encoder] = batch_difference(router, encoder, texts[20][:BATCHED])
    results = {
        "models": len(table.models),
        "repetitions": arguments.repetitions,
        "load": [load_before, os.getloadavg()[0]],
        "rows": rows,
        "batches": batches,
    }
    command = "python -m benchmarks.decision_latency " + shlex.join(sys.argv[1:])
    page = markdown(command, results)
    print(page)
    if arguments.out:
        arguments.out.with_suffix(".md").write_text(page, encoding="utf-8")
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
