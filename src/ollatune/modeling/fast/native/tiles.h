// Products of small tiles.

#pragma once

#include "common.h"

// C[m][n] (+)= Σ_k A[m][k] · B[k][n] where k counts pairs of bf16 in an int32: A is broadcast, B and C lie along lanes.
#define TILE(M, N)                                                                                                     \
    static void tile_##M##_##N(float *C, long ldc, const int32_t *A, long a_row, long a_pair, const int32_t *B,        \
                               long ldb, long pairs, int add) {                                                        \
        v16 c[M][N];                                                                                                   \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int n = 0; n < N; n++) c[m][n] = add ? _mm512_loadu_ps(C + m * ldc + 16 * n) : _mm512_setzero_ps();   \
        for (long k = 0; k < pairs; k++) {                                                                             \
            __m512i b[N];                                                                                              \
            for (int n = 0; n < N; n++) b[n] = _mm512_loadu_si512(B + k * ldb + 16 * n);                               \
            for (int m = 0; m < M; m++) {                                                                              \
                __m512i a = _mm512_set1_epi32(A[m * a_row + k * a_pair]);                                              \
                for (int n = 0; n < N; n++) c[m][n] = _mm512_dpbf16_ps(c[m][n], (__m512bh)a, (__m512bh)b[n]);          \
            }                                                                                                          \
        }                                                                                                              \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int n = 0; n < N; n++) _mm512_storeu_ps(C + m * ldc + 16 * n, c[m][n]);                               \
    }
#define TILES(M) TILE(M, 1) TILE(M, 2)
TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6) TILES(7) TILES(8) TILES(9) TILES(10) TILES(11) TILES(12)

typedef void (*tile_fn)(float *, long, const int32_t *, long, long, const int32_t *, long, long, int);
#define ROW(M) {tile_##M##_1, tile_##M##_2}
static const tile_fn tiles[12][2] = {ROW(1), ROW(2), ROW(3), ROW(4),  ROW(5),  ROW(6),
                                     ROW(7), ROW(8), ROW(9), ROW(10), ROW(11), ROW(12)};

// M × lanes (a multiple of 16) of C.
static void product(float *C, long ldc, const int32_t *A, long a_row, long a_pair, const int32_t *B, long ldb,
                    long M, long lanes, long pairs, int add) {
    for (long n = 0; n < lanes; n += 32) {
        long vectors = (lanes - n < 32 ? lanes - n : 32) / 16;
        for (long m = 0, rows; m < M; m += rows) {
            rows = M - m <= 12 ? M - m : M - m < 24 ? (M - m + 1) / 2 : 12;
            tiles[rows - 1][vectors - 1](C + m * ldc + n, ldc, A + m * a_row, a_row, a_pair, B + n, ldb, pairs, add);
        }
    }
}

// Transposes 16 × 16 int32.
INLINE void transpose_registers(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}
