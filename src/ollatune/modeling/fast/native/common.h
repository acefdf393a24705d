// What all kernels use: sixteen fp32 numbers at a time, read from and written to bf16.

#pragma once

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;
typedef __m512 v16;

#define INLINE static inline __attribute__((always_inline))

INLINE __mmask16 tail(long left) { return left >= 16 ? 0xFFFF : (__mmask16)((1u << left) - 1); }

INLINE v16 load_bf16(const bf16 *p, __mmask16 m) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}

INLINE __m256i to_bf16(v16 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINE void store_bf16(bf16 *p, v16 x, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, to_bf16(x)); }

INLINE v16 set1(float x) { return _mm512_set1_ps(x); }

// exp(x) to about 2 ulp: 2^n · p(r), |r| <= ln2 / 2, p the polynomial of least relative error (7e-8).
INLINE v16 exp16(v16 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, set1(88.7f)), set1(-104.0f));
    v16 n = _mm512_roundscale_ps(_mm512_mul_ps(x, set1(1.44269504088896f)), 0);
    v16 r = _mm512_fnmadd_ps(n, set1(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, set1(-2.12194440e-4f), r);
    v16 p = set1(0.00829764780771659f);
    p = _mm512_fmadd_ps(p, r, set1(0.04191543232528672f));
    p = _mm512_fmadd_ps(p, r, set1(0.16667575098810614f));
    p = _mm512_fmadd_ps(p, r, set1(0.49998894405621247f));
    p = _mm512_fmadd_ps(p, r, set1(0.9999996918034997f));
    p = _mm512_fmadd_ps(p, r, set1(1.0000000716977315f));
    return _mm512_scalef_ps(p, n);
}

// The same to 3e-6, for results that are rounded to bf16 (4e-3) next. x up to 88; −inf gives a NaN, not 0.
INLINE v16 rough_exp16(v16 x) {
    v16 n = _mm512_roundscale_ps(_mm512_mul_ps(x, set1(1.44269504088896f)), 0);
    v16 r = _mm512_fnmadd_ps(n, set1(0.69314718056f), x);
    v16 p = set1(0.041458565565653756f);
    p = _mm512_fmadd_ps(p, r, set1(0.16790932425200567f));
    p = _mm512_fmadd_ps(p, r, set1(0.5000436044600419f));
    p = _mm512_fmadd_ps(p, r, set1(0.9999633900963074f));
    p = _mm512_fmadd_ps(p, r, set1(0.9999992609936286f));
    return _mm512_scalef_ps(p, n);
}

INLINE v16 sigmoid16(v16 x) {
    // 1 / y to about 1 ulp by one Newton step: a division would take as long as all the rest.
    v16 y = _mm512_add_ps(set1(1.0f), exp16(_mm512_sub_ps(_mm512_setzero_ps(), x)));
    v16 r = _mm512_rcp14_ps(y);
    return _mm512_fmadd_ps(r, _mm512_fnmadd_ps(y, r, set1(1.0f)), r);
}

// The same to 6e-5.
INLINE v16 rough_sigmoid16(v16 x) {
    v16 minus = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), set1(88.0f));
    return _mm512_rcp14_ps(_mm512_add_ps(set1(1.0f), rough_exp16(minus)));
}

// tanh(x) = 2 sigmoid(2x) - 1
INLINE v16 tanh16(v16 x) { return _mm512_fmsub_ps(set1(2.0f), sigmoid16(_mm512_add_ps(x, x)), set1(1.0f)); }

INLINE __m512i bf16_pairs(v16 low, v16 high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(low)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(high)), 16));
}
