// Weights of GGUF files as they lie there: 32 at a time to bf16.
//
// Layouts as in ggml's `ggml-common.h`. The arithmetic is that of `ollatune.gguf.codecs`, in fp32 with every product
// and difference rounded, and then rounded to bf16: the same bits as a dense layer of the decoded weights.

#pragma once

#include "common.h"

// The numbers of ggml's `ggml_type`.
enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

INLINE v16 half_at(const uint8_t *p) {
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _mm512_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
}

INLINE __m512i bytes16(__m128i x) { return _mm512_cvtepu8_epi32(x); }

INLINE __m128i low_nibbles(__m128i x) { return _mm_and_si128(x, _mm_set1_epi8(15)); }

INLINE __m128i high_nibbles(__m128i x) { return low_nibbles(_mm_srli_epi16(x, 4)); }

// A product that the compiler may not make part of a fused multiply-add, which would round once.
INLINE v16 rounded_product(v16 x, v16 y) {
    return _mm512_mul_round_ps(x, y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Scales and minima of sub-block `s` of Q4_K and Q5_K: 6 bits each, the last four split (`codecs.k_decode`).
INLINE void sub_scales(const uint8_t *scales, long s, int *scale, int *minimum) {
    if (s < 4) {
        *scale = scales[s] & 63;
        *minimum = scales[s + 4] & 63;
    } else {
        *scale = (scales[s + 4] & 15) | (scales[s - 4] >> 6) << 4;
        *minimum = scales[s + 4] >> 4 | (scales[s] >> 6) << 4;
    }
}

// Weights [at, at + 32) of the row that begins at `row`, as 16 pairs; `at` is a multiple of 32.
INLINE __m512i decode32(int type, const uint8_t *row, long at) {
    if (type == BF16) return _mm512_loadu_si512((const bf16 *)row + at);
    __m512i q0, q1;
    v16 s0, s1, minimum = _mm512_setzero_ps();
    int has_minimum = 0;
    if (type == Q4_0 || type == Q4_1) {
        const uint8_t *b = row + at / 32 * (type == Q4_0 ? 18 : 20);
        __m128i x = _mm_loadu_si128((const void *)(b + (type == Q4_0 ? 2 : 4)));
        q0 = bytes16(low_nibbles(x)), q1 = bytes16(high_nibbles(x));
        s0 = s1 = half_at(b);
        if (type == Q4_0) {
            q0 = _mm512_sub_epi32(q0, _mm512_set1_epi32(8)), q1 = _mm512_sub_epi32(q1, _mm512_set1_epi32(8));
        } else {
            minimum = half_at(b + 2), has_minimum = 1;
        }
    } else if (type == Q5_0 || type == Q5_1) {
        const uint8_t *b = row + at / 32 * (type == Q5_0 ? 22 : 24), *bits = b + (type == Q5_0 ? 2 : 4);
        __m128i x = _mm_loadu_si128((const void *)(bits + 4));
        uint32_t fifth;
        memcpy(&fifth, bits, sizeof fifth);
        const __m512i sixteen = _mm512_set1_epi32(16);
        q0 = bytes16(low_nibbles(x)), q1 = bytes16(high_nibbles(x));
        q0 = _mm512_mask_or_epi32(q0, (__mmask16)fifth, q0, sixteen);
        q1 = _mm512_mask_or_epi32(q1, (__mmask16)(fifth >> 16), q1, sixteen);
        s0 = s1 = half_at(b);
        if (type == Q5_0) {
            q0 = _mm512_sub_epi32(q0, sixteen), q1 = _mm512_sub_epi32(q1, sixteen);
        } else {
            minimum = half_at(b + 2), has_minimum = 1;
        }
    } else if (type == Q8_0) {
        const uint8_t *b = row + at / 32 * 34;
        q0 = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(b + 2)));
        q1 = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(b + 18)));
        s0 = s1 = half_at(b);
    } else if (type == Q4_K || type == Q5_K) {
        const uint8_t *b = row + at / 256 * (type == Q4_K ? 144 : 176), *nibbles = b + (type == Q4_K ? 16 : 48);
        long s = at / 32 % 8;
        __m128i x0 = _mm_loadu_si128((const void *)(nibbles + s / 2 * 32));
        __m128i x1 = _mm_loadu_si128((const void *)(nibbles + s / 2 * 32 + 16));
        q0 = bytes16(s % 2 ? high_nibbles(x0) : low_nibbles(x0));
        q1 = bytes16(s % 2 ? high_nibbles(x1) : low_nibbles(x1));
        if (type == Q5_K) {
            const __m512i bit = _mm512_set1_epi32(1 << s), sixteen = _mm512_set1_epi32(16);
            __m512i f0 = bytes16(_mm_loadu_si128((const void *)(b + 16)));
            __m512i f1 = bytes16(_mm_loadu_si128((const void *)(b + 32)));
            q0 = _mm512_mask_or_epi32(q0, _mm512_test_epi32_mask(f0, bit), q0, sixteen);
            q1 = _mm512_mask_or_epi32(q1, _mm512_test_epi32_mask(f1, bit), q1, sixteen);
        }
        int scale, least;
        sub_scales(b + 4, s, &scale, &least);
        s0 = s1 = rounded_product(half_at(b), set1((float)scale));
        // What is taken away, so that what is added is its negative: the same bits.
        minimum = rounded_product(half_at(b + 2), set1(-(float)least)), has_minimum = 1;
    } else {  // Q6_K
        const uint8_t *b = row + at / 256 * 210;
        long r = at / 32 % 8, half = r / 4, s = r % 4;
        const uint8_t *low = b + half * 64 + s % 2 * 32, *high = b + 128 + half * 32;
        const int8_t *scales = (const int8_t *)b + 192 + 2 * r;
        const __m512i three = _mm512_set1_epi32(3), offset = _mm512_set1_epi32(32);
        __m128i x0 = _mm_loadu_si128((const void *)low), x1 = _mm_loadu_si128((const void *)(low + 16));
        __m512i h0 = bytes16(_mm_loadu_si128((const void *)high));
        __m512i h1 = bytes16(_mm_loadu_si128((const void *)(high + 16)));
        h0 = _mm512_and_si512(_mm512_srli_epi32(h0, (unsigned)(2 * s)), three);
        h1 = _mm512_and_si512(_mm512_srli_epi32(h1, (unsigned)(2 * s)), three);
        q0 = bytes16(s < 2 ? low_nibbles(x0) : high_nibbles(x0));
        q1 = bytes16(s < 2 ? low_nibbles(x1) : high_nibbles(x1));
        q0 = _mm512_sub_epi32(_mm512_or_si512(q0, _mm512_slli_epi32(h0, 4)), offset);
        q1 = _mm512_sub_epi32(_mm512_or_si512(q1, _mm512_slli_epi32(h1, 4)), offset);
        v16 d = half_at(b + 208);
        s0 = rounded_product(d, set1((float)scales[0])), s1 = rounded_product(d, set1((float)scales[1]));
    }
    v16 w0 = rounded_product(_mm512_cvtepi32_ps(q0), s0), w1 = rounded_product(_mm512_cvtepi32_ps(q1), s1);
    if (has_minimum) w0 = _mm512_add_ps(w0, minimum), w1 = _mm512_add_ps(w1, minimum);
    return (__m512i)_mm512_cvtne2ps_pbh(w1, w0);
}
