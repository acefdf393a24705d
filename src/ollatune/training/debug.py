"""`--debug`: what the first batch looks like, and what passes through every module on it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ollatune.base.log import get_logger
from ollatune.data.batching import IGNORED
from ollatune.modeling.compiled import uncompiled
from ollatune.modeling.fast.forward import CausalStep, evaluation_mode
from ollatune.training.loop import TrainingRun
from ollatune.training.rows import row_of

_LOGGER = get_logger("debug")


@contextlib.contextmanager
def debugging(run: TrainingRun, decode: Callable[[Sequence[int]], str]) -> Iterator[None]:
    """Show the next batch and its way through the model; inside the block autograd names what made a NaN."""
    step = next(run.loader.steps(run.state.position))
    batch = next(step.micro_batches(run.state.split))
    assert batch.cu_seqlens_N is not None
    ids, targets = batch.input_ids_BT[0].tolist(), batch.target_ids_BT[0].tolist()
    end = int(batch.cu_seqlens_N[1])
    _LOGGER.debug(
        "First batch: %d examples, %d tokens, %d of them targets. Its first example, targets in ⟦ ⟧:\n%s",
        len(batch.cu_seqlens_N) - 1, len(ids), sum(t != IGNORED for t in targets),
        masked_text(ids[:end], targets[:end], decode),
    )  # fmt: skip
    row = row_of(batch).to(run.device)

    def compute(step_function: CausalStep) -> Tensor:
        return run.sharing.within(lambda: step_function.hidden(row))

    for line in module_lines(run.model, compute):
        _LOGGER.debug("%s", line)
    with torch.autograd.set_detect_anomaly(True):
        yield


def masked_text(
    ids: Sequence[int], targets: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> str:
    """The example as text, what is trained on in ⟦ ⟧. `targets[t]` is what is predicted from `ids[t]`, or IGNORED."""
    is_target = [False, *(target != IGNORED for target in targets)]
    tokens = list(ids)
    if targets[-1] != IGNORED:
        tokens.append(targets[-1])  # only ever predicted
    pieces: list[str] = []
    start = 0
    for place in range(1, len(tokens) + 1):
        if place == len(tokens) or is_target[place] != is_target[start]:
            text = decode(tokens[start:place])
            pieces.append(f"⟦{text}⟧" if is_target[start] else text)
            start = place
    return "".join(pieces)


def module_lines(model: nn.Module, compute: Callable[[CausalStep], Tensor]) -> Iterator[str]:
    """Name, type, output shape, norm and range of every module's output, in the order they are computed.

    Computed without dropout, gradients and the fused forward pass: that one passes by the modules.
    """
    seen: list[str] = []

    def note(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                seen.append(f"{name} ({type(module).__name__}): {describe(tensor)}")

        return hook

    handles = [
        module.register_forward_hook(note(name, module))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with torch.no_grad(), evaluation_mode(model), uncompiled():
            compute(CausalStep(model, use_fast_path=False))
    finally:
        for handle in handles:
            handle.remove()
    yield from seen


def gradient_lines(model: nn.Module) -> Iterator[str]:
    """Name, shape and norm of every trained tensor and of its gradient, after clipping."""
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            norm = float(_whole(parameter.grad).norm())
            yield f"{name}: {describe(parameter.detach())}; gradient norm {norm:.4g}"


def describe(tensor: Tensor) -> str:
    """Shape, norm, smallest and largest value, and how many are not finite."""
    values = _whole(tensor.detach()).float()
    bad = int((~torch.isfinite(values)).sum())
    text = f"{list(tensor.shape)} norm {float(values.norm()):.4g}"
    if values.numel():
        text += f", {float(values.min()):.4g} to {float(values.max()):.4g}"
    return text + (f", {bad} NOT FINITE" if bad else "")


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; every process asks for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else cast(Tensor, gather())


def log_gradients(model: nn.Module) -> None:
    """Log `gradient_lines`, once, after the first step."""
    for line in gradient_lines(model):
        _LOGGER.debug("%s", line)
