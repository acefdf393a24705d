"""Transformers' config.json so that its older releases read it too.

Releases from 5 on write `dtype` and `rope_parameters`. Those before look for `torch_dtype`, `rope_theta` and
`rope_scaling`, and where they do not find them compute with defaults, silently wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def readable_by_older(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` (a `to_dict()`) with the older names beside the newer ones."""
    filled = dict(config)
    if "dtype" in filled:
        filled["dtype"] = str(filled["dtype"]).removeprefix("torch.")
        filled["torch_dtype"] = filled["dtype"]
    rope = filled.get("rope_parameters") or {}
    if _GLOBAL in rope:
        # Gemma 3: two rotary embeddings, of which the older names scale the global one only.
        filled["rope_local_base_freq"] = rope[_LOCAL]["rope_theta"]
        rope = rope[_GLOBAL]
    if "rope_theta" in rope:
        filled["rope_theta"] = rope["rope_theta"]
    filled["rope_scaling"] = None
    if rope.get("rope_type", "default") != "default":
        kept = {key: value for key, value in rope.items() if key != "rope_theta"}
        filled["rope_scaling"] = kept | {"type": rope["rope_type"]}
    if rope.get("rope_type") == "yarn":
        # Older releases take this for the length before the stretching, and models are published so.
        filled["max_position_embeddings"] = rope["original_max_position_embeddings"]
    return filled
