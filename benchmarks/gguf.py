"""Reading, decoding and encoding GGUF beside the reference implementations.

    python benchmarks/gguf.py --json

prints one JSON object: `header_ratio`; `decode_ratio` by type (reference time over ours, so larger is better; into
memory that is kept with all threads or one, and into new memory); `encode_time_ratio` (llama.cpp's time over ours) and
`encode_rmse_ratio` (our error over llama.cpp's) by type.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

# This file has the name of the reference package, which must not be looked for here.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402
from benchmarks.gguf_codecs import (  # noqa: E402
    DECODED_TYPES,
    ENCODED_TYPES,
    ROUNDS,
    measure_decoding,
    measure_encoding,
)
from benchmarks.gguf_header import measure_header  # noqa: E402
from benchmarks.results import add_output_options, publish  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_output_options(parser)
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="rounds that count (%(default)s)"
    )
    parser.add_argument("--threads", type=int, help="torch threads to decode with (torch's own)")
    parser.add_argument("--types", nargs="*", help="only these tensor types")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    decoded = [name for name in DECODED_TYPES if name in (arguments.types or DECODED_TYPES)]
    encoded = [name for name in ENCODED_TYPES if name in (arguments.types or ENCODED_TYPES)]
    result: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        **measure_header(),
        **measure_decoding(decoded, rounds=arguments.rounds),
        **measure_encoding(encoded, rounds=arguments.rounds),
    }
    publish("gguf", result, arguments)


if __name__ == "__main__":
    main()
