"""Tasks of EleutherAI's lm-eval, for experts that answer in text.

lm-eval reads the task, words its prompts, filters the answers and computes its metric; this
module hands its documents out as samples and takes one metric for the score. Nothing is
downloaded: a task's data is on this machine, or the task is refused.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evals.tasks.base import TABLE_SPLITS, Sample, Split, TaskError

__all__ = ["LmEvalTask", "load_tasks"]

_OFFLINE = (("datasets.config", "HF_HUB_OFFLINE"), ("huggingface_hub.constants", "HF_HUB_OFFLINE"))


class LmEvalTask:
    """One task of lm-eval whose output type is ``generate_until``.

    A prompt is what lm-eval sends without a chat template: description, few-shot examples and
    question in one text, with the seed lm-eval uses by default. Each of the task's own splits is
    asked as lm-eval asks its test split, so no prompt holds its own answer as an example. A task
    with one split has it divided by a hash of its name and each document's number: three fifths
    train, one fifth validation, one fifth test.

    Args:
        task: The task as lm-eval loaded it.
        metric: The metric that is the score; the task's first if none.
        filter_name: The filter whose answer is scored; the task's first if none.

    Raises:
        TaskError: If answers in text cannot be asked for, or have no such score in [0, 1].
    """

    def __init__(self, task: Any, metric: str | None, filter_name: str | None) -> None:
        from lm_eval.models.utils import normalize_gen_kwargs

        self._task = task
        self._check_kind()
        self._generation = normalize_gen_kwargs(task.config.generation_kwargs or {})
        self._filter = self._find_filter(filter_name)
        self._metric = metric or next(iter(task.aggregation()), "")
        self._sources = self._find_sources()
        self._samples: dict[Split, list[Sample]] = {}
        self._docs: dict[str, Any] = {}
        self._check_metric()

    @property
    def name(self) -> str:
        """The task's name in lm-eval."""
        return str(self._task.task_name)

    @property
    def max_tokens(self) -> int:
        """lm-eval's ``max_gen_toks``."""
        return int(self._generation["max_gen_toks"])

    def samples(self, split: Split) -> list[Sample]:
        """Return the samples of one split; there are none to train adapters on."""
        if split in self._sources and split not in self._samples:
            self._read(self._sources[split])
        return list(self._samples.get(split, ()))

    def grade(self, answer_text: str, sample: Sample) -> float:
        """Return lm-eval's metric of an answer, cut at the first of the task's stop texts.

        Raises:
            TaskError: If the metric fails, or is no number in [0, 1].
        """
        if sample.prompt_id not in self._docs:
            self.samples(sample.split)
        value = self._results(answer_text, self._docs[sample.prompt_id]).get(self._metric)
        score = _score(value)
        if score is None:
            raise TaskError(f"{self._no_score()}: {value!r} for an answer to {sample.prompt_id}")
        return score

    def _check_kind(self) -> None:
        from lm_eval.api.task import ConfigurableTask

        if not isinstance(self._task, ConfigurableTask):
            raise TaskError(f"lm-eval task {self.name!r} is a Python class without settings")
        config = self._task.config
        _check_output_type(self.name, self._task.OUTPUT_TYPE)
        _check_safety(self.name, config.unsafe_code)
        if config.doc_to_image is not None or config.doc_to_audio is not None:
            raise TaskError(f"lm-eval task {self.name!r} asks about images or sound, not text")

    def _find_filter(self, name: str | None) -> Any:
        filters = {ensemble.name: ensemble for ensemble in self._task._filters}
        if name is None:
            return next(iter(filters.values()))
        if name not in filters:
            known = ", ".join(map(repr, filters))
            raise TaskError(f"lm-eval task {self.name!r} has no filter {name!r}; known: {known}")
        return filters[name]

    def _find_sources(self) -> dict[Split, str]:
        """The task's own split that each of ours is made from."""
        config = self._task.config
        splits: tuple[tuple[str | None, Split], ...] = (
            (config.test_split, "test"),
            (config.validation_split, "validation"),
            (config.training_split, "train"),
        )
        targets: dict[str, Split] = {}
        for source, target in splits:
            if source is not None:
                # Where a task names one split twice, it is for what lm-eval would judge.
                targets.setdefault(source, target)
        if len(targets) == 1:
            return dict.fromkeys(TABLE_SPLITS, next(iter(targets)))
        return {target: source for source, target in targets.items()}

    def _check_metric(self) -> None:
        if self._task.higher_is_better().get(self._metric) is False:
            raise TaskError(f"{self._no_score()}: lower is better")
        doc = self._task.task_docs[0]
        for answer in (self._target(doc), ""):
            results = self._results(answer, doc)
            if _score(results.get(self._metric)) is None:
                others = [repr(name) for name in results if _score(results[name]) is not None]
                known = ", ".join(others) or "none; give it another metric_list"
                raise TaskError(f"{self._no_score()}; choose one by #METRIC: {known}")

    def _no_score(self) -> str:
        return (
            f"metric {self._metric!r} of lm-eval task {self.name!r} is no score, a number in "
            "[0, 1] for each answer"
        )

    def _read(self, source: str) -> None:
        targets = [target for target in self._sources if self._sources[target] == source]
        samples: dict[Split, list[Sample]] = {target: [] for target in targets}
        try:
            with _offline():
                for number, (doc, text) in enumerate(self._prompts(source)):
                    split = targets[0] if len(targets) == 1 else self._part(number)
                    prompt_id = f"{self.name}-{split}-{number:04d}"
                    sample = Sample(prompt_id, text, self._target(doc), self.name, split)
                    samples[split].append(sample)
                    self._docs[prompt_id] = doc
        except Exception as error:  # whatever the task's own functions and templates raise
            raise TaskError(
                f"lm-eval cannot make the prompts of task {self.name!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._samples |= samples

    def _part(self, number: int) -> Split:
        digest = hashlib.sha256(f"{self.name}-{number:04d}".encode()).digest()
        fifth = int.from_bytes(digest[:8]) % 5
        return TABLE_SPLITS[max(0, fifth - 2)]

    def _prompts(self, source: str) -> Iterator[tuple[Any, str]]:
        from lm_eval.defaults import DEFAULT_OTHER_SEED

        task, config, few_shot = self._task, self._task.config, self._task.fewshot_cfg
        docs = {
            config.training_split: task.training_docs,
            config.validation_split: task.validation_docs,
            config.test_split: task.test_docs,
        }[source]()
        if few_shot.split is None and few_shot.samples is None:
            few_shot.split = config.training_split or config.validation_split or config.test_split
        task.set_fewshot_seed(DEFAULT_OTHER_SEED)
        test_split = config.test_split
        try:
            # lm-eval leaves a document out of its own examples only in the test split.
            config.test_split = source
            for doc in tqdm(docs, desc=f"prompts of {self.name}", unit="prompt", delay=2):
                prefix = task.doc_to_prefix(doc)
                yield doc, task.fewshot_context(doc, config.num_fewshot or 0, gen_prefix=prefix)
        finally:
            config.test_split = test_split

    def _target(self, doc: Any) -> str:
        """The expected answer, worded as a few-shot example would have it."""
        target = self._task.doc_to_target(doc)
        if self._task.config.doc_to_choice is not None and isinstance(target, int):
            target = self._task.doc_to_choice(doc)[target]
        return str(target[0] if isinstance(target, list) and target else target)

    def _results(self, answer_text: str, doc: Any) -> Mapping[str, Any]:
        from lm_eval.api.instance import Instance
        from lm_eval.models.utils import postprocess_generated_text

        answer = postprocess_generated_text(answer_text, self._generation["until"], None)
        request = Instance("generate_until", doc, ("",), 0, resps=[answer])
        try:
            self._filter.apply([request])
            answers = [request.filtered_resps[self._filter.name]]
            with _offline():
                results: Mapping[str, Any] = self._task.process_results(doc, answers)
        except Exception as error:  # whatever the task's own functions raise
            raise TaskError(
                f"lm-eval task {self.name!r} cannot score the answer {answer!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return results


def load_tasks(spec: str) -> list[LmEvalTask]:
    """Load ``NAME`` or ``PATH.yaml``, optionally with ``#METRIC`` or ``#METRIC,FILTER``.

    A name is one of lm-eval's own; a path is a task file of yours, whose ``!function`` entries
    run the Python files beside it. A group gives all its tasks; those of a group file are in
    other files of its folder.

    Raises:
        TaskError: If lm-eval is not installed, does not know the task, finds no data for it, or
            the task cannot be asked or scored.
    """
    target, _, chosen = spec.partition("#")
    metric, _, filter_name = chosen.partition(",")
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as exc:
        raise TaskError("lm-eval tasks need lm-eval: pip install 'collegium[eval]'") from exc
    with _offline():
        tasks = _load_path(Path(target)) if _is_path(target) else _load_name(target)
        return [LmEvalTask(task, metric or None, filter_name or None) for task in tasks]


def _is_path(target: str) -> bool:
    return target.endswith((".yaml", ".yml"))


def _load_path(path: Path) -> list[Any]:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    if not path.is_file():
        raise TaskError(f"there is no lm-eval task file {str(path)!r}")
    try:
        settings = load_yaml(path, resolve_func=False)
    except Exception as error:
        raise TaskError(f"{path} is no lm-eval task file: {error}") from error
    if "group" in settings:
        manager = TaskManager(include_path=path.parent, include_defaults=False)
        _check_members(manager, settings["group"])
        return _build(manager, settings["group"])
    _check_settings(settings.get("task", str(path)), settings)
    return _build(TaskManager(include_defaults=False), str(path))


def _load_name(name: str) -> list[Any]:
    manager = _own_tasks()
    entry = manager.task_index.get(name)
    if entry is None:
        close = get_close_matches(name, manager.all_tasks)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise TaskError(f"lm-eval knows no task {name!r}{hint} (or give lm-eval:PATH.yaml)")
    _check_members(manager, name)
    return _build(manager, name)


@cache
def _own_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    tqdm.write("reading lm-eval's list of tasks, which takes some ten seconds", file=sys.stderr)
    return TaskManager()


def _build(manager: Any, target: str) -> list[Any]:
    try:
        return list(manager.load(target)["tasks"].values())
    except OSError as error:  # what datasets raises where it finds no data is of this kind
        raise TaskError(
            f"the data of lm-eval task {target!r} is not on this machine, and nothing is "
            f"downloaded ({error}); load it once with the datasets library, or give "
            "lm-eval:PATH.yaml with local data_files"
        ) from error
    except StopIteration as error:
        raise TaskError(f"the data of lm-eval task {target!r} is empty") from error
    except Exception as error:  # whatever the task's own settings and functions lead to
        raise TaskError(
            f"lm-eval cannot load task {target!r}: {type(error).__name__}: {error}"
        ) from error


def _check_members(manager: Any, name: str) -> None:
    entry = manager.task_index[name]
    settings = entry.cfg or {}
    if name in manager.all_tags:
        members = sorted(entry.tags)
    elif name in manager.all_groups:
        members = [member for member in settings.get("task", ()) if isinstance(member, str)]
    else:
        _check_settings(name, settings)
        return
    for member in members:
        if member not in manager.task_index:
            raise TaskError(f"lm-eval group {name!r} has {member!r}, which is no task it knows")
        _check_members(manager, member)


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Refuse what can be told before data is looked for."""
    from lm_eval.api.registry import metric_registry

    _check_output_type(name, settings.get("output_type", "generate_until"))
    _check_safety(name, settings.get("unsafe_code"))
    if "process_results" in settings:
        return
    for entry in settings.get("metric_list") or ():
        metric = entry.get("metric")
        # A function's name was made an absolute path.
        foreign = metric not in metric_registry and not Path(str(metric)).is_absolute()
        if entry.get("hf_evaluate") or foreign:
            raise TaskError(
                f"metric {metric!r} of lm-eval task {name!r} is not lm-eval's own, and the code "
                "of others is not downloaded; give lm-eval:PATH.yaml with exact_match, or with a "
                "!function of yours"
            )


def _check_output_type(name: str, output_type: str) -> None:
    if output_type == "multiple_choice":
        raise TaskError(
            f"lm-eval task {name!r} is multiple_choice: it compares probabilities of given "
            "answers, which experts behind an API do not tell. Take a variant that has the answer "
            "written (lm-eval has some, as NAME_generative), or give lm-eval:PATH.yaml with "
            "generate_until, the options in doc_to_text, and a filter that finds the letter"
        )
    if output_type != "generate_until":
        raise TaskError(
            f"lm-eval task {name!r} is {output_type}: it measures probabilities of texts, which "
            "experts behind an API do not tell; only generate_until tasks can be collected"
        )


def _check_safety(name: str, unsafe_code: Any) -> None:
    if unsafe_code:
        raise TaskError(f"lm-eval task {name!r} runs the code that models write: refused")


def _score(value: Any) -> float | None:
    if hasattr(value, "item"):  # a number of NumPy's
        value = value.item()
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


@contextmanager
def _offline() -> Iterator[None]:
    """Keep lm-eval's libraries from downloading, and only meanwhile: experts may want to."""
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    modules = [(import_module(module), name) for module, name in _OFFLINE]
    before = [getattr(module, name) for module, name in modules]
    try:
        for module, name in modules:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(modules, before, strict=True):
            setattr(module, name, value)
