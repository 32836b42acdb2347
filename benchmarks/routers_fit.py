"""Fitting the ridge router against the least it can take, and routing against a forward pass.

    python benchmarks/routers_fit.py [--repeats 2] [--threads 1] [--quick]

The least: one product ``H^T H`` and one eigendecomposition, in float32, for 10,000 examples of 150
classes and M = 5,000 (--quick: 2,000 of each). The router chooses its ridge strength of eight by
Cholesky factors in float64. A forward pass is 32 texts of 16 tokens.
"""

from __future__ import annotations

import torch
from measure import arguments, compared, interleaved, minilm, plain, tokens, write

from cl_peft.routers.ridge import Ridge

CLASSES, WIDTH = 150, 384


def main() -> None:
    chosen = arguments(__doc__, repeats=2)
    n, size = (2000, 2000) if chosen.quick else (10_000, 5000)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randperm(n, generator=generator) % CLASSES
    centres = torch.randn(CLASSES, WIDTH, generator=generator)
    features = centres[labels] + torch.randn(n, WIDTH, generator=generator)
    hidden = torch.relu(features @ torch.randn(WIDTH, size, generator=generator))
    router = Ridge(projection=size)

    def fit() -> None:
        router.start(WIDTH, 0)
        router.fit(features, labels, 0)

    fitting = {
        "one product and one eigendecomposition": lambda: torch.linalg.eigh(hidden.T @ hidden),
        f"fit, {n} examples, M {size}": fit,
    }
    seconds = interleaved(fitting, chosen.repeats)
    least, own = fitting
    rows = [compared(own, least, seconds, "<= 3", (1.0, "s"))]
    few = router.state_bytes()
    router.start(WIDTH, 0)
    router.fit(features[::2], labels[::2], 0)
    more = few / router.state_bytes()
    rows.append(plain("state, over that of half the examples", [more], "x", "1"))
    router.start(WIDTH, 0)
    router.fit(features, labels, 0)

    backbone, batch = minilm(), tokens(32, 16)

    def forward() -> None:
        with torch.no_grad():
            backbone(batch)

    routing = {"forward pass": forward, "routing 32": lambda: router.choose(features[:32])}
    seconds = interleaved(routing, 10 * chosen.repeats)
    rows.append(compared("routing 32", "forward pass", seconds, "< 0.1"))
    write("routers_fit", "Routers", f"ridge, {n} examples, {CLASSES} classes, M {size}", rows)


if __name__ == "__main__":
    main()
