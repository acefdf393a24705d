"""`training.torch_compile`: a model's decoder layers through torch's compiler, for Transformers' own forward pass.

Each layer is compiled for rows of every length, up to its attention and from there on: a row's segments are data to the
compiler, not shapes, so the attention runs as it does uncompiled. Names in checkpoints stay as they are, and so do
random numbers; generation (one token at a time, with a cache) is not compiled.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger
from ollatune.modeling.fast.attention import interrupt_compiled_layers
from ollatune.modeling.fast.forward import CausalStep, PackedRow, evaluation_mode
from ollatune.modeling.fast.segments import Segment
from ollatune.modeling.lora import lora_layers

_VARIANTS = 64
"""Versions of one layer's code: training or not, kinds of attention, adapted or not."""
_WARM_UP = (13, 17, 19, 12)
"""Lengths of the segments of the row that is compiled on: together a prime, which is no size of any model's."""
_WITHOUT = "Leave training.torch_compile: false."


def require_compiler(device: torch.device) -> None:
    """Raise UsageError where torch's compiler has nothing to compile with, found by compiling something small."""

    def small(values: Tensor) -> Tensor:
        return values.exp() + 1

    try:
        with _loading():
            torch.compile(small)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler's parts raise: it is named below
        needed = (
            "Triton (pip install triton)"
            if device.type == "cuda"
            else "a C++ compiler and Python's headers (Debian, Ubuntu: apt install g++ python3-dev)"
        )
        raise UsageError(
            f"training.torch_compile: torch cannot compile here: {_first_line(error)}",
            hint=f"Install {needed}. {_WITHOUT}",
        ) from error


def require_plain_weights(model: nn.Module) -> None:
    """Raise UsageError for weights that stay packed or in NF4: the compiler cannot see how they are decoded."""
    if any(hasattr(module, "matmul_forward") for module in model.modules()):
        raise UsageError(
            "training.torch_compile does not work with packed or NF4 weights.",
            hint=f"Set model.quantization: none. {_WITHOUT}",
        )


def compile_layers(model: nn.Module, *, recompute: bool) -> None:
    """Compile every decoder layer's forward pass over packed rows, when it is first run.

    `recompute` keeps only each layer's input for the backward pass (activation checkpointing).
    """
    require_plain_weights(model)
    adapters = lora_layers(model).values()
    if any(a.lora_A.dtype != cast(nn.Linear, a.base).weight.dtype for a in adapters):
        get_logger("training").warning(
            "Compiled layers in 16 bits report losses of a few hundredths too little while an adapter is small "
            "(torch 2.13); what is learned is the same. training.torch_compile: false reports them right."
        )
    # The compiler itself looks at the inputs' gradients.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    settings: Any = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, _VARIANTS)
    settings.fail_on_recompile_limit_hit = True  # or it would go on uncompiled, in silence
    with _loading():
        interrupt_compiled_layers()
        for layer in cast(Any, model).model.layers:
            layer.forward = _CompiledForward(layer.forward, recompute=recompute)


class _CompiledForward:
    """A layer's forward pass: compiled for packed rows, as it was for anything else."""

    def __init__(self, plain: Callable[..., Any], *, recompute: bool) -> None:
        self.plain = plain
        self.recompute = recompute
        self.compiled = torch.compile(
            _strict(plain), dynamic=True, options={"fallback_random": True}
        )

    def __call__(
        self, *inputs: Any, segment_lengths: list[int] | None = None, **settings: Any
    ) -> Any:
        if segment_lengths is None:
            return self.plain(*inputs, **settings)
        # An empty one as well: a tensor of a single element would be compiled for itself.
        settings["segment_lengths"] = torch.tensor([*segment_lengths, 0])
        try:
            if self.recompute and torch.is_grad_enabled():
                return checkpoint(self.compiled, *inputs, use_reentrant=False, **settings)
            return self.compiled(*inputs, **settings)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UsageError(
                f"training.torch_compile: torch cannot compile this model: {_first_line(error)}",
                hint=_WITHOUT,
            ) from error


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Modules of torch's compiler are loaded when they are first used, and warn about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _strict(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, in which whatever cannot be compiled is an error, but for the attention."""

    def strict(*inputs: Any, **settings: Any) -> Any:
        with torch._dynamo.error_on_graph_break(True):
            return forward(*inputs, **settings)

    return strict


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Compiled layers run as they are written inside the block, for hooks inside them."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return cast("contextlib.AbstractContextManager[Any]", torch.compiler.set_stance("force_eager"))


def warm_up(step_function: CausalStep, parameters: Sequence[nn.Parameter]) -> None:
    """Compile on a row that is always the same.

    The compiler fits its code to the sizes it sees first: a resumed run gets the code that the uninterrupted one has.
    """
    model = step_function.model
    device = next(model.parameters()).device
    started = time.perf_counter()
    ids_T = torch.arange(sum(_WARM_UP)) % cast(Any, model).config.vocab_size
    positions_T = torch.cat([torch.arange(length) for length in _WARM_UP])
    starts = itertools.accumulate(_WARM_UP, initial=0)
    segments = [Segment(start, length) for start, length in zip(starts, _WARM_UP, strict=False)]
    row = PackedRow(ids_T, positions_T, segments, torch.arange(8), ids_T[:8], len(ids_T)).to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        step_function.loss_sum(row).backward()
        with evaluation_mode(model):
            step_function.evaluate(row)
    for parameter in parameters:
        parameter.grad = None
    get_logger("training").info("Layers compiled in %.0f s.", time.perf_counter() - started)
