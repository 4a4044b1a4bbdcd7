"""Training of a collaboration: interactions between frozen experts, and the router that leads it.

Runs on a CPU or a GPU. An interrupted training, called again, comes to the same as an uninterrupted
one. Imports torch.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from tqdm import tqdm

from experts.finetune_data import ChatPair, plan_batches, read_pairs
from experts.latent.artefact import MANIFEST, read_latent, save_latent
from experts.latent.members import Member, load_members, member_revision, wrap
from experts.latent.model import LatentModel, LatentText
from routers.base import RouterError
from routers.checkpoints import Checkpoint
from routers.encoders import get_encoder
from routers.latent.config import LatentTrainingConfig, LatentTrainingManifest
from routers.latent.losses import choose, entropy_loss, gates, load_balance_loss
from routers.latent.router import LatentRouter
from routers.latent.sizes import interaction_parameters, width_for
from routers.latent.states import StateStore, Wanted
from routers.latent.texts import TextReader, hold_out, prompt_hash
from routers.outcomes import OutcomeTable
from routers.text_classifier import pick_device
from routers.torch_training import masked_bce

__all__ = ["train_latent", "without_peers"]

HELD_OUT, TEST, ROUTER = "held_out.jsonl", "test.jsonl", "router"
_LIBRARIES = ("torch", "transformers", "safetensors")
# Raise it when the same configuration comes to something else.
_TRAINING_VERSION = 2
# What decides nothing of the result, or stands in the fingerprint by its contents.
_NO_CHOICES = {"data", "validation", "test", "table", "cache", "checkpoint_every", "device"}
TABLE_ROWS = 64
# Texts on which members' states are measured, or up to twice as many.
SCALE_TEXTS = 32


def train_latent(
    config: LatentTrainingConfig,
    out: Path,
    *,
    members: Mapping[str, Member] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> LatentTrainingManifest:
    """Train a collaboration and write it to a folder.

    The folder gets ``latent.json`` and ``interactions.safetensors``, ``router/`` if there is a
    router to learn, and ``held_out.jsonl``: for each held-out prompt the loss and the number of
    answer tokens ``before`` training and ``after`` it, whether greedy decoding would write just
    this answer, and the gates; ``test.jsonl`` says the same of test prompts. The loss covers the
    answer and the token that ends it. Calling again with the same configuration and folder resumes
    an interrupted training, or returns the manifest of a finished one.

    Args:
        config: What is trained on what, and how.
        out: The folder.
        members: The experts, if they are loaded already; loaded by default. They may be cut into
            any number of stacks, and compute in their own number format.
        on_step: Called with the number of finished steps and the loss after every step.

    Raises:
        RouterError: The data, the table or the members cannot be used, or the folder belongs to
            another training.
        ExpertConfigError: A member or a data file cannot be loaded.
    """
    pairs, held_out, tested, repeated = _read_data(config)
    table = _read_table(config)
    fingerprint = _fingerprint(config, members, table)
    finished = _finished(out, fingerprint)
    if finished:
        return finished
    loaded = _members(config, members)
    tokenizers = {name: member.tokenizer for name, member in loaded.items()}
    reader = TextReader(tokenizers, [*pairs, *held_out, *tested])
    fits = [reader.length(number) <= config.max_tokens for number in range(len(reader.pairs))]
    parts, start = [], 0
    for part in (pairs, held_out, tested):
        parts.append([number for number in range(start, start + len(part)) if fits[number]])
        start += len(part)
    learnt, checked, last = parts
    if not learnt or not checked:
        raise RouterError(
            f"of {len(pairs)} pairs to learn from and {len(held_out)} held-out ones, {len(learnt)} "
            f"and {len(checked)} have at most max_tokens={config.max_tokens} tokens; give more or "
            "shorter pairs"
        )
    training = _Training(config, loaded, reader, learnt, checked, last, table)
    training.run(out, fingerprint, on_step)
    manifest = LatentTrainingManifest(
        fingerprint=fingerprint,
        hyperparameters=_hyperparameters(config),
        data=config.data.name,
        data_sha256=_sha256(config.data),
        pairs=len(learnt),
        held_out=len(checked),
        repeated_prompts=repeated,
        too_long=fits.count(False),
        parameters=training.n_parameters,
        router_parameters=training.n_router_parameters,
        libraries={name: version(name) for name in _LIBRARIES},
        **training.facts(),
    )
    training.save(out, manifest, table)
    return manifest


def without_peers(
    config: LatentTrainingConfig, members: Mapping[str, Member]
) -> LatentTrainingConfig:
    """The same training of the writer alone, with as many trained parameters, within 1 %.

    The writer listens to itself, at the same boundaries. What the collaboration gains over this
    one is owed to the peers and not to the parameters.

    Raises:
        RouterError: The configuration names no writer, or is too small to be matched.
    """
    if config.writer is None:
        raise RouterError("name a writer to compare with it alone")
    widths = _widths(config, members)
    parameters = interaction_parameters(
        widths, [config.writer],
        width=config.width, n_heads=config.n_heads, n_stacks=config.n_stacks,
    )  # fmt: skip
    if config.has_router:
        network = LatentRouter(encoder=config.encoder).network(len(widths))
        parameters += sum(p.numel() for p in network.parameters())
    size = members[config.writer].stacked.width
    try:
        width, n_heads = width_for(
            parameters, size, n_heads=config.n_heads, n_stacks=config.n_stacks
        )
    except ValueError as error:
        raise RouterError(f"cannot compare with the writer alone: {error}") from error
    changes = {
        "members": [member for member in config.members if member.name == config.writer],
        "active": 1, "width": width, "n_heads": n_heads, "table": None, "peers": "routed",
    }  # fmt: skip
    return config.model_copy(update=changes)


def _widths(config: LatentTrainingConfig, members: Mapping[str, Member]) -> dict[str, int]:
    names = [member.name for member in config.members]
    if config.peers == "same":
        assert config.writer is not None
        names = [config.writer] * config.active
    elif config.active == 1 and config.writer is not None:
        names = [config.writer]
    # Copies of the writer have its name but for a number.
    found: dict[str, int] = {}
    for name in names:
        unique = name if name not in found else f"{name}.copy{len(found)}"
        found[unique] = members[name].stacked.width
    return found


def _members(config: LatentTrainingConfig, given: Mapping[str, Member] | None) -> dict[str, Member]:
    """The experts that take part, cut as wanted."""
    if given is None:
        named = config.members
        if config.peers == "same":
            named = [member for member in config.members if member.name == config.writer]
        device = str(pick_device(config.device))
        given = load_members(named, n_stacks=config.n_stacks, dtype=config.precision, device=device)
    cut = {
        name: _recut(name, member, config.n_stacks)
        for name, member in given.items()
        if name in {member.name for member in config.members}
    }
    if config.peers == "same":
        assert config.writer is not None
        writer = cut[config.writer]
        copies = {f"{config.writer}.copy{number}": writer for number in range(1, config.active)}
        return {config.writer: writer, **copies}
    return {member.name: cut[member.name] for member in config.members}


def _recut(name: str, member: Member, n_stacks: int) -> Member:
    if len(member.stacked.starts) == n_stacks - 1:
        return member
    known, tokenizer = member.stacked.model, member.tokenizer.tokenizer
    return wrap(name, known, tokenizer, n_stacks=n_stacks, revision=member.revision)


def _read_data(
    config: LatentTrainingConfig,
) -> tuple[list[ChatPair], list[ChatPair], list[ChatPair], int]:
    """Pairs to learn from, held-out and test pairs, and how many prompts were repeated.

    Of a repeated prompt the test pair is kept, else the held-out one.
    """
    parts = [config.test, config.validation, config.data]
    known: set[str] = set()
    found, repeated = [], 0
    for part in parts:
        pairs, again = read_pairs(part) if isinstance(part, Path) else ([], 0)
        fresh = [pair for pair in pairs if pair.prompt not in known]
        repeated += again + len(pairs) - len(fresh)
        known |= {pair.prompt for pair in fresh}
        found.append(fresh)
    tested, held_out, learnt = found
    if not isinstance(config.validation, Path):
        learnt, held_out = hold_out(learnt, config.validation)
    return learnt, held_out, tested, repeated


def _read_table(config: LatentTrainingConfig) -> OutcomeTable | None:
    if config.table is None:
        return None
    table = OutcomeTable.load(config.table)
    missing = [member.name for member in config.members if member.name not in table.models]
    if missing:
        raise RouterError(
            f"{config.table} has no model {', '.join(map(repr, missing))}; it has "
            f"{', '.join(map(repr, table.models))}"
        )
    return table


def _split(table: OutcomeTable) -> str:
    return "all" if table.prompts.splits is None else "train"


def _hyperparameters(config: LatentTrainingConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NO_CHOICES)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fingerprint(
    config: LatentTrainingConfig,
    members: Mapping[str, Member] | None,
    table: OutcomeTable | None,
) -> str:
    if missing := [m.name for m in config.members if members is not None and m.name not in members]:
        raise RouterError(f"members that were given lack {', '.join(map(repr, missing))}")
    revisions = [
        member_revision(member) if members is None else members[member.name].revision
        for member in config.members
    ]
    validation = config.validation
    held_out = _sha256(validation) if isinstance(validation, Path) else validation
    test = None if config.test is None else _sha256(config.test)
    data = [_sha256(config.data), held_out, test, None if table is None else table.sha256]
    encoder = get_encoder(config.encoder).revision if config.has_router else None
    facts = [_TRAINING_VERSION, _hyperparameters(config), data, revisions, encoder]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _finished(out: Path, fingerprint: str) -> LatentTrainingManifest | None:
    if not (out / MANIFEST).is_file():
        return None
    try:
        manifest = LatentTrainingManifest.model_validate(read_latent(out).training)
    except ValueError as error:
        raise RouterError(f"{out / MANIFEST} was written by another program") from error
    if manifest.fingerprint != fingerprint:
        raise RouterError(
            f"{out} holds another training's collaboration; choose another folder or delete it"
        )
    return manifest


class _Training:
    """The state of one training: what is learnt, its optimiser, what was measured."""

    def __init__(
        self,
        config: LatentTrainingConfig,
        members: Mapping[str, Member],
        reader: TextReader,
        learnt: Sequence[int],
        checked: Sequence[int],
        tested: Sequence[int],
        table: OutcomeTable | None,
    ) -> None:
        self.config, self.members, self.reader = config, members, reader
        self.names = list(members)
        self.writer = None if config.writer is None else self.names.index(config.writer)
        torch.manual_seed(config.seed)
        stacked = {name: member.stacked for name, member in members.items()}
        device = next(iter(stacked.values())).device
        self.model = LatentModel(stacked, config.width, config.n_heads).to(device)
        self.router = LatentRouter(
            encoder=config.encoder, random_state=config.seed, weight_decay=config.weight_decay,
            learning_rate=config.router_learning_rate,
        )  # fmt: skip
        self.network = self.router.network(len(self.names)) if config.has_router else None
        self.learnt = torch.nn.ModuleDict({"interactions": self.model.interactions})
        self.n_router_parameters = 0
        if self.network is not None:
            self.learnt["router"] = self.network
            self.n_router_parameters = sum(p.numel() for p in self.network.parameters())
            self.vectors = self.router.encode([pair.prompt for pair in reader.pairs])
        self.n_parameters = interaction_parameters(
            self._listened(), self.names if self.writer is None else [self.names[self.writer]],
            width=config.width, n_heads=config.n_heads, n_stacks=config.n_stacks,
        )  # fmt: skip
        self.table = self._table_tensors(table)
        if self.table is not None and self.network is not None:
            # Before experts learn to listen it should be known to whom.
            self.router.teach(self.network, *self.table)
        lengths = [reader.length(number) for number in learnt]
        batches = config.max_steps * config.accumulation
        plan = plan_batches(lengths, config.batch_size, batches, config.seed)
        self.plan = [[learnt[place] for place in batch] for batch in plan]
        self.checked = sorted(checked, key=reader.length)
        self.tested = sorted(tested, key=reader.length)
        self.store = self._store()
        # Spread over the data, which may lie in an order of its own.
        self._fit_scales(learnt[:: max(1, len(learnt) // SCALE_TEXTS)])
        self.step, self.tokens, self.seconds, self.waited = 0, 0, 0.0, 0
        self.history: list[tuple[int, float]] = []
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self.test_before: list[dict[str, Any]] = []
        self.test_after: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] = {}
        self.best_step = 0

    def _fit_scales(self, numbers: Sequence[int]) -> None:
        """Measure what members' states look like on some texts.

        Adapters of one base are measured together: how they differ is what they have to say.
        """
        if not len(self.model.interactions):
            return
        writer = self.names[self.writer or 0]
        alone = self.config.active == 1
        found: dict[str, list[torch.Tensor]] = {}
        names = [writer] if alone and self.writer is not None else self.names
        for name in names:
            ids = [
                self.reader.written(n, name if alone else writer).tokens[name].ids for n in numbers
            ]
            if self.store is None:
                states = self.model.read(name, ids)
            else:
                self.store.prepare((name, tuple(one)) for one in ids)
                states = [self.store.get(name, one) for one in ids]
            found.setdefault(self._base(name), []).extend(states)
        for name in names:
            self.model.fit_scales(name, found[self._base(name)])

    def _base(self, name: str) -> str:
        """What tells a member's base from others; its name if nothing does."""
        return self.members[name].revision.partition("+")[0] or name

    def _listened(self) -> dict[str, int]:
        alone = self.config.active == 1 and self.writer is not None
        return {
            name: member.stacked.width
            for place, (name, member) in enumerate(self.members.items())
            if not alone or place == self.writer
        }

    def _table_tensors(
        self, table: OutcomeTable | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if table is None or not self.config.correctness:
            return None
        split = _split(table)
        vectors = self.router.encode(table.with_prompts_of(split).texts)
        return vectors, torch.from_numpy(table.scores(split, self.names)).float()

    def _store(self) -> StateStore | None:
        kind = self.config.cache
        if kind == "none" or self.config.n_stacks == 1:
            return None
        store = StateStore(self.model, self.members, kind)
        store.prepare(self._wanted())
        return store

    def _wanted(self) -> Iterable[Wanted]:
        """All that may be read, whoever will be chosen: so it is the same in a resumed training."""
        numbers = dict.fromkeys(
            [*(n for batch in self.plan for n in batch), *self.checked, *self.tested]
        )
        writers = self.names if self.writer is None else [self.names[self.writer]]
        for number in numbers:
            for writer in writers:
                tokens = self.reader.written(number, writer).tokens
                alone = self.config.active == 1
                yield from ((name, tuple(tokens[name].ids)) for name in tokens
                            if not alone or name == writer)  # fmt: skip

    def run(
        self, out: Path, fingerprint: str, on_step: Callable[[int, float], None] | None
    ) -> None:
        """Go through the steps that are left, and take over the best parameters."""
        from transformers import get_scheduler

        config = self.config
        optimizer = self._optimizer()
        kind = "constant_with_warmup" if config.schedule == "constant" else config.schedule
        schedule = get_scheduler(kind, optimizer, config.warmup, config.max_steps)
        where = str(out.resolve()).encode()
        checkpoint = Checkpoint(
            "latent", [fingerprint.encode(), where], self.learnt, optimizer, schedule
        )
        self._resume(checkpoint)
        if not self.history:
            self.test_before = self._measured(self.tested)
            self._measure()
        with tqdm(
            total=config.max_steps, initial=self.step, desc=out.name, unit="step", delay=2,
            file=sys.stderr,
        ) as bar:  # fmt: skip
            while self.step < config.max_steps and self.waited < config.patience:
                started, tokens = time.monotonic(), self.tokens
                loss = self._train_step(optimizer)
                schedule.step()
                elapsed = time.monotonic() - started
                self.seconds += elapsed
                self.step += 1
                if self.step % config.evaluate_every == 0 or self.step == config.max_steps:
                    self._measure()
                # A refresh would show the bar at once, whatever its delay.
                bar.set_postfix(
                    loss=f"{loss:.3f}", held_out=f"{self.history[-1][1]:.4f}",
                    tokens_per_s=round((self.tokens - tokens) / elapsed), refresh=False,
                )  # fmt: skip
                bar.update()
                if self.step % config.checkpoint_every == 0 and self.step < config.max_steps:
                    checkpoint.save(self.best, self._progress())
                if on_step:
                    on_step(self.step, loss)
        self.learnt.load_state_dict(self.best)
        self.test_after = self._measured(self.tested)
        self._checkpoint = checkpoint

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in self.learnt.named_parameters():
            rate = config.learning_rate
            if name.startswith("router."):
                rate = config.router_learning_rate
            elif ".gain." in name:
                rate = config.gain_learning_rate
            groups.setdefault((rate, parameter.ndim > 1), []).append(parameter)
        return torch.optim.AdamW(
            {"params": found, "lr": rate, "weight_decay": decayed * config.weight_decay}
            for (rate, decayed), found in groups.items()
        )

    def _train_step(self, optimizer: torch.optim.Optimizer) -> float:
        config = self.config
        # Seeding each step makes dropout and draws independent of where a training was resumed.
        torch.manual_seed(config.seed * 1_000_003 + self.step + 1)
        self.learnt.train()
        optimizer.zero_grad()  # the router has some left of what it was taught before
        batches = self.plan[self.step * config.accumulation :][: config.accumulation]
        numbers = [number for batch in batches for number in batch]
        scores = self._scores(numbers)
        chosen = self._choose(scores, torch.rand_like(scores))
        weights = self._gates(scores, chosen)
        # Batches go backward one by one, so each ends at the gates, which have one graph for all.
        leaf = weights.detach().requires_grad_(self.network is not None)
        total = sum(self._n_targets(n, c) for n, c in zip(numbers, chosen, strict=True))
        loss = 0.0
        rows = iter(range(len(numbers)))
        for batch in batches:
            here = [next(rows) for _ in batch]
            part = torch.stack(self._losses(batch, chosen[here], leaf[here])).sum() / total
            loss += float(part.detach())
            self._check_finite(part)
            if part.requires_grad:
                part.backward()
        self._teach_router(scores, chosen, weights, leaf.grad)
        torch.nn.utils.clip_grad_norm_(self.learnt.parameters(), config.max_grad_norm)
        optimizer.step()
        return loss

    def _teach_router(
        self,
        scores: torch.Tensor,
        chosen: torch.Tensor,
        weights: torch.Tensor,
        gradient: torch.Tensor | None,
    ) -> None:
        """Pass on what the gates got from the loss of the answers, and add the router's own."""
        if self.network is None:
            return
        config = self.config
        loss = config.entropy * entropy_loss(scores)
        if config.balance and config.peers == "routed" and config.active < len(self.names):
            loss = loss + config.balance * self._balance(scores, chosen)
        if gradient is not None and weights.requires_grad:
            loss = loss + (weights * gradient).sum()
        if self.table is not None:
            vectors, known = self.table
            rows = torch.randint(len(vectors), (min(TABLE_ROWS, len(vectors)),))
            if not known[rows].isnan().all():
                found = masked_bce(self.network(vectors[rows]), known[rows])
                loss = loss + config.correctness * found
        loss.backward()

    def _balance(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        active = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        # A writer that was named is no choice.
        free = [place for place in range(len(self.names)) if place != self.writer]
        return load_balance_loss(scores[:, free], active[:, free])

    def _scores(self, numbers: Sequence[int]) -> torch.Tensor:
        if self.network is None:
            return torch.zeros(len(numbers), len(self.names))
        scores: torch.Tensor = self.network(self.vectors[numbers])
        self._check_finite(scores)
        return scores

    def _check_finite(self, found: torch.Tensor) -> None:
        if not found.isfinite().all():
            raise RouterError(
                f"training has diverged after step {self.step}, to numbers that are not finite; "
                "lower learning_rate"
            )

    def _choose(self, scores: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        random = self.config.peers == "random"
        return choose(
            scores, self.config.active, writer=self.writer, draws=draws if random else None
        )

    def _gates(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        if self.config.gates == "uniform":
            return torch.full(chosen.shape, 1 / self.config.active)
        return gates(scores, chosen)

    def _n_targets(self, number: int, chosen: torch.Tensor) -> int:
        return len(self.reader.written(number, self.names[int(chosen[0])]).targets)

    def _losses(
        self, numbers: Sequence[int], chosen: torch.Tensor, weights: torch.Tensor
    ) -> list[torch.Tensor]:
        """Loss of each answer, summed over its tokens."""
        return [_loss(*answer) for answer in self._logits(numbers, chosen, weights)]

    def _logits(
        self, numbers: Sequence[int], chosen: torch.Tensor, weights: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Logits and tokens of each answer, shapes (n_tokens, vocabulary) and (n_tokens,)."""
        texts, targets = [], []
        for number, places, counts in zip(numbers, chosen.tolist(), weights, strict=True):
            names = [self.names[place] for place in places]
            written = self.reader.written(number, names[0])
            tokens = {name: written.tokens[name] for name in names}
            states = None
            if self.store is not None:
                states = {name: self.store.get(name, tokens[name].ids) for name in names}
            heard = dict(zip(names, counts, strict=True))
            texts.append(LatentText(names[0], tokens, heard, states))
            targets.append(written.targets)
        found = self.model(texts, last=[len(one) for one in targets])
        if torch.is_grad_enabled():
            self.tokens += sum(len(text.tokens[text.writer].ids) for text in texts)
        return [
            (logits.float(), torch.tensor(one, device=logits.device))
            for logits, one in zip(found, targets, strict=True)
        ]

    @torch.no_grad()
    def _measured(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """What is made of each text, with the parameters as they are.

        An answer is ``exact`` if each of its tokens is the likeliest, so that greedy decoding would
        write it.
        """
        if not numbers:
            return []
        self.learnt.eval()
        generator = torch.Generator().manual_seed(self.config.seed)
        scores = self._scores(numbers)
        chosen = self._choose(scores, torch.rand(scores.shape, generator=generator))
        weights = self._gates(scores, chosen)
        answers: list[tuple[float, int, bool]] = []
        for start in range(0, len(numbers), self.config.batch_size):
            rows = slice(start, start + self.config.batch_size)
            for logits, targets in self._logits(numbers[rows], chosen[rows], weights[rows]):
                exact = bool((logits.argmax(-1) == targets).all())
                answers.append((float(_loss(logits, targets)), len(targets), exact))
        return [
            {
                "loss": loss,
                "tokens": n_tokens,
                "exact": exact,
                "gates": {
                    self.names[place]: round(gate, 6)
                    for place, gate in zip(places.tolist(), counts.tolist(), strict=True)
                },
            }
            for (loss, n_tokens, exact), places, counts in zip(
                answers, chosen, weights, strict=True
            )
        ]

    def _measure(self) -> None:
        """Measure the held-out loss; keep the parameters if they are the best so far."""
        found = self._measured(self.checked)
        now = _per_token(found)
        if not self.history:
            self.before = found
        if not self.history or now < min(loss for _, loss in self.history):
            self.after, self.best_step, self.waited = found, self.step, 0
            self.best = {
                name: tensor.detach().cpu().clone()
                for name, tensor in self.learnt.state_dict().items()
            }
        else:
            self.waited += 1
        self.history.append((self.step, now))

    def _progress(self) -> dict[str, Any]:
        names = ("step", "tokens", "seconds", "waited", "best_step", "history", "before", "after",
                 "test_before")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def _resume(self, checkpoint: Checkpoint) -> None:
        kept = checkpoint.restore()
        if kept is None:
            return
        self.best, progress = kept
        for name, value in progress.items():
            setattr(self, name, value)
        self.history = [(step, loss) for step, loss in self.history]
        where = f"step {self.step} of {self.config.max_steps}"
        tqdm.write(f"going on from {where} ({checkpoint.path})", file=sys.stderr)

    def facts(self) -> dict[str, Any]:
        """What the manifest says of how it went."""
        return {
            "steps": self.step,
            "best_step": self.best_step,
            "loss_before": _per_token(self.before),
            "loss": _per_token(self.after),
            "test_loss_before": _per_token(self.test_before) if self.tested else None,
            "test_loss": _per_token(self.test_after) if self.tested else None,
            "history": self.history,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
        }

    def save(self, out: Path, manifest: LatentTrainingManifest, table: OutcomeTable | None) -> None:
        """Write all files, the one that says it is finished last, and drop the checkpoint."""
        out.mkdir(parents=True, exist_ok=True)
        self._write(out / HELD_OUT, self.checked, self.before, self.after)
        if self.tested:
            self._write(out / TEST, self.tested, self.test_before, self.test_after)
        if self.network is not None:
            split = None if table is None else _split(table)
            metrics = {"held_out_loss": manifest.loss, "steps": manifest.best_step}
            self.router.adopt(self.network, self.names, metrics, table=table, split=split)
            self.router.save(out / ROUTER)
        save_latent(out, self.model, self.members, manifest.model_dump(mode="json"))
        self._checkpoint.remove()

    def _write(
        self,
        file: Path,
        numbers: Sequence[int],
        before: Sequence[Mapping[str, Any]],
        after: Sequence[Mapping[str, Any]],
    ) -> None:
        lines = [
            {"prompt": prompt_hash(self.reader.pairs[number].prompt), "before": old, "after": new}
            for number, old, new in zip(numbers, before, after, strict=True)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        file.write_text(text, encoding="utf-8")


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Loss of an answer, summed over its tokens."""
    return functional.cross_entropy(logits, targets, reduction="sum")


def _per_token(found: Sequence[Mapping[str, Any]]) -> float:
    return float(sum(one["loss"] for one in found) / sum(one["tokens"] for one in found))
