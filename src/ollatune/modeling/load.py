"""Build the Transformers model of a GGUF file: on the meta device first, then filled tensor by tensor.

Peak memory is the finished model, one stored tensor and one decoded piece of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ollatune.base.errors import InputError
from ollatune.base.log import get_logger
from ollatune.gguf.codecs import dequantize
from ollatune.gguf.reader import GGUFFile, TensorInfo
from ollatune.modeling.architectures import Architecture, TensorRule, architecture_of
from ollatune.modeling.nf4 import NF4Linear, is_quantizable
from ollatune.modeling.packed import view_of
from ollatune.modeling.packing import pack_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Mode = Literal["dense", "packed", "nf4"]

_PIECE_WEIGHTS = 16 << 20
"""Weights decoded at once: 64 MiB as float32."""


class TensorSource:
    """Reads the tensors of an open GGUF file, as stored or decoded. Pages of the file are let go after each."""

    def __init__(self, gguf: GGUFFile) -> None:
        self.gguf = gguf

    def info(self, name: str) -> TensorInfo:
        """A tensor's shape, type and place."""
        return self.gguf.tensors[name]

    def blocks(self, name: str) -> Tensor:
        """The stored bytes of a tensor, uint8 [rows, row_bytes]; the experts of a stack above each other."""
        info = self.info(name)
        blocks = torch.from_numpy(self.gguf.tensor_data(name).copy())
        self.gguf.release_pages(name)
        return blocks.view(-1, info.type.row_bytes(info.shape[-1]))

    def mapped(self, name: str) -> Tensor:
        """The same rows where they lie in the mapped file: no memory of their own, not to be written to."""
        info = self.info(name)
        return view_of(self.gguf.tensor_data(name)).view(-1, info.type.row_bytes(info.shape[-1]))

    def values(self, name: str) -> Tensor:
        """A small tensor decoded to float32, in its own shape."""
        info = self.info(name)
        return dequantize(self.blocks(name), info.type).view(info.shape)


def load_base_model(
    gguf: GGUFFile,
    *,
    mode: Mode = "dense",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    serving_context: int | None = None,
) -> PreTrainedModel:
    """The model in `gguf` as a Transformers model, all of it frozen, in evaluation mode.

    `mode` dense: every weight decoded to `dtype`. Packed: quantised matrices keep the file's blocks and are decoded as
    they compute, on a CPU from the mapped file itself; float matrices, norms and biases have `dtype`.
    `serving_context`: the context length in tokens it will be served with, for models that compute differently beyond
    the one they were trained on (Phi-3).

    Raises InputError for an architecture or shape that cannot be trained here.
    """
    architecture = architecture_of(gguf.metadata, gguf.tensors)
    rules = architecture.present_rules()
    source = TensorSource(gguf)
    with torch.no_grad():
        config = architecture.config(source.values, serving_context=serving_context)
        config.dtype = dtype
        model = _build_empty(architecture, config)
        _drop_absent_biases(model, architecture, gguf)
        _check_shapes(model, rules, gguf)
        _fill_buffers(model)
        architecture.prepare_rotary(model, source.values)
        filled: set[str] = set()
        if mode == "packed":
            filled = pack_model(model, rules, source, dtype=dtype, device=torch.device(device))
        rest = [rule for rule in rules if rule.gguf_name not in filled]
        _fill_parameters(model, rest, source, dtype, device, to_nf4=mode == "nf4")
        _tie_head(model)
    unfilled = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    assert not unfilled, f"no rule fills {unfilled}"
    model.to(device)
    model.requires_grad_(False)
    get_logger("modeling").debug("Loaded %s as %s, %s.", gguf.path, type(model).__name__, mode)
    return model.eval()


def _build_empty(architecture: Architecture, config: PretrainedConfig) -> PreTrainedModel:
    """The model with every parameter and buffer on the meta device: shapes without memory."""
    with torch.device("meta"):
        return architecture.model_class()(config)


def _drop_absent_biases(model: PreTrainedModel, architecture: Architecture, gguf: GGUFFile) -> None:
    """Transformers has one switch for all attention biases; a file may have those of query, key and value alone."""
    for rule in architecture.tensor_map():
        if rule.is_optional and rule.gguf_name not in gguf.tensors:
            model.get_submodule(rule.hf_module).register_parameter("bias", None)


def _check_shapes(model: PreTrainedModel, rules: list[TensorRule], gguf: GGUFFile) -> None:
    """Raise InputError where a tensor has another shape than the parameter it fills."""
    for rule in rules:
        parameter = model.get_parameter(rule.hf_name)
        expected, found = (
            tuple(rule.transform.part(parameter).shape),
            gguf.tensors[rule.gguf_name].shape,
        )
        if expected != found:
            raise InputError(
                f"Tensor `{rule.gguf_name}` has shape {found}; {expected} was expected for {rule.hf_name}.",
                hint="The file's metadata does not belong to its tensors; fetch the model again.",
            )


def _fill_buffers(model: PreTrainedModel) -> None:
    """Give the meta buffers their values: they are computed from the configuration and not stored in any file."""
    for module in model.modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not names:
            continue
        if "RotaryEmbedding" in type(module).__name__:
            module._buffers.update(type(module)(model.config)._buffers)
        elif names == ["embed_scale"]:
            module._buffers["embed_scale"] = torch.tensor(math.sqrt(model.config.hidden_size))
        else:
            raise NotImplementedError(f"Buffers {names} of {type(module).__name__} are not known.")


def _fill_parameters(
    model: PreTrainedModel,
    rules: list[TensorRule],
    source: TensorSource,
    dtype: torch.dtype,
    device: str | torch.device,
    *,
    to_nf4: bool,
) -> None:
    """Decode each tensor into its parameter, which is allocated when its first tensor comes.

    `to_nf4` re-quantises each linear layer as soon as its last tensor is there, so that no more than one is dense.
    """
    last_of = {rule.hf_name: rule for rule in rules}
    for rule in rules:
        module = model.get_submodule(rule.hf_module)
        attribute = rule.hf_name.rpartition(".")[2]
        becomes_nf4 = to_nf4 and attribute == "weight" and is_quantizable(rule.hf_module, module)
        parameter: Any = getattr(module, attribute)
        if parameter.is_meta:
            values = torch.empty(
                parameter.shape, dtype=torch.float32 if becomes_nf4 else dtype, device=device
            )
            parameter = nn.Parameter(values, requires_grad=False)
            setattr(module, attribute, parameter)
        blocks, info = source.blocks(rule.gguf_name).to(device), source.info(rule.gguf_name)
        decode_into(rule.transform.part(parameter.data), blocks, info, rule)
        if becomes_nf4 and last_of[rule.hf_name] is rule:
            bias: Any = module.bias
            model.set_submodule(rule.hf_module, NF4Linear(parameter.data, bias, dtype))


def decode_into(target: Tensor, blocks: Tensor, info: TensorInfo, rule: TensorRule) -> None:
    """Decode `blocks` [rows, row_bytes] into `target`, in Transformers' row order, a piece at a time."""
    num_stacked = math.prod(info.shape[:-2])  # 1, or the experts of a stack
    columns = info.shape[-1]
    rows = target.shape[-2] if target.dim() > 1 else 1
    piece_rows = max(1, _PIECE_WEIGHTS // columns)
    if target.dim() == 1:
        target.copy_(rule.transform.gguf_to_hf(dequantize(blocks, info.type).view(-1)))
        return
    order = rule.transform.hf_order(rows)
    for stacked in range(num_stacked):
        stack_blocks = blocks[stacked * rows : (stacked + 1) * rows]
        stack_target = target[stacked] if target.dim() == 3 else target
        for start in range(0, rows, piece_rows):
            piece = slice(start, start + piece_rows)
            stored = stack_blocks[piece] if order is None else stack_blocks[order[piece]]
            part = stack_target[piece]
            if part.is_contiguous():
                dequantize(stored, info.type, out=part)
            else:
                part.copy_(dequantize(stored, info.type, dtype=target.dtype))


def _tie_head(model: PreTrainedModel) -> None:
    """Let the output layer be the token embedding again where the file has no output tensor of its own."""
    if model.config.tie_word_embeddings and isinstance(
        head := model.get_submodule("lm_head"), nn.Linear
    ):
        head.weight = model.get_submodule("model.embed_tokens").weight
