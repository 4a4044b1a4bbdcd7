"""What encoders cost and what they are worth: time, routing quality, other languages.

    python -m benchmarks.encoders [ENCODER ...]
    python -m benchmarks.encoders [ENCODER ...] --data DIR [--tables NAME ...] [--out OUT]

Time is CPU time of one text on one thread, interleaved in one run: compare rows, absolute times
belong to the machine. With ``--data``, the folder of ``benchmarks.tables``, routers are
cross-validated with each encoder on training rows; every difference is paired, prompt by prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.overhead import prompts
from benchmarks.pages import GAIN, command_line, how_judged, with_interval, write
from benchmarks.tables import FOLDS, TABLES, load, parts_of
from evals.metrics import bootstrap_mean, chosen, paired_difference
from routers.base import Query
from routers.category_learning import fit_classifier
from routers.combined import make_member
from routers.encoders import forget_vectors, get_encoder
from routers.encoders.minilm_export import model_folder
from routers.outcomes import OutcomeTable

# What the others are compared with: the default encoder before quantisation.
REFERENCE = "minilm-l2-fp32"
ENCODERS = (
    REFERENCE, "minilm-l2-int8", "minilm-fp32", "minilm-int8", "multilingual", "static",
    "characters", "surface", "minilm-l2-int8+surface", "minilm-l2-int8+characters",
)  # fmt: skip
METHODS = ("coe", "coe ngrams=false", "kmeans", "ridge")
LENGTHS = (20, 256)
ROUNDS = 40
# Questions in five languages, each with the MMLU-Pro subject that it belongs to.
QUESTIONS = Path(__file__).parent / "languages.json"


def texts_of(tokens: int, count: int) -> list[str]:
    """Different texts of so many of MiniLM's tokens, cut from the shipped tasks' questions."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    order = random.Random(0)
    questions = prompts(200)
    found = []
    for number in range(count):
        text = " ".join([f"({number})", *order.sample(questions, 10 + tokens // 8)])
        ends = [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]
        found.append(text[: ends[tokens - 3]])  # two tokens mark the beginning and the end
    return found


def measure_times(names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Median and 90th percentile of CPU ms per text, by encoder and number of tokens."""
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for tokens in LENGTHS:
        texts = texts_of(tokens, ROUNDS + 1)
        found: dict[str, list[float]] = {name: [] for name in names}
        for number, text in enumerate(texts):
            for name in names:
                forget_vectors()
                started = time.thread_time()
                get_encoder(name).encode([text])
                if number:  # the first round loads and warms up
                    found[name].append((time.thread_time() - started) * 1000)
        for name in names:
            times[name][str(tokens)] = [float(v) for v in np.percentile(found[name], [50, 90])]
    return times


def measure_routers(
    parts: list[OutcomeTable], names: list[str], label: str
) -> dict[str, dict[str, Any]]:
    """Scores of each method with each encoder, and how often it names the category if it does."""
    scores: dict[tuple[str, str], list[NDArray[np.float64]]] = {}
    named: dict[tuple[str, str], list[bool]] = {}
    with tqdm(total=len(names) * len(METHODS) * len(parts), desc=label, delay=2) as bar:
        for part in parts:
            texts = part.with_prompts_of("test")
            queries = [Query(text) for text in texts.texts]
            for name in names:
                for method in METHODS:
                    router = make_member(f"{method} encoder={name}")
                    prediction = router.fit(part).predict(queries, part.models)
                    choice = prediction.quality.argmax(axis=1).astype(np.intp)
                    row = chosen(part.scores("test"), choice)
                    scores.setdefault((name, method), []).append(row)
                    if router.method == "coe" and texts.categories:
                        found = [e.category for e in prediction.explanations]
                        pairs = zip(found, texts.categories, strict=True)
                        hits = named.setdefault((name, method), [])
                        hits.extend(a == b for a, b in pairs)
                    bar.update()
    chinese = np.array([_is_chinese(t) for p in parts for t in p.with_prompts_of("test").texts])
    joined = {key: np.concatenate(rows) for key, rows in scores.items()}
    lines: dict[str, dict[str, Any]] = {}
    for (name, method), row in joined.items():
        line: dict[str, Any] = _line(row, joined[REFERENCE, method])
        if chinese.any():
            reference = joined[REFERENCE, method][chinese]
            line["chinese"] = _line(row[chinese], reference)
        lines.setdefault(name, {})[method] = line
    for (name, method), hits in named.items():
        lines[name][method]["named"] = float(np.mean(hits))
    return lines


def _line(row: NDArray[np.float64], reference: NDArray[np.float64]) -> dict[str, float]:
    mean, gain = bootstrap_mean(row), paired_difference(row, reference)
    return {
        "mean": mean.mean, "low": mean.low, "high": mean.high,
        "gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high, "n": mean.n,
    }  # fmt: skip


def _is_chinese(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return sum("\u4e00" <= c <= "\u9fff" for c in letters) > len(letters) / 2


def measure_languages(table: OutcomeTable, names: list[str]) -> dict[str, dict[str, float]]:
    """Share of questions whose subject is named rightly, by language, learnt from English ones."""
    known = table.with_prompts_of("train")
    assert known.categories is not None, "the table has subjects"
    subjects = sorted(set(known.categories))
    labels = np.array([subjects.index(name) for name in known.categories], np.intp)
    questions = json.loads(QUESTIONS.read_text(encoding="utf-8"))
    right: dict[str, dict[str, float]] = {}
    for name in names:
        encoder = get_encoder(name)
        classifier = fit_classifier(encoder.encode(known.texts), labels, subjects, C=10.0)
        hits: dict[str, list[bool]] = {}
        for subject, languages in questions.items():
            for language, texts in languages.items():
                for vector in encoder.encode(texts):
                    found = subjects[int(classifier.evidence(vector, "").logits.argmax())]
                    hits.setdefault(language, []).append(found == subject)
        right[name] = {language: float(np.mean(found)) for language, found in hits.items()}
    return right


def markdown(command: str, results: dict[str, Any]) -> str:
    """All tables as a page."""
    lines = ["# Encoders", "", f"`{command}`", "", "## Time", ""]
    lines += [
        "Milliseconds of CPU time for one text on one thread, median and 90th percentile.",
        "",
    ]
    lines += ["| encoder |" + "".join(f" {n} tokens |" for n in LENGTHS)]
    lines += ["|---|" + "--:|" * len(LENGTHS)]
    for name, found in results["ms"].items():
        cells = "".join(f" {median:.2f}, {high:.2f} |" for median, high in found.values())
        lines.append(f"| `{name}` |{cells}")
    if "tables" in results:
        lines += [
            "",
            "## Routing",
            "",
            f"{how_judged(None, FOLDS)}: how often the category is named rightly, "
            "the mean score of the models chosen, and what that differs from "
            f"`{REFERENCE}` on the same prompts (95% intervals).",
        ]
    for table, found in results.get("tables", {}).items():
        lines += ["", f"### {table}", ""]
        lines += _scores(found)
        if any("chinese" in line[METHODS[0]] for line in found.values()):
            inside = {
                name: {method: line[method]["chinese"] for method in METHODS}
                for name, line in found.items()
            }
            size = next(iter(inside.values()))[METHODS[0]]["n"]
            lines += ["", f"### {table}: its {size} Chinese prompts", "", *_scores(inside)]
    if "languages" in results:
        lines += ["", "## Other languages", ""]
        lines += [
            "A classifier learns fourteen subjects from MMLU-Pro's English training prompts; share "
            "of questions written for this benchmark (`benchmarks/languages.json`, two for each of "
            "twelve subjects and language) whose subject it names. With 24 questions, one is "
            "4 points.",
            "",
        ]
        names = list(next(iter(results["languages"].values())))
        lines += ["| encoder |" + "".join(f" {n} |" for n in names), "|---|" + "--:|" * len(names)]
        for name, found in results["languages"].items():
            lines.append(f"| `{name}` |" + "".join(f" {v:.2f} |" for v in found.values()))
    return "\n".join(lines) + "\n"


def _scores(found: dict[str, dict[str, Any]]) -> list[str]:
    naming = [m for m in METHODS if any("named" in line[m] for line in found.values())]
    heads = ["encoder", *(f"`{m}` names" for m in naming), *(f"`{m}`" for m in METHODS)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "--:|" * (len(heads) - 1)]
    for name, line in found.items():
        cells = [f"`{name}`", *(f"{line[method]['named']:.3f}" for method in naming)]
        for method in METHODS:
            at = line[method]
            gain = " " + with_interval(at, "+.3f", keys=GAIN)
            cells.append(f"{at['mean']:.3f}" + (gain if name != REFERENCE else ""))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Print the page, and write it where wanted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("encoders", nargs="*", default=list(ENCODERS))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--seed", type=int, default=0, help="of the folds")
    parser.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    arguments = parser.parse_args()
    names = list(dict.fromkeys([REFERENCE, *arguments.encoders]))
    results: dict[str, Any] = {"ms": measure_times(names)}
    if arguments.data:
        results["tables"] = {}
        for name in arguments.tables:
            parts = parts_of(load(arguments.data, name), None, arguments.seed)
            results["tables"][name] = measure_routers(parts, names, name)
            # Tables take long: what there is so far is written after each.
            write(arguments.out, markdown(command_line(), results), results)
        languages = OutcomeTable.load(arguments.data / "mmlu_pro")
        results["languages"] = measure_languages(languages, names)
    page = markdown(command_line(), results)
    write(arguments.out, page, results)
    print(page)


if __name__ == "__main__":
    main()
