"""The bare matrix products of one training step, timed: what the step would take if it did nothing else.

Counted are the products of every linear layer and of the output head: forward, backward towards their inputs, and
those of trained weights' gradients (adapters; a frozen weight has none). Layers that read the same input (query, key
and value; gate and up) count as one wide product. Attention's own products are not counted.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ollatune.modeling.lora import LoRALinear, linear_names
from ollatune.training.environment import has_onednn_bf16

_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_COPIES_BYTES = 256 << 20
"""Made-up weights held at once for one shape: enough that they do not stay in the processor's caches."""
_REPEATS = 3


@dataclass(frozen=True)
class Product:
    """`rows` tokens through a [columns, inner] weight, forward and back; `is_trained`: with its gradient."""

    rows: int
    inner: int
    columns: int
    is_trained: bool = False

    @property
    def flops(self) -> int:
        """Floating-point operations forward and backward."""
        return (6 if self.is_trained else 4) * self.rows * self.inner * self.columns


@dataclass(frozen=True)
class Ceiling:
    """Time of the bare products of a step and their number of operations."""

    seconds: float
    flops: int

    @property
    def gflops(self) -> float:
        """Speed of the bare products in GFLOP/s."""
        return self.flops / self.seconds / 1e9


def step_products(model: nn.Module, *, num_tokens: int, num_targets: int) -> dict[Product, int]:
    """The products of one step over `num_tokens` tokens, `num_targets` of them targets, and how often each occurs."""
    modules = dict(model.named_modules())
    names = [_adapted(name, modules) for name in linear_names(model)]
    counted: Counter[Product] = Counter()
    seen: set[str] = set()
    for name in names:
        if name in seen:
            continue
        siblings = _reading_the_same(name, modules)
        seen.update(siblings)
        for product in _products([modules[sibling] for sibling in siblings], num_tokens):
            counted[product] += 1
    for product in _products([model.get_submodule("lm_head")], max(1, num_targets)):
        counted[product] += 1
    return dict(counted)


def _adapted(name: str, modules: dict[str, nn.Module]) -> str:
    """The adapter's name for the frozen layer inside one, else the layer's own."""
    parent = name.rpartition(".")[0]
    return parent if isinstance(modules[parent], LoRALinear) else name


def _products(layers: Sequence[Any], rows: int) -> list[Product]:
    """The wide product of layers with one input; their adapters' A's as another, and each of their B's."""
    inner, adapted = layers[0].in_features, [x for x in layers if isinstance(x, LoRALinear)]
    columns = sum(layer.out_features for layer in layers)
    found = [Product(rows, inner, columns, _has_trained_weight(layers[0]))]
    if adapted:
        found.append(Product(rows, inner, sum(layer.rank for layer in adapted), is_trained=True))
        found += [Product(rows, x.rank, x.out_features, is_trained=True) for x in adapted]
    return found


def _has_trained_weight(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.requires_grad


def _reading_the_same(name: str, modules: dict[str, nn.Module]) -> list[str]:
    parent, _, last = name.rpartition(".")
    for group in _SHARED_INPUT:
        if last in group:
            return [found for member in group if (found := f"{parent}.{member}") in modules]
    return [name]


def measure_ceiling(
    products: dict[Product, int], dtype: torch.dtype, device: torch.device
) -> Ceiling:
    """Time `products` in `dtype` on `device`, each in the fastest of torch's ways to compute it. Seconds: best of 3."""
    seconds = sum(_seconds(product, count, dtype, device) for product, count in products.items())
    return Ceiling(seconds, sum(product.flops * count for product, count in products.items()))


def _seconds(product: Product, count: int, dtype: torch.dtype, device: torch.device) -> float:
    """One product of a step, forward and backward, `count` times."""
    rows, inner, columns = product.rows, product.inner, product.columns

    def made(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, dtype=dtype, device=device)

    inputs, gradient = made(rows, inner), made(rows, columns)
    copies = min(count, max(1, _COPIES_BYTES // (inner * columns * dtype.itemsize)))
    weights = [made(columns, inner) for _ in range(copies)]
    total = _fastest(inputs, weights, device)
    total += _fastest(gradient, [weight.t() for weight in weights], device)
    if product.is_trained:
        total += _best([lambda: torch.mm(gradient.t(), inputs)] * copies, device)
    return total * count / copies


def _fastest(inputs: Tensor, weights: Sequence[Tensor], device: torch.device) -> float:
    """Seconds of inputs_TI @ weight_OI.T for every weight, in the fastest way."""
    ways = [[_plain(inputs, weight) for weight in weights]]
    ways.append([_plain(inputs, weight.contiguous()) for weight in weights])
    if device.type == "cpu" and _can_prepack(inputs.dtype):
        ways.append([_prepacked(inputs, weight) for weight in weights])
    return min(_best(calls, device) for calls in ways)


def _plain(inputs: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: functional.linear(inputs, weight)


def _can_prepack(dtype: torch.dtype) -> bool:
    """Only products in bf16 have it, and only where torch was built with oneDNN and the processor is new enough."""
    return dtype == torch.bfloat16 and has_onednn_bf16()


def _prepacked(inputs: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The product with the weight in the library's own layout, as inference engines keep it."""
    ops: Any = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight.contiguous(), inputs.shape[0])
    return lambda: ops._linear_pointwise(inputs, packed, None, "none", [], "")


@torch.no_grad()
def _best(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        for call in calls:
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
