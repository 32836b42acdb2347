"""Several methods on one backbone: a bank per method, one numbering of modules over all of them.

Every method adds to what the frozen layer gives, and a weight of zero adds exactly nothing; so a
batch whose samples belong to modules of different methods is the banks' scopes, nested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from cl_peft.modules.bank import Bank, Module, Route


class MixedBank:
    """Modules of several methods, in the order in which they came.

    Args:
        banks: One bank per name, all on the same backbone.
    """

    def __init__(self, banks: Mapping[str, Bank]) -> None:
        self.banks = dict(banks)
        self.rows: list[tuple[str, int]] = []

    @property
    def count(self) -> int:
        """Number of modules over all banks."""
        return len(self.rows)

    def add(self, name: str, module: Module) -> int:
        """Append a module of the bank ``name``; returns its number over all banks."""
        self.rows.append((name, self.banks[name].add(module)))
        return self.count - 1

    @contextmanager
    def use(self, route: Route) -> Iterator[None]:
        """Like :meth:`Bank.use`, with a route over all modules.

        Raises:
            IndexError: The route names a module that is not there.
        """
        low, high = int(route.modules.min()), int(route.modules.max())
        if low < 0 or high >= self.count:
            raise IndexError(f"the route names modules {low} to {high} of {self.count}")
        with ExitStack() as stack:
            for name, bank in self.banks.items():
                part = self._part(name, route)
                if part is not None:
                    stack.enter_context(bank.use(part))
            yield

    def _part(self, name: str, route: Route) -> Route | None:
        """What of the route concerns one bank; None where nothing does."""
        own = torch.tensor([n == name for n, _ in self.rows], device=route.modules.device)
        local = torch.tensor([r for _, r in self.rows], device=route.modules.device)
        mine = own[route.modules]
        if route.single is not None:
            rows = len(route.modules)
            return Route.to(int(local[route.single]), rows, mine.device) if mine.any() else None
        weights = torch.where(mine, route.weights, torch.zeros_like(route.weights))
        if not bool(weights.any()):
            return None
        return Route(torch.where(mine, local[route.modules], 0), weights)
