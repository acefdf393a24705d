"""LoRA layers: one fused autograd function, adapters in fp32, PEFT's names and file format.

y = W x + s · B (A x), with s = alpha / r, or alpha / sqrt(r) for rsLoRA (Hu et al. 2021; Kalajdzievski 2023).
DoRA (Liu et al. 2024) scales each row of the sum by a trained magnitude over its norm.

Shapes: T positions, I input features, O output features, r rank; A_rI, B_Or.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from ollatune.base.errors import UsageError
from ollatune.base.text import did_you_mean


class FrozenLinear(Protocol):
    """What LoRA needs of a base layer; `PackedLinear` has these methods, `nn.Linear` is adapted below."""

    in_features: int
    out_features: int

    def matmul_forward(self, inputs_TI: Tensor) -> Tensor: ...

    def matmul_backward(self, gradient_TO: Tensor) -> Tensor: ...


def frozen_forward(base: nn.Module, inputs_TI: Tensor) -> Tensor:
    """W x + b without autograd, for a dense or a packed base layer."""
    if isinstance(base, nn.Linear):
        return functional.linear(inputs_TI, base.weight, base.bias)
    return cast(FrozenLinear, base).matmul_forward(inputs_TI)


def frozen_backward(base: nn.Module, gradient_TO: Tensor) -> Tensor:
    """The gradient of `frozen_forward` with respect to its inputs."""
    if isinstance(base, nn.Linear):
        return gradient_TO @ base.weight
    return cast(FrozenLinear, base).matmul_backward(gradient_TO)


class _LoRAFunction(torch.autograd.Function):
    """Keeps the layer's input and A x; nothing for the frozen weight."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        dropped: Tensor | None,
        A_rI: Tensor,
        B_Or: Tensor,
        scale: float,
        base: nn.Module,
    ) -> Tensor:
        inputs_TI = inputs.reshape(-1, inputs.shape[-1])
        lora_TI = inputs_TI if dropped is None else dropped.reshape(inputs_TI.shape)
        output_TO = frozen_forward(base, inputs_TI)
        A, B = A_rI.to(inputs.dtype), B_Or.to(inputs.dtype)
        low_Tr = lora_TI @ A.T
        output_TO.addmm_(low_Tr, B.T, alpha=scale)
        ctx.save_for_backward(lora_TI, low_Tr, A_rI, B_Or)
        ctx.scale, ctx.base, ctx.shape = scale, base, inputs.shape
        ctx.has_dropped = dropped is not None
        return output_TO.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        lora_TI, low_Tr, A_rI, B_Or = ctx.saved_tensors
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        A, B = A_rI.to(gradient.dtype), B_Or.to(gradient.dtype)
        gradient_Tr = gradient_TO @ B
        gradient_A = (gradient_Tr.T @ lora_TI).to(A_rI.dtype).mul_(ctx.scale)
        gradient_B = (gradient_TO.T @ low_Tr).to(B_Or.dtype).mul_(ctx.scale)
        gradient_inputs: Tensor | None = None
        gradient_dropped: Tensor | None = None
        if ctx.needs_input_grad[0]:
            gradient_inputs = frozen_backward(ctx.base, gradient_TO)
            if not ctx.has_dropped:
                gradient_inputs.addmm_(gradient_Tr, A, alpha=ctx.scale)
            gradient_inputs = gradient_inputs.view(ctx.shape)
        if ctx.has_dropped and ctx.needs_input_grad[1]:
            gradient_dropped = (gradient_Tr @ A).mul_(ctx.scale).view(ctx.shape)
        return gradient_inputs, gradient_dropped, gradient_A, gradient_B, None, None


class LoRALinear(nn.Module):
    """A frozen linear layer (dense or packed) with a trained low-rank addition.

    Args:
        base: `nn.Linear` or `PackedLinear`, frozen.
        rank, alpha: see the module's docstring.
        dropout: probability for the low-rank part's input.
        use_rslora, use_dora: the variants.
        generator: source of A's initial values (B starts at zero, so the layer starts as its base).
    """

    _squared_norms_O: Tensor

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        use_rslora: bool = False,
        use_dora: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        sizes = cast(FrozenLinear, base)
        self.base = base
        self.rank = rank
        self.scale = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.dropout = dropout
        # PEFT's kaiming_uniform(a=sqrt(5)) comes to U(-1/sqrt(I), 1/sqrt(I)).
        bound = 1.0 / math.sqrt(sizes.in_features)
        A_rI = torch.empty(rank, sizes.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(A_rI.to(device))
        self.lora_B = nn.Parameter(torch.zeros(sizes.out_features, rank, device=device))
        self.lora_magnitude: nn.Parameter | None = None
        if use_dora:
            squared_O = _row_squared_norms(base).to(device)
            self.register_buffer("_squared_norms_O", squared_O, persistent=False)
            self.lora_magnitude = nn.Parameter(squared_O.sqrt())

    @property
    def in_features(self) -> int:
        return cast(FrozenLinear, self.base).in_features

    @property
    def out_features(self) -> int:
        return cast(FrozenLinear, self.base).out_features

    def forward(self, inputs: Tensor) -> Tensor:
        dropped: Tensor | None = None
        if self.dropout > 0 and self.training:
            dropped = functional.dropout(inputs, self.dropout)
        if torch.compiler.is_compiling():
            output = self._plain(inputs if dropped is None else dropped, inputs)
        else:
            output = cast(
                Tensor,
                cast(Any, _LoRAFunction).apply(
                    inputs, dropped, self.lora_A, self.lora_B, self.scale, self.base
                ),
            )
        if self.lora_magnitude is None:
            return output
        bias = getattr(self.base, "bias", None)
        gain_O = (self.lora_magnitude / self._merged_norms()).to(output.dtype)
        return output * gain_O if bias is None else (output - bias) * gain_O + bias

    def _plain(self, lora_inputs: Tensor, inputs: Tensor) -> Tensor:
        """What `_LoRAFunction` computes, in operators that torch's compiler knows.

        Not `torch.add(…, alpha=scale)`: compiled, torch 2.13 loses a scale that is an attribute.
        """
        A, B = self.lora_A.to(inputs.dtype), self.lora_B.to(inputs.dtype)
        low = functional.linear(functional.linear(lora_inputs, A), B)
        return frozen_forward(self.base, inputs) + low * self.scale

    @torch.no_grad()
    def _merged_norms(self) -> Tensor:
        """Row norms of W + s B A without forming it; constant for the gradient, as in the DoRA paper (4.3)."""
        A, B = self.lora_A.float(), self.lora_B.float()
        bias = getattr(self.base, "bias", None)
        dtype = getattr(getattr(self.base, "weight", None), "dtype", torch.float32)
        AW_rO = frozen_forward(self.base, A.to(dtype)).float()
        if bias is not None:
            AW_rO = AW_rO - bias.float()
        cross_O = (B * AW_rO.T).sum(1)
        low_O = ((B @ (A @ A.T)) * B).sum(1)
        squared = self._squared_norms_O + 2 * self.scale * cross_O + self.scale**2 * low_O
        return squared.clamp_min(0).sqrt().clamp_min(1e-12)

    @torch.no_grad()
    def delta_update(self, decoded_OI: Tensor) -> Tensor:
        """The merged weight W + s B A (or DoRA's) for the fp32 weight `decoded_OI`."""
        merged = torch.addmm(decoded_OI, self.lora_B.float(), self.lora_A.float(), alpha=self.scale)
        if self.lora_magnitude is not None:
            gain_O = self.lora_magnitude.float() / merged.norm(dim=1).clamp_min(1e-12)
            merged *= gain_O[:, None]
        return merged

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


def frozen_base(layer: nn.Module) -> nn.Module:
    """The frozen layer below an adapter; a layer without one is its own."""
    return layer.base if isinstance(layer, LoRALinear) else layer


def _row_squared_norms(base: nn.Module) -> Tensor:
    weight = base.weight if isinstance(base, nn.Linear) else cast(Any, base).dequantized()
    return cast(Tensor, weight).float().square().sum(1)


@dataclass(frozen=True)
class LoRASettings:
    """How adapters are made (see `AdvancedConfig` for each field's meaning)."""

    rank: int
    alpha: float
    dropout: float
    target_modules: Sequence[str] | str = "all-linear"
    layers: int | None = None
    use_rslora: bool = False
    use_dora: bool = False


_LAYER_INDEX = re.compile(r"\.layers\.(\d+)\.")


def linear_names(model: nn.Module) -> list[str]:
    """Names of all linear layers inside the decoder layers (never the head), in module order."""
    return [
        name
        for name, module in model.named_modules()
        if _is_linear(module) and _LAYER_INDEX.search(f".{name}.")
    ]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or hasattr(module, "matmul_forward")


def select_targets(model: nn.Module, settings: LoRASettings) -> list[str]:
    """Names of the layers that get an adapter. Raises UsageError where a target matches nothing."""
    names = linear_names(model)
    short_names = sorted({name.rsplit(".", 1)[-1] for name in names})
    wanted = settings.target_modules
    if isinstance(wanted, str):
        if wanted != "all-linear":
            raise UsageError(
                f"lora_target_modules: `{wanted}` is not `all-linear` or a list of names."
            )
        chosen = names
    else:
        for target in wanted:
            if not any(_matches(name, target) for name in names):
                raise UsageError(
                    f"lora_target_modules: `{target}` matches no linear layer of this model."
                    f"{did_you_mean(target, short_names)}",
                    hint=f"It has: {', '.join(short_names)}.",
                )
        chosen = [name for name in names if any(_matches(name, target) for target in wanted)]
    if settings.layers is not None:
        indices = {_layer_index(name) for name in names}
        if settings.layers > len(indices):
            raise UsageError(
                f"advanced.lora_layers: {settings.layers} is more than the {len(indices)} layers of this model.",
                hint="Lower it, or leave it out to adapt all layers.",
            )
        first = max(indices) + 1 - settings.layers
        chosen = [name for name in chosen if _layer_index(name) >= first]
    return chosen


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _layer_index(name: str) -> int:
    found = _LAYER_INDEX.search(f".{name}.")
    assert found is not None
    return int(found[1])


def inject_lora(model: nn.Module, settings: LoRASettings, *, seed: int) -> list[str]:
    """Freeze `model`, wrap the target layers, and return their names.

    The initial values depend on `seed` and the layer's name only, so they do not change when other targets do.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    targets = select_targets(model, settings)
    for name in targets:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        base = getattr(parent, child)
        device = next((t.device for t in (*base.parameters(), *base.buffers())), None)
        layer = LoRALinear(
            base,
            settings.rank,
            settings.alpha,
            dropout=settings.dropout,
            use_rslora=settings.use_rslora,
            use_dora=settings.use_dora,
            generator=torch.Generator().manual_seed(_name_seed(seed, name)),
            device=device,
        )
        setattr(parent, child, layer)
    return targets


def _name_seed(seed: int, name: str) -> int:
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Adapted layers by the name their base layer has in the unadapted model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors: `<layer>.lora_A.weight` [r, I], `.lora_B.weight` [O, r], `.lora_magnitude_vector` [O]."""
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        state[f"{name}.lora_A.weight"] = layer.lora_A.detach()
        state[f"{name}.lora_B.weight"] = layer.lora_B.detach()
        if layer.lora_magnitude is not None:
            state[f"{name}.lora_magnitude_vector"] = layer.lora_magnitude.detach()
    return state


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` (see `adapter_state`) into the adapted model. Raises UsageError unless names and shapes agree."""
    own = adapter_state(model)
    problems = _state_problems(own, state)
    if problems:
        raise UsageError(
            f"The adapter does not fit this model: {'; '.join(problems[:3])}"
            + (f" (and {len(problems) - 3} more)." if len(problems) > 3 else "."),
            hint="Use the base model and the LoRA settings it was trained with.",
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def _state_problems(own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not expected" for name in state if name not in own]
    problems += [
        f"{name} has shape {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return problems


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Name and parameter of everything that is trained, tied weights once, in module order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def count_parameters(parameters: Iterable[tuple[str, nn.Parameter]]) -> int:
    return sum(parameter.numel() for _, parameter in parameters)
