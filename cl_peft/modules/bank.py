"""The bank: all modules grown so far, stacked per site, and the scope that routes through them.

Per site and parameter there is one tensor ``(capacity, ...)`` that grows by doubling; a module is a
row of it. There is no nn.Module per task and site, so a thousand modules cost their bytes and no
more. The module in training is a separate leaf; it joins the stack when its task ends.

Nothing is active outside a scope: ``with bank.use(route): backbone(batch)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_peft.errors import DamagedRunError
from cl_peft.modules.base import Method, Params, Site

#: One module: parameters per site name.
Module = dict[str, Params]


@dataclass(frozen=True)
class Route:
    """For each sample, weights over the bank's modules, kept sparse.

    Attributes:
        modules: ``(B, k)`` int64 bank rows.
        weights: ``(B, k)`` float32; a row of zeros is the frozen backbone.
        single: The bank row, where the whole batch goes through one module with weight 1.
    """

    modules: Tensor
    weights: Tensor
    single: int | None = None

    @staticmethod
    def to(module: int, batch: int, device: torch.device | str = "cpu") -> Route:
        """The whole batch through one module."""
        rows = torch.full((batch, 1), module, dtype=torch.long, device=device)
        return Route(rows, torch.ones(batch, 1, device=device), module)

    @staticmethod
    def each(modules: Tensor) -> Route:
        """One module per sample; ``-1`` is the frozen backbone.

        Args:
            modules: ``(B,)`` bank rows.
        """
        first = int(modules[0])
        if first >= 0 and bool((modules == first).all()):
            return Route.to(first, len(modules), modules.device)
        weights = (modules >= 0).to(torch.float32)
        return Route(modules.clamp_min(0).unsqueeze(1), weights.unsqueeze(1))

    @staticmethod
    def dense(weights: Tensor) -> Route:
        """Any weights over all modules, ``(B, T)``: soft mixtures, or all ones."""
        rows = torch.arange(weights.shape[1], device=weights.device).expand_as(weights)
        return Route(rows, weights.to(torch.float32))


class Bank:
    """All modules of one method on one backbone.

    Args:
        method: The formula.
        model: The backbone's model; forward hooks are placed on its sites.
        device: Where the stacks live.
    """

    def __init__(self, method: Method, model: nn.Module, device: torch.device | str) -> None:
        self.method = method
        self.sites = method.sites(model)
        self.device = device
        self.count = 0
        self._stacks: dict[str, Params] = {}
        self._scope: Route | Module | None = None
        self._handles = [site.layer.register_forward_hook(self._hook(site)) for site in self.sites]

    def close(self) -> None:
        """Take the hooks off the backbone."""
        for handle in self._handles:
            handle.remove()

    def fresh(self, generator: torch.Generator) -> Module:
        """A new module that is not in the bank yet: leaf tensors that ask for gradients."""
        module = {}
        for site in self.sites:
            params = self.method.init(site, generator)
            module[site.name] = {
                name: tensor.to(self.device).requires_grad_(True) for name, tensor in params.items()
            }
        return module

    def add(self, module: Module) -> int:
        """Append a copy of ``module``; returns its row."""
        row = self.count
        capacity = max((len(t) for p in self._stacks.values() for t in p.values()), default=0)
        if self.sites and row >= capacity:
            self._grow(module, max(1, 2 * capacity))
        self.count += 1
        self.replace(row, module)
        return row

    @torch.no_grad()
    def replace(self, row: int, module: Module) -> None:
        """Overwrite row ``row`` with ``module``."""
        if not 0 <= row < self.count:
            raise IndexError(f"the bank has {self.count} modules, not row {row}")
        for site in self.sites:
            for name, tensor in module[site.name].items():
                self._stacks[site.name][name][row].copy_(tensor)

    def get(self, row: int) -> Module:
        """Views of row ``row``."""
        if not 0 <= row < self.count:
            raise IndexError(f"the bank has {self.count} modules, not row {row}")
        return {s: {n: t[row] for n, t in params.items()} for s, params in self._stacks.items()}

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

    def _checked(self, route: Route) -> Route | None:
        """The route, or None where it names no module with any weight.

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
        return route

    @contextmanager
    def training(self, module: Module) -> Iterator[None]:
        """Like :meth:`use`, with what only happens in training (dropout) switched on."""
        self.method.training_mode(True)
        try:
            with self.use(module):
                yield
        finally:
            self.method.training_mode(False)

    def parameters_per_module(self) -> int:
        """Number of values that one module holds."""
        generator = torch.Generator().manual_seed(0)
        return sum(
            tensor.numel()
            for site in self.sites
            for tensor in self.method.init(site, generator).values()
        )

    def check(self, tensors: Mapping[str, Tensor], source: str) -> Module:
        """Turn ``site/parameter`` tensors into a module, refusing any that do not fit.

        Raises:
            DamagedRunError: Names missing, left over or misshapen, each by name.
        """
        module: Module = {}
        problems, known = [], set()
        generator = torch.Generator().manual_seed(0)
        for site in self.sites:
            module[site.name] = {}
            for name, like in self.method.init(site, generator).items():
                key = f"{site.name}/{name}"
                known.add(key)
                if key not in tensors:
                    problems.append(f"missing {key}")
                elif tensors[key].shape != like.shape:
                    have, want = tuple(tensors[key].shape), tuple(like.shape)
                    problems.append(f"{key} has shape {have}, expected {want}")
                else:
                    module[site.name][name] = tensors[key].to(self.device)
        problems += [f"unknown {key}" for key in sorted(set(tensors) - known)]
        if problems:
            raise DamagedRunError(f"{source} does not fit the module: {'; '.join(problems[:5])}")
        return module

    def _grow(self, like: Module, capacity: int) -> None:
        for site in self.sites:
            stack = self._stacks.setdefault(site.name, {})
            for name, tensor in like[site.name].items():
                bigger = tensor.new_zeros((capacity, *tensor.shape)).requires_grad_(False)
                if name in stack:
                    bigger[: self.count] = stack[name][: self.count]
                stack[name] = bigger

    def _hook(self, site: Site) -> Any:  # noqa: ANN401 (torch's hook signature)
        def act(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            scope = self._scope
            if scope is None:
                return y
            if isinstance(scope, dict):
                return self.method.one(site, args[0], y, scope[site.name])
            if scope.single is not None:
                params = {n: t[scope.single] for n, t in self._stacks[site.name].items()}
                return self.method.one(site, args[0], y, params)
            if len(scope.modules) != len(y):
                raise ValueError(
                    f"the route has {len(scope.modules)} rows, but {site.name} saw a batch of "
                    f"{len(y)}"
                )
            params = {n: t[scope.modules] for n, t in self._stacks[site.name].items()}
            x = args[0].reshape(len(y), -1, site.d_in)
            flat = y.reshape(len(y), -1, site.d_out)
            return self.method.mixed(site, x, flat, params, scope.weights).reshape(y.shape)

        return act


def flatten(module: Module) -> dict[str, Tensor]:
    """``site/parameter`` names, as stored on disk."""
    return {f"{s}/{n}": t.detach() for s, params in module.items() for n, t in params.items()}
