r"""QLoRA's backbone: linear layers in 4-bit NormalFloat (Dettmers et al. 2023, arXiv:2305.14314).

A weight is cut into blocks of 64 values along its rows. A block keeps its largest absolute value
``c`` and, per value, the index of the nearest of 16 quantiles of the normal distribution. The
``c`` of a layer, less their mean, are themselves kept in 8 bits in blocks of 256 (double
quantization, section 3):

.. math::
    \hat W_{b,i} = q_{k(b,i)}\, \hat c_b, \qquad
    \hat c_b = d_{j(b)}\, C_{\lfloor b/256 \rfloor} + \bar c

That is ``4 + 8/64 + 32/(64 \cdot 256) = 4.127`` bits per value, and one mean per layer. The codes
and their way back are bitsandbytes'; the layer's forward pass is not, because on processors with
AVX512-BF16 bitsandbytes repacks a weight at its first pass without gradients, and from then on
computes in bfloat16 and hands no gradient back (0.50.2).

Multiplication is in float32. Under an autocast to bfloat16 (``trainer.precision``) it is in
bfloat16 where the device multiplies it natively: measured on all-MiniLM's shapes, batch 32 x 64,
one thread, a training step with LoRA took 494 ms instead of 822 with AMX, but 1225 with
AVX512-BF16 alone and 2671 without either. Evaluation stays in float32 everywhere: in bfloat16 a
sample's feature moved by 0.5 % with what else was in its batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cl_peft.errors import ConfigError
from cl_peft.modules.base import linear_sites

# On some processors its import complains that it cannot load a kernel from a hub, never used here.
_noisy = logging.getLogger("bitsandbytes.backends.cpu.ops")
_level = _noisy.level
_noisy.setLevel(logging.ERROR)
try:
    import bitsandbytes as bnb
except ImportError as error:
    raise ConfigError(
        "backbone.quantize=nf4 needs bitsandbytes, which is not installed. Install it by "
        "pip install 'cl_peft[qlora]', or use backbone.quantize=none."
    ) from error
finally:
    _noisy.setLevel(_level)

#: Values that share a scale.
BLOCK = 64


class NF4Linear(bnb.nn.Linear4bit):
    """A frozen linear layer whose weight is NF4 with double quantization.

    Args:
        layer: What it replaces; keeps its bias, and is left as it is.
    """

    def __init__(self, layer: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
        with _one_thread():  # and on the CPU: equal weights get equal codes on every machine
            codes, state = bnb.functional.quantize_4bit(
                layer.weight.detach().float().cpu(),
                blocksize=BLOCK,
                compress_statistics=True,
                quant_type="nf4",
            )
        state.to(layer.weight.device)
        self.weight = bnb.nn.Params4bit(
            codes.to(layer.weight.device),
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK,
            compress_statistics=True,
            quant_type="nf4",
            bnb_quantized=True,
        )
        self.quant_state = state
        self.bias = layer.bias
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        r"""``x \hat W^T + b``, in ``x``'s dtype."""
        kind = x.device.type
        lower = torch.is_autocast_enabled(kind) and native_bf16(x.device)
        dtype = torch.bfloat16 if lower else torch.float32
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(kind, enabled=False):
            # transposed: what versions before 0.50 want, and later ones accept
            codes, state = self.weight.t(), self.weight.quant_state
            y = bnb.matmul_4bit(x.to(dtype), codes, bias=bias, quant_state=state)
        return y.to(x.dtype)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bit of a mean depends on how many threads share the sum."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def quantize(model: nn.Module) -> None:
    """Replace the linear layers of the transformer's layers by NF4 ones, in place.

    Embeddings, norms, biases and poolers keep their precision, as in the paper.

    Raises:
        ConfigError: There are none, or one's rows are no whole number of blocks.
    """
    if not any(isinstance(m, nn.Linear) for m in model.modules()):
        raise ConfigError(
            f"backbone.quantize=nf4: {type(model).__name__} has no torch.nn.Linear layers (GPT-2 "
            "has another kind). Use backbone.quantize=none, or another backbone."
        )
    sites = linear_sites(model, ["all"])
    for site in sites:
        if site.d_in % BLOCK:
            raise ConfigError(
                f"backbone.quantize=nf4: {site.name} reads {site.d_in} values, but NF4 shares a "
                f"scale among blocks of {BLOCK}, and rows must be whole blocks. Use a backbone "
                f"whose widths are multiples of {BLOCK}, or backbone.quantize=none."
            )
    for site in sites:
        parent, _, child = site.name.rpartition(".")
        assert isinstance(site.layer, nn.Linear)
        setattr(model.get_submodule(parent), child, NF4Linear(site.layer))


def dequantized(weight: Tensor) -> Tensor:
    """The float32 matrix ``(out, in)`` that an NF4 weight stands for."""
    state = weight.quant_state  # type: ignore[attr-defined]
    values: Tensor = bnb.functional.dequantize_4bit(weight.data, state)
    return values


def quantized_bits_per_parameter(model: nn.Module) -> float | None:
    """Measured bits per weight of the quantized layers; None where there are none.

    Counts what a weight is stored as: codes, 8-bit scales, the scales of those, and each layer's
    mean. Not counted: the format's own tables of 16 and 256 values, 1088 bytes per layer.
    """
    size, count = 0, 0
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            state = layer.weight.quant_state
            parts = [layer.weight.data, state.absmax]
            if state.nested:
                parts += [state.offset, state.state2.absmax]
            size += sum(t.numel() * t.element_size() for t in parts)
            count += layer.in_features * layer.out_features
    return 8 * size / count if count else None


def native_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices faster than float32 ones.

    Of CPUs, those with AMX; AVX512-BF16 without it was slower here.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
