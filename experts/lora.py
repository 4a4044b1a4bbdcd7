"""LoRA adapters of one model in one batch: each row with its own, a mixture of several, or none.

Adapters lie in a fixed number of slots and are read when a row asks for them, so a library may be
larger than memory. In each layer they lie in one stack, and every row is multiplied by its own
slices of it; PEFT's mixed batches put a hook on every layer in every pass and multiply each
adapter's rows together, so that a row's bits depend on how many rows share its adapter. Imports
torch: loaded by engines that host adapters only.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import nn

from experts.adapter_files import LowRank, Updates, fuse, read_shapes, read_updates
from experts.errors import ExpertConfigError, InvalidRequestError
from experts.token_routing import TokenRouter

__all__ = ["NO_ADAPTER", "Adapter", "AdapterSlots", "AdapterUse"]

MADE = 8
"""Adapters made of several that are kept beside all others, where memory is not bounded."""

AHEAD = 4
"""Adapters whose matrices are kept for rows that wait, beside those in slots. They are in float32,
so that each takes twice the memory of one in bfloat16."""

Adapter = tuple[tuple[str, float], ...]
"""An adapter, or several made into one of the same rank: their names with their weights."""


@dataclass(frozen=True, slots=True, eq=False)
class AdapterUse:
    """How adapters change what a row's layers compute.

    Attributes:
        shares: Adapters with what their updates are multiplied by.
        router: Name of the token router that shares out adapters token by token; none for
            ``shares``.
    """

    shares: tuple[tuple[Adapter, float], ...] = ()
    router: str | None = None

    @property
    def whole(self) -> bool:
        """Whether it is one adapter as it is, or none."""
        return self.router is None and [share for _, share in self.shares] in ([], [1.0])


NO_ADAPTER = AdapterUse()


class _Pass:
    """How adapters change the rows of the next forward pass.

    Attributes:
        slots: Of each row's whole adapter, counted from 1, 0 for none. None if no row uses one.
        indices: The same as a tensor, shape (n_rows,).
        shares: Of the slots' adapters in each row; shape (n_rows, n_slots). None if no row mixes.
        routers: The rows that each token router shares out, by its name; shape (n_rows,) of
            booleans.
    """

    def __init__(self) -> None:
        self.slots: list[int] | None = None
        self.indices: torch.Tensor | None = None
        self.shares: torch.Tensor | None = None
        self.routers: dict[str, torch.Tensor] = {}


class _Rows:
    """The matrices of each row's adapter in one layer, behind one another.

    On a CPU, collecting them takes longer than multiplying by them, so they are kept from pass to
    pass, and only rows whose adapter has changed are copied; and products of one token per row take
    a third of the time in float32 that they take in bfloat16. (Measured with eight rows of rank 8:
    15 to 40 us a layer instead of 75 to 130.) On other devices copies of all rows would cost memory
    that they lack.
    """

    def __init__(self) -> None:
        self._slots: list[int | None] = []
        self._matrices: tuple[torch.Tensor, torch.Tensor] | None = None

    def of(
        self, slots: list[int], indices: torch.Tensor, down: torch.Tensor, up: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both matrices of the adapters in these slots; first axes of length n_rows.

        Args:
            slots: Of each row's adapter.
            indices: The same, shape (n_rows,).
            down: The layer's stack, see ``_AdaptedLinear``.
            up: The same.
        """
        if down.device.type != "cpu":
            return down[indices], up[indices]
        if len(slots) == 1:
            (slot,) = slots
            return down[slot : slot + 1], up[slot : slot + 1]
        if self._matrices is None or len(slots) > len(self._slots):
            self._slots = [None] * len(slots)
            self._matrices = (
                down.new_empty((len(slots), *down.shape[1:]), dtype=torch.float32),
                up.new_empty((len(slots), *up.shape[1:]), dtype=torch.float32),
            )
        for row, slot in enumerate(slots):
            if self._slots[row] != slot:
                for kept, source in zip(self._matrices, (down, up), strict=True):
                    kept[row] = source[slot]
                self._slots[row] = slot
        first, second = self._matrices
        return first[: len(slots)], second[: len(slots)]

    def forget(self, slot: int) -> None:
        """Another adapter comes into a slot."""
        self._slots = [None if held == slot else held for held in self._slots]


class _AdaptedLinear(nn.Module):
    """A linear layer plus, for each row, what adapters add to it.

    ``down`` has shape (n_slots + 1, in_features, rank), ``up`` (n_slots + 1, rank, out_features);
    index 0 is zero. Smaller ranks are padded with zeros.
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, base: nn.Linear, n_slots: int, rank: int, current: _Pass) -> None:
        super().__init__()
        self.base = base
        self._pass = current
        self._rows = _Rows()
        self._gates: dict[str, tuple[nn.Module, torch.Tensor]] = {}
        out_features, in_features = base.weight.shape
        down = base.weight.new_zeros((n_slots + 1, in_features, rank))
        up = base.weight.new_zeros((n_slots + 1, rank, out_features))
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def put(self, slot: int, update: LowRank | None) -> None:
        """Replace what lies in a slot."""
        self._rows.forget(slot)
        self.down[slot].zero_()
        self.up[slot].zero_()
        if update is not None:
            rank = update.down.shape[0]
            self.down[slot, :, :rank] = update.down.T
            self.up[slot, :rank] = update.up.T

    def grow(self, n_slots: int) -> None:
        """Have at least so many slots."""
        missing = n_slots + 1 - len(self.down)
        if missing > 0:
            down, up = (
                torch.cat([stack, stack.new_zeros((missing, *stack.shape[1:]))])
                for stack in (self.down, self.up)
            )
            self.down, self.up = down, up

    def add_gate(self, router: str, gate: nn.Module, slots: Sequence[int]) -> None:
        """Have a router share out the adapters of some slots here."""
        device = self.base.weight.device
        self._gates[router] = (gate.to(device), torch.tensor(slots, device=device) - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take and return shape (n_rows, n_tokens, features)."""
        result = cast(torch.Tensor, self.base(x))
        now = self._pass
        if now.slots is not None and now.indices is not None:
            down, up = self._rows.of(now.slots, now.indices, self.down, self.up)
            if down.dtype == x.dtype:
                result = torch.baddbmm(result, torch.bmm(x, down), up)
            else:
                update = torch.bmm(torch.bmm(x.to(down.dtype), down), up)
                result = result + update.to(result.dtype)
        if now.shares is not None:
            # Rows with a whole adapter get zeros from here, so their bits stay what they are.
            # Where memory has run out, some layers have a slot more than others.
            end = now.shares.shape[1] + 1
            hidden = torch.einsum("btf,nfr->btnr", x, self.down[1:end])
            shares = self._shares(x, hidden, now.shares)[..., None].to(hidden.dtype)
            result = result + torch.einsum("btnr,nro->bto", hidden * shares, self.up[1:end])
        return result

    def _shares(self, x: torch.Tensor, hidden: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """Shares of each slot's adapter in each token; shape (n_rows, n_tokens, n_slots)."""
        found = shares[:, None].expand(-1, x.shape[1], -1)
        for router, chosen in self._pass.routers.items():
            if router in self._gates:
                gate, places = self._gates[router]
                routed = torch.zeros_like(found)
                given = gate(x.float(), hidden[:, :, places].float())
                # Where products are cast, as in training, shares may be too.
                routed[..., places] = given.to(routed.dtype)
                found = torch.where(chosen[:, None, None], routed, found)
        return found


class AdapterSlots:
    """The adapters of a model, as many of them in memory as there are slots.

    Beside them there are the matrices of ``AHEAD`` adapters that were asked for and have no slot
    yet; what goes from there is read once more when its row comes to its turn. On a CPU each row of
    a batch has a copy too, see ``_Rows``. Only while token routers are made are all of theirs there
    twice.

    Layers that some adapter changes are replaced, in place. ``adapter`` and ``fused`` may be called
    from any thread; the rest from the one that runs the model.

    Args:
        model: A transformers model.
        folders: Name and PEFT folder of each adapter.
        n_slots: Adapters in memory at the same time; none for all, which are then read now, and
            for some that are made of several, which have places once there are any.
        routers: Share out adapters token by token. Theirs stay in memory.

    Attributes:
        layers: The layers that adapters change, by path, in the model's order.

    Raises:
        ExpertConfigError: An adapter is missing, is more than low-rank updates of linear layers,
            or belongs to another model; or routers have more adapters than there are slots.
    """

    def __init__(
        self,
        model: Any,
        folders: Mapping[str, Path],
        *,
        n_slots: int | None = None,
        routers: Mapping[str, TokenRouter] | None = None,
    ) -> None:
        self._folders = dict(folders)
        self._n_slots = len(folders) + MADE if n_slots is None else n_slots
        self._n_there = min(self._n_slots, len(folders))
        self._pass = _Pass()
        self._device: torch.device = model.device
        ranks: dict[str, int] = {}
        for name, folder in folders.items():
            for path, shape in read_shapes(folder).items():
                _check_fits(name, path, shape, model)
                ranks[path] = max(ranks.get(path, 0), shape[0])
        self.layers: dict[str, _AdaptedLinear] = {}
        for path, base in list(model.named_modules()):
            if path in ranks:
                parent, _, child = path.rpartition(".")
                layer = _AdaptedLinear(base, self._n_there, ranks[path], self._pass)
                setattr(model.get_submodule(parent), child, layer)
                self.layers[path] = layer
        # What lies in a slot, least recently used first.
        self._held: OrderedDict[Adapter, int] = OrderedDict()
        self._users: Counter[Adapter] = Counter()
        self._fixed: set[Adapter] = set()
        # What was read for rows that wait, oldest first.
        self._ahead: OrderedDict[Adapter, Updates] = OrderedDict()
        self._ahead_lock = Lock()
        if self._n_slots >= len(folders):
            for name in folders:
                self._hold(self.adapter(name))
        for name, router in (routers or {}).items():
            self.add_router(name, router.adapters, router.gate)

    def adapter(self, name: str) -> Adapter:
        """An adapter by its name; reads it if it is not in memory, where its row then finds it.

        Raises:
            ExpertConfigError: Its files cannot be read.
        """
        return self.fused({name: 1.0})

    def fused(self, weights: Mapping[str, float]) -> Adapter:
        """One adapter made of several: weighted sums of their ``A`` and of their ``B``.

        References:
            LoraHub (arXiv:2307.13269). Sums over ``B`` include the adapters' scales.

        Raises:
            ExpertConfigError: The files of one cannot be read.
        """
        adapter = tuple(sorted(weights.items()))
        if adapter not in self._held and adapter not in self._ahead:
            updates = self._load(adapter)
            with self._ahead_lock:
                self._ahead[adapter] = updates
                while len(self._ahead) > AHEAD:
                    self._ahead.popitem(last=False)
        return adapter

    def check(self, use: AdapterUse) -> None:
        """Make sure that a row's adapters can be in memory together.

        Raises:
            InvalidRequestError: They are too many.
        """
        wanted = {adapter for adapter, _ in use.shares} - self._fixed
        room = self._n_slots - len(self._fixed)
        if len(wanted) > room:
            raise InvalidRequestError(
                f"memory has room for {room} adapters at a time, but {len(wanted)} are mixed",
                "adapters",
            )

    def fits(self, use: AdapterUse) -> bool:
        """Whether all adapters of a row are in memory, or can be now."""
        wanted = {adapter for adapter, _ in use.shares}
        free = self._n_slots - sum(1 for one in self._held if self._users[one] or one in wanted)
        return sum(1 for one in wanted if one not in self._held) <= free

    def acquire(self, use: AdapterUse) -> None:
        """Bring a row's adapters into memory, where they stay until it releases them.

        Whatever is raised, the row has none to release, and other rows keep theirs.

        Raises:
            ExpertConfigError: An adapter has to be read and cannot be.
        """
        # Those that are there first, so that none makes room for another.
        for adapter, _ in use.shares:
            self._users[adapter] += 1
        try:
            for adapter, _ in use.shares:
                self._hold(adapter)
        except BaseException:
            self.release(use)
            raise

    def release(self, use: AdapterUse) -> None:
        """Let go of a row's adapters."""
        for adapter, _ in use.shares:
            self._users[adapter] -= 1

    def release_all(self) -> None:
        """Let go of all rows' adapters."""
        self._users = Counter(self._fixed)

    def set_rows(self, uses: Sequence[AdapterUse]) -> None:
        """Say which adapters the rows of the next forward pass use; all are acquired."""
        now, device = self._pass, self._device
        now.slots = now.indices = now.shares = None
        now.routers = {}
        slots = [self._held[use.shares[0][0]] if use.whole and use.shares else 0 for use in uses]
        if any(slots):
            now.slots, now.indices = slots, torch.tensor(slots, device=device)
        if all(use.whole for use in uses):
            return
        shares = torch.zeros((len(uses), self._n_there))
        for row, use in enumerate(uses):
            if not use.whole:
                for adapter, share in use.shares:
                    shares[row, self._held[adapter] - 1] = share
        now.shares = shares.to(device)
        for name in {use.router for use in uses if use.router is not None}:
            now.routers[name] = torch.tensor([use.router == name for use in uses], device=device)

    def add_router(
        self,
        name: str,
        adapters: Sequence[str],
        gate: Callable[[str, Sequence[LowRank | None]], nn.Module | None],
    ) -> None:
        """Have rows whose use names a router share out adapters token by token.

        Args:
            name: Of the router.
            adapters: Those it shares out; they stay in memory.
            gate: Given the path of a layer and what each adapter does there, gives what shares
                them out: from the layer's input and the input behind each ``A``, shapes as in
                ``experts.token_routing.Gate``. None leaves the layer as it is in the base.

        Raises:
            ExpertConfigError: The model lacks an adapter, or memory has no room for all of them.
        """
        missing = [adapter for adapter in adapters if adapter not in self._folders]
        if missing:
            raise ExpertConfigError(
                f"token router {name!r} shares out {missing[0]!r}, which the model has not; it has "
                f"{', '.join(map(repr, self._folders)) or 'none'}"
            )
        use = AdapterUse(tuple((self.adapter(adapter), 1.0) for adapter in adapters))
        self._fixed |= {adapter for adapter, _ in use.shares}
        others = len(self._fixed) < len(self._folders)
        if len(self._fixed) + others > self._n_slots:
            raise ExpertConfigError(
                f"token routers share out {len(self._fixed)} adapters, which stay in memory; that "
                f"has room for {self._n_slots}, others included: raise max_loaded_adapters"
            )
        self.acquire(use)
        updates = [self._load(adapter) for adapter, _ in use.shares]
        slots = [self._held[adapter] for adapter, _ in use.shares]
        for path, layer in self.layers.items():
            made = gate(path, [one.get(path) for one in updates])
            if made is not None:
                layer.add_gate(name, made, slots)

    def _hold(self, adapter: Adapter) -> None:
        """Bring an adapter into a slot."""
        if adapter not in self._held:
            # Reading may fail, so nothing goes for it before.
            with self._ahead_lock:
                updates = self._ahead.get(adapter)
            if updates is None:
                updates = self._load(adapter)
            slot = self._free_slot()
            for path, layer in self.layers.items():
                layer.put(slot, updates.get(path))
            self._held[adapter] = slot
            with self._ahead_lock:
                self._ahead.pop(adapter, None)
        self._held.move_to_end(adapter)

    def _free_slot(self) -> int:
        """A slot with nothing in it; what was used least recently goes if there is none."""
        if len(self._held) == self._n_slots:
            unused = next((one for one in self._held if not self._users[one]), None)
            if unused is None:
                raise RuntimeError("all adapters in memory are in use")
            del self._held[unused]
        taken = set(self._held.values())
        slot = next(slot for slot in range(1, self._n_slots + 1) if slot not in taken)
        if slot > self._n_there:
            for layer in self.layers.values():
                layer.grow(slot)
            self._n_there = slot
        return slot

    def _load(self, adapter: Adapter) -> Updates:
        if [weight for _, weight in adapter] == [1.0]:
            return read_updates(self._folders[adapter[0][0]])
        return fuse(self._folders, dict(adapter))


def _check_fits(name: str, path: str, shape: tuple[int, int, int], model: Any) -> None:
    """Make sure that an adapter's layer is a linear one of a model.

    Args:
        name: Of the adapter.
        path: Of the layer.
        shape: Rank, in_features and out_features of the update.
        model: A transformers model.

    Raises:
        ExpertConfigError: It is none, or has another size.
    """
    try:
        layer = model.get_submodule(path)
    except AttributeError as error:
        raise ExpertConfigError(
            f"adapter {name!r} changes {path}, which the model lacks; it was made for another one"
        ) from error
    layer = layer.base if isinstance(layer, _AdaptedLinear) else layer
    if not isinstance(layer, nn.Linear):
        raise ExpertConfigError(
            f"adapter {name!r} changes {path}, a {type(layer).__name__}; only linear layers can "
            "have adapters here: merge it into a model of its own, or use engine vllm"
        )
    _, in_features, out_features = shape
    if (out_features, in_features) != tuple(layer.weight.shape):
        raise ExpertConfigError(
            f"adapter {name!r} has updates of shape {(out_features, in_features)} for {path}, "
            f"which has {tuple(layer.weight.shape)}; it was made for another model"
        )
