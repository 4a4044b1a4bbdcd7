"""Learning from feedback, replayed: regret over 4,000 requests, and recovery from a swap.

    python -m benchmarks.bandit --data DIR                 (orders of training rows)
    python -m benchmarks.bandit --data DIR --split all     (when all choices are made)

Requests come in random order. A policy chooses one model for each and is told that model's score,
nothing else. Settings are chosen on bootstrap orders of the training rows of ``nine_mixed``; the
final run takes orders of all rows without repetition, because 4,000 requests need most of them. The
offline router is cross-fitted: no prompt's predictions are by a router that has seen its scores.

Regret is counted against the best score of each prompt, which no policy reaches, and also against
what the best policy in class gets: the best model of each true category, in hindsight.

Half way of a second run the scores of the best and of the worst model change places. The level to
come back to is the mean reward of the 200 requests before; recovered is a policy at the first
request, 200 after the swap or later, at which the mean of its last 200 rewards is 95 % of that
level. As means of 200 are noisy, the reward from 600 to 800 after the swap, relative to the level
and over all orders, is given too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.pages import command_line, parser_of, with_interval, write
from benchmarks.tables import load, parts_of
from evals.metrics import bootstrap_mean
from evals.svg import Plot
from orchestrator.learning.bandit import features_of
from orchestrator.learning.config import GUESSED, LEARNT, LearningConfig
from orchestrator.learning.learner import Learner, Lesson
from routers.base import Query
from routers.baselines import category_table_choice
from routers.encoders import get_encoder
from routers.registry import get_router_class

TABLE = "nine_mixed"
ROUTER = "coe"
REQUESTS = 4000
WINDOW = 200
RECOVERED = 0.95
WITHIN = 800
COLOURS = (
    "#8a8f98", "#e69f00", "#56b4e9", "#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7",
)  # fmt: skip
# Points of a curve in the picture.
POINTS = 40


@dataclass(frozen=True)
class World:
    """What is replayed.

    Attributes:
        models: Names.
        features: Of each prompt, shape (n_prompts, n_features).
        scores: Shape (n_prompts, n_models).
        predicted: The offline router's quality, same shape.
        in_category: Score of the best model in hindsight of each prompt's category.
    """

    models: list[str]
    features: NDArray[np.float16]
    scores: NDArray[np.float64]
    predicted: NDArray[np.float64]
    in_category: NDArray[np.float64]


Run = Callable[[World, NDArray[np.intp], NDArray[np.float64], int], NDArray[np.float64]]


def world_of(data: Any, split: str, seed: int) -> World:
    """The rows of one split, with features and cross-fitted predictions."""
    table = load(data, TABLE)
    rows = table.rows(split)
    whole = table.resplit({"train": rows})
    prompts, scores = whole.with_prompts_of("train"), whole.scores("train")
    place = {prompt_id: row for row, prompt_id in enumerate(prompts.ids)}
    predicted = np.empty_like(scores)
    for part in parts_of(whole, None, seed):
        judged = part.with_prompts_of("test")
        router = get_router_class(ROUTER)().fit(part)
        quality = router.predict([Query(text) for text in judged.texts], part.models).quality
        predicted[[place[prompt_id] for prompt_id in judged.ids]] = quality
    config = LearningConfig()
    vectors = get_encoder(config.encoder).encode(prompts.texts)
    features = np.array([features_of(vector, config.dimensions) for vector in vectors])
    categories = prompts.categories or [""] * len(prompts)
    best = category_table_choice(scores, categories, categories)
    return World(whole.models, features, scores, predicted, scores[np.arange(len(scores)), best])


def orders_of(world: World, split: str, n_orders: int, seed: int) -> list[NDArray[np.intp]]:
    """Positions of each order's prompts; with repetition where there are too few for choosing."""
    n = len(world.scores)
    return [
        np.random.default_rng([seed, number]).choice(n, REQUESTS, replace=split != "all")
        for number in range(n_orders)
    ]


def learning(guess: float | None, **settings: Any) -> Run:
    """The bandit, over a constant prior or the offline router's predictions."""

    def run(
        world: World, order: NDArray[np.intp], scores: NDArray[np.float64], seed: int
    ) -> NDArray[np.float64]:
        learner = Learner(LearningConfig(**settings), world.models, guessed=guess is not None)
        predicted = world.predicted if guess is None else np.full(world.scores.shape, guess)
        free = np.zeros((1, len(world.models)))
        ties = np.random.default_rng(seed).permutation(len(world.models))
        got = np.empty(len(order))
        for number, row in enumerate(order):
            quality, features = predicted[row][None], world.features[row]
            found = learner.correct(f"{seed}:{number}", features, quality, world.models, free)
            hopes = (found.quality + found.bonus)[0]
            # Where all are alike, no model comes first because of its place in the table.
            choice = int(ties[hopes[ties].argmax()])
            got[number] = scores[number, choice]
            name = world.models[choice]
            prior = {name: float(quality[0, choice])}
            encoder = learner.config.encoder
            lesson = Lesson("", priors=prior, features=features, encoder=encoder)
            learner.learn(lesson, name, got[number])
        return got

    return run


def epsilon_greedy(epsilon: float) -> Run:
    """The model of the best mean so far, at random in a share of requests."""

    def run(
        world: World, order: NDArray[np.intp], scores: NDArray[np.float64], seed: int
    ) -> NDArray[np.float64]:
        rng = np.random.default_rng(seed)
        n_models = scores.shape[1]
        # One optimistic answer each, so that everybody is asked.
        sums, counts, got = np.ones(n_models), np.ones(n_models), np.empty(len(order))
        for number in range(len(order)):
            explores = rng.random() < epsilon
            choice = int(rng.integers(n_models)) if explores else int((sums / counts).argmax())
            got[number] = scores[number, choice]
            sums[choice] += got[number]
            counts[choice] += 1
        return got

    return run


def offline(
    world: World, order: NDArray[np.intp], scores: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """The offline router, without learning."""
    return np.asarray(scores[np.arange(len(order)), world.predicted[order].argmax(axis=1)])


def best_single(
    world: World, order: NDArray[np.intp], scores: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """The model with the best mean over the whole order."""
    return np.asarray(scores[:, scores.mean(axis=0).argmax()])


def at_random(
    world: World, order: NDArray[np.intp], scores: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """What a random choice scores in expectation."""
    return np.asarray(scores.mean(axis=1))


EXPLORING = {"exploration_share": 1.0}
POLICIES: dict[str, Run] = {
    "random": at_random,
    "epsilon-greedy means": epsilon_greedy(0.1),
    "best single in hindsight": best_single,
    "offline router": offline,
    "bandit, no router": learning(0.5, **EXPLORING),
    "bandit, no router, explores a tenth": learning(0.5, exploration_share=0.1),
    "bandit on the router": learning(None, **EXPLORING),
    "bandit on the router, explores a tenth": learning(None, exploration_share=0.1),
}


def swapped(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Scores of the best and the worst model change places from the middle on."""
    means = scores.mean(axis=0)
    columns = np.arange(scores.shape[1])
    best, worst = means.argmax(), means.argmin()
    columns[[best, worst]] = columns[[worst, best]]
    half = len(scores) // 2
    return np.concatenate([scores[:half], scores[half:, columns]])


def recovery(got: NDArray[np.float64]) -> tuple[float, float]:
    """Requests until it has recovered, and reward from 600 to 800 relative to before.

    Infinite if it never did.
    """
    half = len(got) // 2
    level = float(got[half - WINDOW : half].mean())
    sums = np.concatenate([[0.0], got[half:].cumsum()])
    means = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
    reached = np.flatnonzero(means >= RECOVERED * level)
    late = float(got[half + WITHIN - WINDOW : half + WITHIN].mean()) / level
    return (float(reached[0] + WINDOW) if len(reached) else float("inf")), late


def results_of(
    world: World, orders: Sequence[NDArray[np.intp]], policies: dict[str, Run]
) -> dict[str, Any]:
    """Regret and recovery of every policy over the orders, and its curve."""
    lines: dict[str, Any] = {}
    plain = [world.scores[order] for order in orders]
    changed = [swapped(scores) for scores in plain]
    oracle = np.array([scores.max(axis=1) for scores in plain])
    in_class = np.array([world.in_category[order] for order in orders])
    chance = np.array([scores.mean(axis=1) for scores in plain])
    bar = tqdm(total=len(policies) * len(orders), unit="order", delay=2)
    for name, run in policies.items():
        rewards, later = [], []
        for number, order in enumerate(orders):
            rewards.append(run(world, order, plain[number], number))
            later.append(recovery(run(world, order, changed[number], number)))
            bar.update()
        got = np.array(rewards)
        share = (oracle - got).sum(axis=1) / (oracle - chance).sum(axis=1)
        took = np.array([steps for steps, _ in later])
        lines[name] = {
            "reward": _interval(got.mean(axis=1)),
            "regret": _interval((oracle - got).sum(axis=1)),
            "of_random": _interval(share),
            "regret_in_class": _interval((in_class - got).sum(axis=1)),
            "last_1000": _interval(got[:, -1000:].mean(axis=1)),
            "recovered_median": float(np.median(took)),
            "recovered_within": float((took <= WITHIN).mean()),
            "level_after": _interval(np.array([late for _, late in later])),
            "curve": (oracle - got).mean(axis=0).cumsum()[_shown()].tolist(),
        }
    bar.close()
    return lines


def _shown() -> NDArray[np.intp]:
    return np.linspace(0, REQUESTS - 1, POINTS + 1).round().astype(np.intp)


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    return bootstrap_mean(values)._asdict()


def markdown(command: str, lines: dict[str, Any], split: str, n_orders: int) -> str:
    """The results as a page."""
    rows = (
        "all rows, each order a draw without repetition"
        if split == "all"
        else f"rows of the split `{split}`, each order drawn with repetition"
    )
    config = LearningConfig()
    page = [
        "# Learning from feedback",
        "",
        f"`{command}`: `{TABLE}`, {n_orders} random orders of {REQUESTS:,} requests ({rows}); 95% "
        "intervals over orders. The policy is told the score of the model that it chose, nothing "
        f"else. The bandit has the settings of `routes.NAME.learning` (forgetting "
        f"{config.forgetting:g}, penalty {LEARNT:g}, without a router {GUESSED:g}, alpha "
        f"{config.alpha:g}, {config.dimensions} dimensions), chosen on orders of training rows, "
        "and explores on every request unless it says otherwise. The router is "
        f"`{ROUTER}`, cross-fitted: no prompt's predictions are by a router that has seen its "
        "scores. Without it every model is predicted 0.5.",
        "",
        "Regret: to the best score of each prompt, which no policy reaches, summed up. In class: "
        "to the best model of each true category in hindsight.",
        "",
        "| | mean reward | regret | of random's | in class | reward of the last 1,000 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, line in lines.items():
        page.append(
            f"| {name} | {with_interval(line['reward'])} | {with_interval(line['regret'], '.0f')} "
            f"| {with_interval(line['of_random'], '.1f', scale=100)} % "
            f"| {with_interval(line['regret_in_class'], '.0f')} "
            f"| {with_interval(line['last_1000'])} |"
        )
    page += [
        "",
        f"![cumulative regret](bandit{'' if split == 'all' else '_' + split}.svg)",
        "",
        "## After a swap",
        "",
        f"After {REQUESTS // 2:,} requests the scores of the best and of the worst model change "
        f"places. Recovered: the first request at which the mean of the last {WINDOW} rewards is "
        f"{RECOVERED:.0%} of the mean of the {WINDOW} before the swap, {WINDOW} after it at the "
        f"earliest; median over orders, and the share of orders where that takes at most {WITHIN}. "
        f"Level: mean reward from {WITHIN - WINDOW} to {WITHIN} after the swap, relative to "
        "before. Random choice shows what the noise of such means does by itself.",
        "",
        f"| | recovered after | within {WITHIN} | level |",
        "|---|--:|--:|--:|",
    ]
    for name, line in lines.items():
        if name == "best single in hindsight":
            continue
        steps = line["recovered_median"]
        page.append(
            f"| {name} | {'never' if steps == float('inf') else f'{steps:.0f}'} "
            f"| {line['recovered_within']:.0%} | {with_interval(line['level_after'], '.2f')} |"
        )
    return "\n".join(page) + "\n"


def picture(lines: dict[str, Any]) -> str:
    """Cumulative regret as SVG."""
    steps = (_shown() + 1).tolist()
    highest = max(line["curve"][-1] for line in lines.values())
    plot = Plot(
        f"{TABLE}: regret to the best model of each prompt",
        "requests",
        "cumulative regret",
        [0.0, float(REQUESTS)],
        [0.0, highest],
    )
    legend = []
    for (name, line), colour in zip(lines.items(), COLOURS, strict=True):
        points = list(zip(map(float, steps), line["curve"], strict=True))
        plot.line(points, colour, [name] * len(points))
        legend.append((name, colour))
    return plot.document(legend)


def main() -> None:
    """Print the page, and write it with a picture and all numbers as JSON where wanted."""
    parser = parser_of(__doc__, out="write OUT.md, OUT.json and OUT.svg")
    parser.add_argument("--split", default="train", choices=["train", "all"])
    parser.add_argument("--orders", type=int, default=20, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of folds and orders")
    arguments = parser.parse_args()
    world = world_of(arguments.data, arguments.split, arguments.seed)
    orders = orders_of(world, arguments.split, arguments.orders, arguments.seed)
    lines = results_of(world, orders, POLICIES)
    page = markdown(command_line(), lines, arguments.split, arguments.orders)
    print(page)
    write(arguments.out, page, lines)
    if arguments.out:
        arguments.out.with_suffix(".svg").write_text(picture(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
