"""A short digest that tells one merged export from every other, kept in the GGUF's own metadata.

Servers from 0.30 on store other bytes than they are sent, so a file's SHA-256 does not recognise a served model; a
metadata record is handed on as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch

from ollatune import __version__
from ollatune.checkpoint.format import Checkpoint

IDENTITY_KEY = "ollatune.export"

_DIGEST_CHARACTERS = 32


def export_identity(base_digest: str, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> str:
    """Hex digest over the base, the trained tensors, and the settings that decide what is written."""
    hasher = hashlib.sha256()
    plain = json.dumps(settings, sort_keys=True, default=str)
    hasher.update("\0".join((__version__, base_digest, plain)).encode())
    for name, tensor in sorted(checkpoint.model_state_dict.items()):
        values = tensor.detach().to("cpu").contiguous()
        hasher.update(f"\0{name} {values.dtype} {tuple(values.shape)}\0".encode())
        hasher.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:_DIGEST_CHARACTERS]
