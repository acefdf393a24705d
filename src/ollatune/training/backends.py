"""Which backend shares a run out among its processes, and what each can and cannot do."""

from __future__ import annotations

from importlib.util import find_spec

from ollatune.base.errors import UsageError
from ollatune.base.log import get_logger
from ollatune.config.schema import Config
from ollatune.training.distributed import Processes
from ollatune.training.sharing import Sharing

_NOT_SHARDED = ("adafactor", "adamw_8bit")


def require_backend(config: Config, *, distributed: bool) -> None:
    """Raise UsageError where the backend is not installed, or cannot do what is configured."""
    backend, training = config.distributed.backend, config.training
    if backend == "ddp":
        return
    if not distributed:
        get_logger("training").info(
            "distributed.backend: %s has no effect without --distributed.", backend
        )
        return
    if backend == "deepspeed" and find_spec("deepspeed") is None:
        raise UsageError(
            "distributed.backend: deepspeed needs DeepSpeed, which is not installed.",
            hint="pip install 'ollatune[deepspeed]', or choose fsdp.",
        )
    if training.batch_size == "auto":
        raise UsageError(
            f"training.batch_size: auto cannot be measured with distributed.backend: {backend}: "
            "processes that run out of memory alone cannot try again.",
            hint="Name a number, or use ddp.",
        )
    if (config.model.quantization or "").lower() == "nf4":
        raise UsageError(
            f"model.quantization: nf4 does not work with distributed.backend: {backend}.",
            hint="Use as-served (every process reads the same packed file), or distributed.backend: ddp.",
        )
    if backend == "deepspeed" and training.torch_compile:
        raise UsageError(
            "training.torch_compile does not work with DeepSpeed, which takes hold of the layers itself.",
            hint="Use distributed.backend: fsdp or ddp.",
        )
    if training.optimizer in _NOT_SHARDED:
        raise UsageError(
            f"training.optimizer: {training.optimizer} does not work on sharded weights.",
            hint="Use adamw, adam or sgd, or distributed.backend: ddp.",
        )
    if backend == "deepspeed" and config.model.dtype == "fp16":
        raise _no_fp16()
    if backend == "deepspeed":
        for key, value in (
            ("on_non_finite", training.on_non_finite),
            ("on_loss_spike", training.on_loss_spike),
        ):
            if value in ("skip", "rollback"):
                raise UsageError(
                    f"training.{key}: {value} does not work with DeepSpeed: "
                    "gradients it has taken over cannot be taken back.",
                    hint="Use stop, or distributed.backend: fsdp.",
                )


def require_dtype(config: Config, dtype: str, processes: Processes) -> None:
    """Raise UsageError for fp16 where its gradients are out of reach, also where a resumed run brought it along."""
    if dtype == "fp16" and processes.count > 1 and config.distributed.backend == "deepspeed":
        raise _no_fp16()


def _no_fp16() -> UsageError:
    return UsageError(
        "model.dtype: fp16 does not work with distributed.backend: deepspeed: its loss scaling is another one.",
        hint="Use bf16 or fp32, or distributed.backend: fsdp.",
    )


def shards_weights(config: Config, processes: Processes) -> bool:
    """Whether no process holds whole layers while it does not compute them."""
    settings = config.distributed
    if processes.count == 1:
        return False
    return settings.backend == "fsdp" or (
        settings.backend == "deepspeed" and settings.zero_stage == 3
    )


def sharing_class(config: Config, processes: Processes) -> type[Sharing]:
    """What shares the run out. One process has nothing to share."""
    if processes.count == 1 or config.distributed.backend == "ddp":
        return Sharing
    if config.distributed.backend == "fsdp":
        from ollatune.training.fsdp import FSDPSharing

        return FSDPSharing
    from ollatune.training.zero import ZeroSharing

    return ZeroSharing
