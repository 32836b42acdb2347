"""The bank: all modules grown so far, stacked per site, and the scope that routes through them.

Per site and parameter there is one tensor ``(capacity, ...)`` that grows (:mod:`.stacks`); a module
is a row of it. There is no nn.Module per task and site, so a thousand modules cost their bytes and
no more. The module in training is a separate leaf; it joins the stack when its task ends. A row may
also wait for its values until something needs it.

Nothing is active outside a scope: ``with bank.use(route): backbone(batch)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_peft.errors import ConfigError, DamagedRunError
from cl_peft.modules.base import Handle, Method, Params, Site
from cl_peft.modules.route import Active, Given, Module, Route
from cl_peft.modules.stacks import Stacks, capacity, grown

__all__ = ["Active", "Bank", "Given", "Module", "Route", "flatten"]


class Bank:
    """All modules of one method on one backbone.

    Args:
        method: The formula.
        model: The backbone's model; the method's hooks are placed on it.
        device: Where the stacks live.
    """

    def __init__(self, method: Method, model: nn.Module, device: torch.device | str) -> None:
        self.method = method
        self.sites = method.sites(model)
        self.device = device
        self.count = 0
        self._stacks: Stacks = {}
        self._waiting: dict[int, Callable[[], Module]] = {}
        self._scope: Route | Module | Given | None = None
        self._training = False
        #: What the method's hooks keep during one forward pass of the model.
        self.passing: Any = None
        self._handles: list[Handle] = method.install(self, model)

    def close(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self._handles:
            handle.remove()

    # ------------------------------------------------------------------ modules

    def fresh(self, generator: torch.Generator, words: Sequence[Tensor] = ()) -> Module:
        """A new module that is not in the bank yet: leaf tensors that ask for gradients.

        Args:
            generator: Where its random numbers come from.
            words: Token ids of the names of the classes that it will learn, for methods that start
                from them.
        """
        module = {}
        for site in self.sites:
            params = self.method.worded(site, self.method.init(site, generator), words)
            module[site.name] = {
                name: tensor.to(self.device).requires_grad_(True) for name, tensor in params.items()
            }
        return module

    def add(self, module: Module) -> int:
        """Append a copy of ``module``, folded; returns its row."""
        self._write(self.count, self._ready(module))
        self.count += 1
        return self.count - 1

    def add_later(self, load: Callable[[], Module]) -> int:
        """Append a module that is loaded when something first needs it; returns its row.

        Args:
            load: Gives the module; what it raises reaches whoever needed it, each time.
        """
        self.count += 1
        self._waiting[self.count - 1] = load
        return self.count - 1

    def replace(self, row: int, module: Module) -> None:
        """Overwrite row ``row`` with ``module``, folded."""
        self._require(row)
        self._write(row, self._ready(module))
        self._waiting.pop(row, None)

    def get(self, row: int) -> Module:
        """Views of row ``row``, without what was derived."""
        self._require(row)
        self._load([row])
        return {
            site.name: {
                n: t[row] for n, t in self._stacks[site.name].items() if not n.startswith("~")
            }
            for site in self.sites
        }

    def parameters_per_module(self) -> int:
        """Number of values that a finished module holds."""
        return sum(t.numel() for params in self._like().values() for t in params.values())

    def check(self, tensors: Mapping[str, Tensor], source: str) -> Module:
        """Turn ``site/parameter`` tensors into a module, refusing any that do not fit.

        Raises:
            DamagedRunError: Names missing, left over or misshapen, each by name.
        """
        module: Module = {}
        problems, known = [], set()
        for site, params in self._like().items():
            module[site] = {}
            for name, like in params.items():
                key = f"{site}/{name}"
                known.add(key)
                if key not in tensors:
                    problems.append(f"missing {key}")
                elif tensors[key].shape != like.shape:
                    have, want = tuple(tensors[key].shape), tuple(like.shape)
                    problems.append(f"{key} has shape {have}, expected {want}")
                else:
                    module[site][name] = tensors[key].to(self.device)
        problems += [f"unknown {key}" for key in sorted(set(tensors) - known)]
        if problems:
            raise DamagedRunError(f"{source} does not fit the module: {'; '.join(problems[:5])}")
        return module

    # ------------------------------------------------------------------ scopes

    @contextmanager
    def use(self, route: Route | Module) -> Iterator[None]:
        """Inside this scope, forward passes go through ``route``, or a module in training.

        Scopes nest; leaving one restores the one outside.
        """
        outer = self._scope
        self._scope = self._checked(route) if isinstance(route, Route) else route
        try:
            yield
        finally:
            self._scope = outer

    @contextmanager
    def training(self, module: Module) -> Iterator[None]:
        """Like :meth:`use`, with what only happens in training (dropout) switched on."""
        self._switch(True)
        try:
            with self.use(module):
                yield
        finally:
            self._switch(False)

    @contextmanager
    def give(self, given: Given, training: bool = False) -> Iterator[None]:
        """Inside this scope, sites see exactly what is given: for learners that compose modules.

        Gradients flow into what is given. Sites that are not named are left alone.

        Args:
            given: What is active, by site name.
            training: Also switch on what only happens in training (dropout).
        """
        outer, self._scope = self._scope, given
        self._switch(training)
        try:
            yield
        finally:
            self._scope = outer
            self._switch(False)

    def reopening(self) -> Callable[[], AbstractContextManager[None]]:
        """Makes scopes in which is active what is active now, for layers that run once more."""

        def swap(state: tuple[Any, Any, bool]) -> tuple[Any, Any, bool]:
            before = (self._scope, self.passing, self._training)
            self._scope, self.passing, training = state
            self._switch(training)
            return before

        now = (self._scope, self.passing, self._training)

        @contextmanager
        def reopened() -> Iterator[None]:
            outer = swap(now)
            try:
                yield
            finally:
                swap(outer)

        return reopened

    def compose(
        self, rows: Sequence[int], weights: Tensor, new: Module | None = None, batch: int = 1
    ) -> Given:
        """Several modules with the same weights for every sample of a batch, as one.

        Args:
            rows: Finished modules.
            weights: ``(k,)`` weight of each, of ``new`` last; may ask for gradients.
            new: A module in training that joins them.
            batch: Number of samples.
        """
        self._load(rows)
        given: Given = {}
        for site in self.sites:
            stack = self._stacks.get(site.name, {})
            index = torch.tensor(list(rows), dtype=torch.long, device=self.device)
            params = {n.lstrip("~"): t[index] for n, t in stack.items()} if len(rows) else {}
            if new is not None:
                own = self.method.fold(site, new[site.name])
                own = {**own, **self.method.derive(site, own)}
                params = {
                    n: torch.cat([params[n], t[None]]) if n in params else t[None]
                    for n, t in own.items()
                }
            joined = self.method.join(site, params, weights)
            if joined is not None:
                given[site.name] = Active(joined)
            else:
                wide = {n: t.expand(batch, *t.shape) for n, t in params.items()}
                given[site.name] = Active(wide, weights.expand(batch, -1))
        return given

    @contextmanager
    def merged(self, row: int) -> Iterator[None]:
        """Inside this scope the backbone's own weights are ``W + delta`` of one module.

        For deployment of a single module: no extra cost per forward pass. On leaving, the weights
        are copied back, so they are the same bits as before (subtracting would not be exact).

        Raises:
            ConfigError: The method cannot be merged, or a site's weight is quantized.
        """
        module = {
            s.name: {**p, **{n.lstrip("~"): t for n, t in self._derived(s, p).items()}}
            for s, p in self._pairs(self.get(row))
        }
        saved: list[tuple[Tensor, Tensor]] = []
        outer, self._scope = self._scope, None
        try:
            with torch.no_grad():
                deltas = [
                    (s, *self.method.delta(s, module[s.name]), _mergeable(s)) for s in self.sites
                ]
                for site, weight, bias, table in deltas:
                    for own, change in ((table, weight), (site.bias, bias)):
                        if own is not None and change is not None:
                            saved.append((own, own.clone()))
                            own.add_(change.to(own.dtype))
            yield
        finally:
            self._scope = outer
            with torch.no_grad():
                for own, before in saved:
                    own.copy_(before)

    def current(self, site: Site) -> Active | None:
        """What the open scope makes active at ``site``; None outside a scope."""
        scope = self._scope
        if scope is None:
            return None
        if isinstance(scope, dict):
            found = scope.get(site.name)
            return found if isinstance(found, Active) or found is None else Active(found)
        stack = self._stacks[site.name]
        if scope.single is not None:
            return Active({n.lstrip("~"): t[scope.single] for n, t in stack.items()})
        rows = scope.modules.flatten()  # index_select copies rows whole, t[modules] value by value
        params = {n.lstrip("~"): t.index_select(0, rows) for n, t in stack.items()}
        shape = scope.modules.shape
        return Active({n: t.unflatten(0, shape) for n, t in params.items()}, scope.weights)

    def hook(self, site: Site) -> Callable[..., Tensor]:
        """A forward hook that puts the method's formula on the output of ``site``'s layer."""

        def act(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            active = self.current(site)
            if active is None:
                return y
            x = self.method.source(site, args[0])
            first = next(iter(layer._forward_hooks.values())) is act  # nobody else has seen y
            if active.weights is None:
                formula = self.method.fused if first else self.method.one
                return formula(site, x, y, active.params)
            if len(active.weights) != len(y):
                raise ValueError(
                    f"the route has {len(active.weights)} rows, but {site.name} saw a batch of "
                    f"{len(y)}"
                )
            flat = y.reshape(len(y), -1, y.shape[-1])
            if x.is_floating_point():  # token ids stay as they are
                x = x.reshape(len(y), -1, x.shape[-1])
            rows = active.weights.any(1)
            if bool(rows.all()):
                together = self.method.mixed_fused if first else self.method.mixed
                return together(site, x, flat, *_split(active)).reshape(y.shape)
            # samples that no module of this bank answers for cost nothing and keep their bits
            some = Active({n: t[rows] for n, t in active.params.items()}, active.weights[rows])
            out = flat.clone()
            out[rows] = self.method.mixed(site, x[rows], flat[rows], *_split(some))
            return out.reshape(y.shape)

        return act

    # ------------------------------------------------------------------ inside

    def _switch(self, training: bool) -> None:
        self._training = training
        self.method.training_mode(training)

    def _checked(self, route: Route) -> Route | None:
        """The route, its modules loaded; or None where it names no module with any weight.

        Raises:
            IndexError: It names a row that the bank does not have.
        """
        if not self.sites or not bool(route.weights.any()):
            return None
        low, high = int(route.modules.min()), int(route.modules.max())
        if low < 0 or high >= self.count:
            raise IndexError(
                f"the route names row {low if low < 0 else high}; the bank has {self.count} modules"
            )
        if self._waiting:  # rows with weight 0, too: what is gathered must be numbers
            self._load(route.modules.unique().tolist())
        return route

    def _require(self, row: int) -> None:
        if not 0 <= row < self.count:
            raise IndexError(f"the bank has {self.count} modules, not row {row}")

    def _pairs(self, module: Module) -> Iterator[tuple[Site, Params]]:
        for site in self.sites:
            yield site, module[site.name]

    def _derived(self, site: Site, params: Params) -> Params:
        return {f"~{name}": t for name, t in self.method.derive(site, params).items()}

    @torch.no_grad()
    def _ready(self, module: Module) -> Module:
        """A module as the stacks hold it: folded, with derived tensors, marked by ``~``."""
        ready = {}
        for site, params in self._pairs(module):
            folded = {n: t.detach() for n, t in self.method.fold(site, params).items()}
            ready[site.name] = {**folded, **self._derived(site, folded)}
        return ready

    def _like(self) -> Module:
        """A finished module with meaningless values, for its names and shapes."""
        generator = torch.Generator().manual_seed(0)
        return {s.name: self.method.fold(s, self.method.init(s, generator)) for s in self.sites}

    def _load(self, rows: Sequence[int]) -> None:
        """Fill those of these rows that wait for their values."""
        for row in [r for r in rows if r in self._waiting]:
            self._write(row, self._ready(self._waiting[row]()))
            del self._waiting[row]

    @torch.no_grad()
    def _write(self, row: int, ready: Module) -> None:
        if self.sites and row >= capacity(self._stacks):
            self._stacks = grown(self._stacks, ready, max(row + 1, self.count))
        for site, params in ready.items():
            for name, tensor in params.items():
                self._stacks[site][name][row].copy_(tensor)


def flatten(module: Module) -> dict[str, Tensor]:
    """``site/parameter`` names, as stored on disk."""
    return {f"{s}/{n}": t.detach() for s, params in module.items() for n, t in params.items()}


def _split(active: Active) -> tuple[Params, Tensor]:
    assert active.weights is not None
    return active.params, active.weights


def _mergeable(site: Site) -> Tensor:
    """The weight of a site, refused where it is quantized."""
    if site.quantized:
        raise ConfigError(
            f"{site.name} is quantized: adding a module to 4-bit weights and rounding again would "
            "lose more than the module learned. Merge into the unquantized backbone, or keep the "
            "module beside it."
        )
    return site.weight
