"""Compiled kernels of the bf16 training step on processors with AVX512-BF16; torch operators do the same elsewhere."""
