"""Gates of token routers that are learnt from samples of the adapters' domains.

    collegium library gates --library library --method phatgoose --out gates

A folder of gates holds ``token_router.json`` and ``gates.safetensors``. Those made of vectors have
one per adapter and layer that depends on no other adapter, so that making them again after an
adapter has come or gone makes only what is missing. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn import functional
from tqdm import tqdm

from experts.adapter_files import weights_hash
from experts.checkpoints import move_into
from experts.errors import ExpertConfigError
from experts.finetune_data import TokenPair, pack, plan_batches, read_pairs, tokenize
from experts.library.examiner import Examiner
from experts.library.manifest import Library, LibraryExpert
from experts.lora import AdapterSlots, AdapterUse
from experts.token_routing import GATES, GATES_MANIFEST, Gate, GatesManifest, read_gates

__all__ = [
    "METHODS",
    "make_gates",
    "mean_inputs",
    "ridge_gates",
    "solve_ridge",
    "trained_vectors",
    "write_gates",
]

METHODS = ("phatgoose", "average", "ridge")
# Of the papers: two adapters per token for vectors, one for ridge gates.
TOP_K = {"phatgoose": 2, "average": 2, "ridge": 1}
STEPS, LEARNING_RATE, WARMUP, BATCH = 100, 5e-3, 0.06, 16
RIDGE = 1e-2

Progress = Callable[[str], None]


def make_gates(
    library: Library,
    base: str,
    method: str,
    out: Path,
    *,
    seed: int = 0,
    device: str,
    progress: Progress,
) -> None:
    """Learn the gates of all adapters of a base that have samples, and write them to a folder.

    Args:
        library: Where the adapters are.
        base: Their base model.
        method: One of ``METHODS``.
        out: The folder. Vectors that it holds already, of the same adapters, are kept.
        seed: Of the order of samples, where gates are trained.
        device: A torch device.
        progress: Told what is being done.

    Raises:
        ExpertConfigError: An adapter cannot be used, none has samples, or the folder holds gates of
            another method.
    """
    chosen = library.adapters(base, with_samples=True)
    folders = {name: library.path(expert.path) for name, expert in chosen.items()}
    hashes = {name: weights_hash(folder) for name, folder in folders.items()}
    tensors: dict[str, torch.Tensor]
    made = _made_before(out, method, seed, hashes)
    if method == "ridge":
        examiner = Examiner(base, folders, device=device)
        samples = {name: _samples(library, one, examiner) for name, one in chosen.items()}
        progress(f"ridge: reading samples of {', '.join(samples)}")
        tensors = ridge_gates(examiner, samples)
    else:
        for name, expert in chosen.items():
            if name in made:
                continue
            progress(f"{method}: {name}")
            examiner = Examiner(base, {name: folders[name]}, device=device)
            pairs = _samples(library, expert, examiner)
            if method == "phatgoose":
                made[name] = trained_vectors(examiner, name, pairs, seed=seed)
            else:
                made[name] = mean_inputs(examiner, name, pairs)
            known = [name for name in chosen if name in made]
            tensors = _stacked([made[name] for name in known])
            some = {name: hashes[name] for name in known}
            write_gates(out, method, base, some, tensors, seed=seed)
        tensors = _stacked([made[name] for name in chosen])
    write_gates(out, method, base, hashes, tensors, seed=seed)


def mean_inputs(
    examiner: Examiner, name: str, pairs: Sequence[TokenPair]
) -> dict[str, torch.Tensor]:
    """What each layer reads on average while an adapter reads its samples.

    Returns:
        By path of the layer, shape (in_features,).

    References:
        The baseline "average activation" of PHATGOOSE (arXiv:2402.05859).
    """
    sums: dict[str, torch.Tensor] = {}
    tokens = 0

    def add(path: str, x: torch.Tensor) -> None:
        nonlocal tokens
        total = x.sum((0, 1))
        sums[path] = sums[path] + total if path in sums else total
        tokens += x.shape[1] if path == next(iter(sums)) else 0

    with _listening(examiner.adapters, add):
        for _ in examiner.logits(pairs, name):
            pass
    return {path: total / tokens for path, total in sums.items()}


def trained_vectors(
    examiner: Examiner, name: str, pairs: Sequence[TokenPair], *, steps: int = STEPS, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Vectors that say where an adapter helps on its own samples, which itself stays as it is.

    Each layer computes ``W x + sigmoid(v x) B A x``; ``v`` starts at zero.

    Returns:
        By path of the layer, shape (in_features,).

    References:
        PHATGOOSE (arXiv:2402.05859), with the optimiser of its code.
    """
    slots, model = examiner.adapters, examiner.model
    vectors = {
        path: torch.nn.Parameter(torch.zeros(layer.base.in_features, device=model.device))
        for path, layer in slots.layers.items()
    }
    slots.add_router(name, [name], lambda path, _: _Openness(vectors[path]))
    optimizer = torch.optim.AdamW(vectors.values(), lr=LEARNING_RATE)
    warmup = max(1, round(WARMUP * steps))
    plan = plan_batches([pair.length for pair in pairs], BATCH, steps, seed)
    slots.set_rows([AdapterUse(router=name)])
    for step, batch in enumerate(tqdm(plan, desc=f"gates of {name}", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / warmup)
        packed = pack([pairs[index] for index in batch])
        logits = packed.answer_logits(model)
        functional.cross_entropy(logits.float(), packed.labels.to(model.device)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {path: vector.detach() for path, vector in vectors.items()}


def ridge_gates(
    examiner: Examiner, samples: Mapping[str, Sequence[TokenPair]]
) -> dict[str, torch.Tensor]:
    """For each block of layers, the ridge regression of the domain on what its first layer reads.

    The base reads the samples alone. ``W = (X'X + 0.01 I)^-1 X'Y``, each column divided by its
    length, that of the bias left out.

    Args:
        examiner: Of the base.
        samples: Of each adapter.

    Returns:
        ``<block>.weight``, shape (n_adapters, in_features), and ``<block>.bias``, (n_adapters,).

    References:
        DUME (arXiv:2603.29765), whose experts are MLPs and see all their texts' first tokens; here
        blocks of adapted layers share a gate, and all tokens of a sample count.
    """
    firsts = _first_of_blocks(examiner.adapters)
    squares: dict[str, torch.Tensor] = {}
    sums: dict[str, list[torch.Tensor]] = {}
    for number, (_, pairs) in enumerate(samples.items()):

        def add(path: str, x: torch.Tensor, number: int = number) -> None:
            if path not in firsts:
                return
            rows = _with_one(x[0].double())
            square, total = rows.T @ rows, rows.sum(0)
            squares[path] = squares[path] + square if path in squares else square
            columns = sums.setdefault(path, [])
            if len(columns) == number:
                columns.append(total)
            else:
                columns[number] = columns[number] + total

        with _listening(examiner.adapters, add):
            for _ in examiner.logits(pairs, None):
                pass
    tensors = {}
    for path, square in squares.items():
        targets = torch.stack(sums[path], dim=1)
        solved = solve_ridge(square, targets)
        solved = solved / solved[:-1].norm(dim=0)
        block = path.rpartition(".")[0]
        tensors[f"{block}.weight"] = solved[:-1].T.float().contiguous()
        tensors[f"{block}.bias"] = solved[-1].float().contiguous()
    return tensors


def solve_ridge(square: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """``(X'X + 0.01 I)^-1 X'Y``, shape (n_inputs, n_outputs).

    Args:
        square: ``X'X``, shape (n_inputs, n_inputs).
        targets: ``X'Y``, shape (n_inputs, n_outputs).
    """
    solved: torch.Tensor = torch.linalg.solve(
        square + RIDGE * torch.eye(len(square), dtype=square.dtype), targets
    )
    return solved


class _Openness(Gate):
    """How far one adapter is let in: the sigmoid of an inner product, while it is learnt."""

    def __init__(self, vector: torch.nn.Parameter) -> None:
        super().__init__(1, 1.0)
        self.vector = vector

    def scores(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See ``Gate``."""
        return (x @ self.vector)[..., None]

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """See ``Gate``; not relative to others."""
        return self.scores(x, hidden).sigmoid()


def _with_one(x: torch.Tensor) -> torch.Tensor:
    """Rows with a one behind each."""
    return functional.pad(x, (0, 1), value=1.0)


def _first_of_blocks(adapters: AdapterSlots) -> set[str]:
    """Paths of those adapted layers that run before the others of their block."""
    firsts: dict[str, str] = {}
    for path in adapters.layers:
        firsts.setdefault(path.rpartition(".")[0], path)
    return set(firsts.values())


@contextmanager
def _listening(
    adapters: AdapterSlots, listener: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Have a function hear what each adapted layer reads, shape (1, n_tokens, in_features)."""

    def listen(path: str) -> Callable[..., None]:
        return lambda module, inputs: listener(path, inputs[0].detach().float())

    hooks = [
        layer.register_forward_pre_hook(listen(path)) for path, layer in adapters.layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _samples(library: Library, expert: LibraryExpert, examiner: Examiner) -> list[TokenPair]:
    assert expert.samples is not None
    pairs, _ = read_pairs(library.path(expert.samples))
    return tokenize(pairs, examiner.tokenizer)


def _stacked(made: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Vectors of all adapters by layer; zeros for those that leave it alone."""
    some = {path: vector for one in made for path, vector in one.items()}
    return {
        f"{path}.vectors": torch.stack([one.get(path, torch.zeros_like(like)) for one in made])
        for path, like in some.items()
    }


def _made_before(
    out: Path, learnt_by: str, seed: int, hashes: Mapping[str, str]
) -> dict[str, dict[str, torch.Tensor]]:
    """The vectors of a folder that belong to adapters as they are now."""
    if not (out / GATES_MANIFEST).exists():
        return {}
    manifest, tensors = read_gates(out)
    if (manifest.learnt_by, manifest.seed) != (learnt_by, seed):
        raise ExpertConfigError(
            f"{out} holds gates of the method {manifest.learnt_by} and the seed {manifest.seed}; "
            "choose another folder"
        )
    return {
        name: {path.removesuffix(".vectors"): tensor[row] for path, tensor in tensors.items()}
        for row, (name, weights) in enumerate(manifest.adapters.items())
        if hashes.get(name) == weights
    }


def write_gates(
    out: Path,
    learnt_by: str,
    base: str,
    adapters: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    *,
    top_k: int | None = None,
    seed: int = 0,
) -> None:
    """Write a folder of gates.

    Args:
        out: The folder.
        learnt_by: How they were learnt.
        base: The adapters' base model.
        adapters: Name and hash of the weights of each adapter, in the order of the rows.
        tensors: As in ``experts.token_routing.TokenRouter``.
        top_k: Adapters that a token goes through; none takes the method's own.
        seed: Of the training.
    """
    from safetensors.torch import save_file

    manifest = GatesManifest(
        learnt_by=learnt_by,
        seed=seed,
        method="vectors" if learnt_by in ("phatgoose", "average") else "affine",
        base=base,
        adapters=dict(adapters),
        top_k=top_k or TOP_K[learnt_by],
        temperature=1.0,
    )

    def write(folder: Path) -> None:
        save_file(dict(tensors), folder / GATES)
        (folder / GATES_MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")

    move_into(out, write, last=GATES_MANIFEST)
