// The parts of a bf16 training step that are neither large matrix products nor worth a chain of torch operators.
//
// Plain C on pointers, so that it compiles in seconds and does not depend on a torch version. Every kernel splits its
// rows or heads over threads in a fixed way and sums in a fixed order: the same input gives the same bits for any number
// of threads. All arithmetic is in fp32; bf16 is what is read and written, rounded to nearest even.
//
// Shapes: T positions, D width, H query heads, G key heads (H a multiple of G), d head size.

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

// ---------------------------------------------------------------- RMSNorm

// y = x · inverse · gain, inverse = 1 / sqrt(mean(x²) + epsilon), for each row of x [T, D].
void norm_forward(const bf16 *x, const float *gain, float epsilon, bf16 *y, float *inverse, long T, long D,
                  int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        const bf16 *xt = x + t * D;
        v16 squares = _mm512_setzero_ps();
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 v = load_bf16(xt + i, m);
            squares = _mm512_fmadd_ps(v, v, squares);
        }
        float scale = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)D + epsilon);
        inverse[t] = scale;
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 v = _mm512_mul_ps(load_bf16(xt + i, m), set1(scale));
            store_bf16(y + t * D + i, _mm512_mul_ps(v, _mm512_maskz_loadu_ps(m, gain + i)), m);
        }
    }
}

// dx = inverse · (dy · gain − x · inverse² · mean(dy · gain · x)) + residual (if any), and y again.
void norm_backward(const bf16 *dy, const bf16 *x, const float *inverse, const float *gain, const bf16 *residual,
                   bf16 *dx, bf16 *y, long T, long D, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        v16 dot = _mm512_setzero_ps();
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 g = _mm512_mul_ps(load_bf16(dy + t * D + i, m), _mm512_maskz_loadu_ps(m, gain + i));
            dot = _mm512_fmadd_ps(g, load_bf16(x + t * D + i, m), dot);
        }
        float inv = inverse[t];
        float mean = _mm512_reduce_add_ps(dot) / (float)D * inv * inv;
        for (long i = 0; i < D; i += 16) {
            __mmask16 m = tail(D - i);
            v16 g = _mm512_mul_ps(load_bf16(dy + t * D + i, m), _mm512_maskz_loadu_ps(m, gain + i));
            v16 value = load_bf16(x + t * D + i, m), v = _mm512_fnmadd_ps(value, set1(mean), g);
            v16 more = residual ? load_bf16(residual + t * D + i, m) : _mm512_setzero_ps();
            store_bf16(dx + t * D + i, _mm512_fmadd_ps(v, set1(inv), more), m);
            value = _mm512_mul_ps(value, set1(inv));
            store_bf16(y + t * D + i, _mm512_mul_ps(value, _mm512_maskz_loadu_ps(m, gain + i)), m);
        }
    }
}

// ---------------------------------------------------------------- gated activation

enum { SILU = 0, GELU_TANH = 1 };

// The activation's value and, by `slope`, its derivative.
INLINE v16 activate(v16 x, int kind, v16 *slope) {
    if (kind == SILU) {
        v16 s = rough_sigmoid16(x);
        v16 value = _mm512_mul_ps(x, s);
        *slope = _mm512_add_ps(s, _mm512_mul_ps(value, _mm512_sub_ps(set1(1.0f), s)));
        return value;
    }
    const v16 c = set1(0.7978845608028654f), k = set1(0.044715f);
    v16 x2 = _mm512_mul_ps(x, x);
    v16 inner = _mm512_mul_ps(_mm512_mul_ps(c, x), _mm512_fmadd_ps(k, x2, set1(1.0f)));
    v16 t = tanh16(inner);
    v16 half = _mm512_fmadd_ps(set1(0.5f), t, set1(0.5f));
    v16 d_inner = _mm512_mul_ps(c, _mm512_fmadd_ps(set1(3 * 0.044715f), x2, set1(1.0f)));
    v16 sech2 = _mm512_fnmadd_ps(t, t, set1(1.0f));
    *slope = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_mul_ps(set1(0.5f), x), sech2), d_inner, half);
    return _mm512_mul_ps(x, half);
}

// product = activation(gate) · up; gate and up [T, F] share a row stride, the product is contiguous.
void gated_forward(const bf16 *gate, const bf16 *up, long stride, bf16 *product, int kind, long T, long F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        for (long i = 0; i < F; i += 16) {
            __mmask16 m = tail(F - i);
            v16 slope, a = activate(load_bf16(gate + t * stride + i, m), kind, &slope);
            store_bf16(product + t * F + i, _mm512_mul_ps(a, load_bf16(up + t * stride + i, m)), m);
        }
    }
}

// d_gate, d_up [T, F] (row stride `d_stride`) from d_product, and the product itself again.
void gated_backward(const bf16 *d_product, const bf16 *gate, const bf16 *up, long stride, bf16 *d_gate, bf16 *d_up,
                    long d_stride, bf16 *product, int kind, long T, long F, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        for (long i = 0; i < F; i += 16) {
            __mmask16 m = tail(F - i);
            v16 d = load_bf16(d_product + t * F + i, m), u = load_bf16(up + t * stride + i, m);
            v16 slope, a = activate(load_bf16(gate + t * stride + i, m), kind, &slope);
            store_bf16(d_gate + t * d_stride + i, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), m);
            store_bf16(d_up + t * d_stride + i, _mm512_mul_ps(d, a), m);
            store_bf16(product + t * F + i, _mm512_mul_ps(a, u), m);
        }
    }
}

// ---------------------------------------------------------------- cross-entropy

// Loss of each row of logits [N, V], and (if `gradient`) the logits replaced by the loss's gradient.
// softcap > 0: logits become softcap · tanh(logits / softcap) first. smoothing: label smoothing.
void cross_entropy(bf16 *logits, const int64_t *targets, double *losses, float softcap, float smoothing, int gradient,
                   long N, long V, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long n = 0; n < N; n++) {
        bf16 *row = logits + n * V;
        const v16 cap = set1(softcap), inverse_cap = set1(softcap > 0 ? 1 / softcap : 0);
        v16 top = set1(-INFINITY);
        for (long i = 0; i < V; i += 16) {
            __mmask16 m = tail(V - i);
            top = _mm512_mask_max_ps(top, m, top, load_bf16(row + i, m));
        }
        float highest = _mm512_reduce_max_ps(top);
        if (softcap > 0) highest = softcap * tanhf(highest / softcap);
        // Sums of up to 1024 terms in fp32, those in double: the loss keeps its digits for any vocabulary.
        double total = 0, plain = 0;
        for (long begin = 0; begin < V; begin += 16384) {
            long end = begin + 16384 < V ? begin + 16384 : V;
            v16 sum = _mm512_setzero_ps(), values = _mm512_setzero_ps();
            for (long i = begin; i < end; i += 16) {
                __mmask16 m = tail(V - i);
                v16 x = load_bf16(row + i, m);
                if (softcap > 0) x = _mm512_mul_ps(cap, tanh16(_mm512_mul_ps(x, inverse_cap)));
                sum = _mm512_mask_add_ps(sum, m, sum, exp16(_mm512_sub_ps(x, set1(highest))));
                values = _mm512_mask_add_ps(values, m, values, x);
            }
            total += _mm512_reduce_add_ps(sum);
            plain += _mm512_reduce_add_ps(values);
        }
        double normaliser = highest + log(total);
        union { uint32_t u; float f; } picked = {(uint32_t)row[targets[n]] << 16};
        if (softcap > 0) picked.f = softcap * tanhf(picked.f / softcap);
        losses[n] = normaliser - (1 - smoothing) * (double)picked.f - smoothing * plain / (double)V;
        if (!gradient) continue;
        const v16 shift = set1((float)normaliser), even = set1(smoothing / (float)V);
        for (long i = 0; i < V; i += 16) {
            __mmask16 m = tail(V - i);
            v16 x = load_bf16(row + i, m), slope = set1(1.0f);
            if (softcap > 0) {
                v16 t = tanh16(_mm512_mul_ps(x, inverse_cap));
                slope = _mm512_fnmadd_ps(t, t, slope);
                x = _mm512_mul_ps(cap, t);
            }
            v16 g = _mm512_sub_ps(exp16(_mm512_sub_ps(x, shift)), even);
            long offset = targets[n] - i;
            if (offset >= 0 && offset < 16) g = _mm512_mask_sub_ps(g, 1u << offset, g, set1(1 - smoothing));
            store_bf16(row + i, _mm512_mul_ps(g, slope), m);
        }
    }
}

// ---------------------------------------------------------------- rotary embedding

// Rotate the first 2·half of every head of q and k in place, `sign` −1 turns back; all of q is multiplied by `scale`.
// cosine and sine: [T, half] in fp32.
INLINE void rotate_heads(bf16 *x, long heads, long d, const float *cosine, const float *sine, long half, float sign, float scale) {
    for (long h = 0; h < heads; h++, x += d) {
        for (long i = 0; i < half; i += 16) {
            __mmask16 m = tail(half - i);
            v16 a = load_bf16(x + i, m), b = load_bf16(x + half + i, m);
            v16 c = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, cosine + i), set1(scale));
            v16 s = _mm512_mul_ps(_mm512_maskz_loadu_ps(m, sine + i), set1(scale * sign));
            store_bf16(x + i, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)), m);
            store_bf16(x + half + i, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)), m);
        }
        for (long i = 2 * half; scale != 1.0f && i < d; i += 16) {
            __mmask16 m = tail(d - i);
            store_bf16(x + i, _mm512_mul_ps(load_bf16(x + i, m), set1(scale)), m);
        }
    }
}

void rotate(bf16 *q, long q_stride, long q_heads, bf16 *k, long k_stride, long k_heads, long d, const float *cosine,
            const float *sine, long half, float sign, float scale, long T, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long t = 0; t < T; t++) {
        rotate_heads(q + t * q_stride, q_heads, d, cosine + t * half, sine + t * half, half, sign, scale);
        rotate_heads(k + t * k_stride, k_heads, d, cosine + t * half, sine + t * half, half, sign, 1.0f);
    }
}

INLINE __m512i bf16_pairs(v16 low, v16 high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(to_bf16(low)), _mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(high)), 16));
}

// ---------------------------------------------------------------- products of small tiles

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

INLINE void transpose16(int32_t *out, long out_stride, const int32_t *in, long stride) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(in + i * stride);
    transpose_registers(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * out_stride, r[i]);
}

// ---------------------------------------------------------------- attention along trees of segments

enum { QUERIES = 64, KEYS = 64, HALF = 32 };

// What both passes are given. Rows of q, k, v and of the outputs have a stride; q is rotated and scaled, k rotated.
// Segment s is rows [start[s], start[s] + length[s]); it sees the ranges [range_at[s], range_at[s + 1]) of
// range_start / range_length and itself up to the row. Units are trees of segments: [unit_at[u], unit_at[u + 1]).
typedef struct {
    const bf16 *q, *k, *v;
    long q_stride, k_stride, v_stride;
    long T, H, G, d;
    long units;
    const int32_t *unit_at, *start, *length, *range_at, *range_start, *range_length, *position;
    long window;  // positions a query sees, itself included; 0: all
    float softcap;
    int threads;
} Attention;

// [rows, d] → pairs of neighbouring columns in lanes of rows: out[d / 2][QUERIES], zero beyond the rows. d in 16s.
static void transpose_pairs(int32_t *out, const bf16 *x, long stride, long rows, long d) {
    for (long i = 0; i < d / 2; i += 16) {
        __mmask16 m = tail(d / 2 - i);
        for (long r = 0; r < QUERIES; r += 16) {
            __m512i block[16];
            for (long j = 0; j < 16; j++)
                block[j] = r + j < rows ? _mm512_maskz_loadu_epi32(m, (const int32_t *)(x + (r + j) * stride) + i)
                                        : _mm512_setzero_si512();
            transpose_registers(block);
            for (long j = 0; j < 16 && i + j < d / 2; j++) _mm512_storeu_si512(out + (i + j) * QUERIES + r, block[j]);
        }
    }
}

// [rows, d] → pairs of neighbouring rows: out[ceil(rows / 2)][d]; the row after the last is zero.
static void interleave_rows(int32_t *out, const bf16 *x, long stride, long rows, long d) {
    for (long r = 0; r < rows; r += 2) {
        const bf16 *a = x + r * stride, *b = a + stride;
        for (long i = 0; i < d; i += 16) {
            __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(a + i)));
            __m512i high = r + 1 < rows ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(b + i)))
                                        : _mm512_setzero_si512();
            _mm512_storeu_si512(out + r / 2 * d + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

// fp32 columns [d][QUERIES] times a factor by lane → bf16 rows.
static void write_rows(bf16 *out, long stride, const float *columns, const float *factor, long rows, long d) {
    for (long r = 0; r < rows; r += 16) {
        const v16 by = factor ? _mm512_loadu_ps(factor + r) : set1(1.0f);
        for (long i = 0; i < d; i += 16) {
            __m512i block[16];
            for (long j = 0; j < 16; j++)
                block[j] = (__m512i)_mm512_mul_ps(_mm512_loadu_ps(columns + (i + j) * QUERIES + r), by);
            transpose_registers(block);
            for (long l = 0; l < 16 && r + l < rows; l++) store_bf16(out + (r + l) * stride + i, (v16)block[l], 0xFFFF);
        }
    }
}

// One block of scores, keys along rows and queries along lanes: soft-capped, −inf where a query may not see the key.
// `slope`: the soft cap's derivative, if wanted. Only the keys that a half of the lanes can see at all (`seen`) are
// computed for it.
static void scores(float *S, float *slope, const Attention *a, const bf16 *k, const int32_t *queries, const long *seen,
                   long lanes, const int32_t *key_position, const int32_t *query_position, int masked) {
    for (long n = 0; n < lanes; n += HALF)
        product(S + n, QUERIES, (const int32_t *)k, a->k_stride / 2, 1, queries + n, QUERIES, seen[n / HALF],
                lanes - n < HALF ? lanes - n : HALF, a->d / 2, 0);
    for (long n = 0; n < lanes; n += 16) {
        const v16 cap = set1(a->softcap), inverse = set1(1 / a->softcap);
        for (long j = 0; a->softcap > 0 && j < seen[n / HALF]; j++) {
            v16 t = tanh16(_mm512_mul_ps(_mm512_loadu_ps(S + j * QUERIES + n), inverse));
            _mm512_storeu_ps(S + j * QUERIES + n, _mm512_mul_ps(t, cap));
            if (slope) _mm512_storeu_ps(slope + j * QUERIES + n, _mm512_fnmadd_ps(t, t, set1(1.0f)));
        }
        __m512i q = _mm512_loadu_si512(query_position + n);
        for (long j = 0; masked && j < seen[n / HALF]; j++) {
            __m512i distance = _mm512_sub_epi32(q, _mm512_set1_epi32(key_position[j]));
            __mmask16 hidden = _mm512_cmplt_epi32_mask(distance, _mm512_setzero_si512());
            if (a->window) hidden |= _mm512_cmpge_epi32_mask(distance, _mm512_set1_epi32((int)a->window));
            float *at = S + j * QUERIES + n;
            _mm512_storeu_ps(at, _mm512_mask_blend_ps(hidden, _mm512_loadu_ps(at), set1(-INFINITY)));
        }
    }
}

// Walks over what a block of queries sees: next() gives up to KEYS rows at a time.
typedef struct {
    const Attention *a;
    long segment, range, offset, first_row, last_row;
    long row, count;
    long seen[QUERIES / HALF];  // how many of the keys each half of the queries can see
    int masked;
} Walk;

static Walk walk_from(const Attention *a, long segment, long first_row, long last_row) {
    Walk w = {.a = a, .segment = segment, .range = a->range_at[segment], .first_row = first_row, .last_row = last_row};
    return w;
}

static int next(Walk *w) {
    const Attention *a = w->a;
    while (w->range <= a->range_at[w->segment + 1]) {
        int own = w->range == a->range_at[w->segment + 1];
        long start = own ? a->start[w->segment] : a->range_start[w->range];
        long length = own ? w->last_row + 1 - start : a->range_length[w->range];
        if (w->offset < length) {
            w->row = start + w->offset;
            w->count = length - w->offset < KEYS ? length - w->offset : KEYS;
            w->offset += w->count;
            w->masked = a->window || (own && w->row + w->count - 1 > w->first_row);
            for (long half = 0; half < QUERIES / HALF; half++) {
                long last = w->first_row + (half + 1) * HALF - w->row;
                w->seen[half] = own && last < w->count ? last : w->count;
            }
            return 1;
        }
        w->range++;
        w->offset = 0;
    }
    return 0;
}

// Whether no query of the block sees any of the keys, because all are further back than the window.
static int out_of_window(const Attention *a, const Walk *w, long first_query) {
    return a->window && a->position[first_query] - a->position[w->row + w->count - 1] >= a->window;
}

static long padded_positions(int32_t *out, const Attention *a, long row, long rows) {
    for (long r = 0; r < QUERIES; r++) out[r] = r < rows ? a->position[row + r] : -1;
    return (rows + 15) / 16 * 16;
}

// exp(score − shift), and 0 for a score of −inf whatever the shift.
INLINE v16 weight(v16 score, v16 shift) {
    __mmask16 seen = _mm512_cmp_ps_mask(score, set1(-INFINITY), _CMP_NEQ_UQ);  // a NaN stays one
    return _mm512_maskz_mov_ps(seen, rough_exp16(_mm512_sub_ps(score, shift)));
}

// C[d][lanes] (+)= Σ of the keys that each half of the lanes sees: pairs of rows times pairs of weights.
static void by_halves(float *C, const int32_t *rows, const int32_t *weights, const long *seen, long lanes, long d, int add) {
    for (long n = 0; n < lanes; n += HALF)
        product(C + n, QUERIES, rows, 1, d, weights + n, QUERIES, d, lanes - n < HALF ? lanes - n : HALF,
                (seen[n / HALF] + 1) / 2, add);
}

static void forward_block(const Attention *a, long h, long segment, long row, long rows, bf16 *out, long out_stride,
                          float *lse, char *scratch) {
    long d = a->d;
    float *S = (float *)scratch, *O = S + KEYS * QUERIES;
    int32_t *Q = (int32_t *)(O + d * QUERIES), *P = Q + d / 2 * QUERIES, *V = P + KEYS / 2 * QUERIES;
    float top[QUERIES], sum[QUERIES], factor[QUERIES];
    int32_t query_position[QUERIES];
    long lanes = padded_positions(query_position, a, row, rows), g = h / (a->H / a->G);
    transpose_pairs(Q, a->q + row * a->q_stride + h * d, a->q_stride, rows, d);
    for (long n = 0; n < lanes; n++) top[n] = -INFINITY, sum[n] = 0;
    int first = 1;
    for (Walk w = walk_from(a, segment, row, row + rows - 1); next(&w);) {
        if (out_of_window(a, &w, row)) continue;
        const bf16 *keys = a->k + w.row * a->k_stride + g * d, *values = a->v + w.row * a->v_stride + g * d;
        scores(S, 0, a, keys, Q, w.seen, lanes, a->position + w.row, query_position, w.masked);
        for (long n = 0; n < lanes; n += 16) {
            const long seen = w.seen[n / HALF];
            v16 before = _mm512_loadu_ps(top + n), now = before, total = _mm512_setzero_ps();
            for (long j = 0; j < seen; j++) now = _mm512_max_ps(now, _mm512_loadu_ps(S + j * QUERIES + n));
            // A lane that has seen nothing yet has −inf as its maximum; 0 instead keeps its weights at exp(−inf) = 0.
            v16 shift = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(now, set1(-INFINITY), _CMP_EQ_OQ), now, _mm512_setzero_ps());
            for (long j = 0; j < seen; j += 2) {
                v16 low = weight(_mm512_loadu_ps(S + j * QUERIES + n), shift), high = _mm512_setzero_ps();
                if (j + 1 < seen) high = weight(_mm512_loadu_ps(S + (j + 1) * QUERIES + n), shift);
                _mm512_storeu_si512(P + j / 2 * QUERIES + n, bf16_pairs(low, high));
                total = _mm512_add_ps(total, _mm512_add_ps(low, high));
            }
            v16 alpha = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(before, set1(-INFINITY), _CMP_NEQ_UQ), exp16(_mm512_sub_ps(before, shift)));
            _mm512_storeu_ps(top + n, now);
            _mm512_storeu_ps(sum + n, _mm512_fmadd_ps(_mm512_loadu_ps(sum + n), alpha, total));
            if (!first && _mm512_cmp_ps_mask(alpha, set1(1.0f), _CMP_NEQ_OQ))
                for (long i = 0; i < d; i++)
                    _mm512_storeu_ps(O + i * QUERIES + n, _mm512_mul_ps(_mm512_loadu_ps(O + i * QUERIES + n), alpha));
        }
        interleave_rows(V, values, a->v_stride, w.count, d);
        by_halves(O, V, P, w.seen, lanes, d, !first);
        first = 0;
    }
    for (long n = 0; n < lanes; n++) factor[n] = 1 / sum[n];
    for (long n = 0; n < rows; n++) lse[h * a->T + row + n] = top[n] + logf(sum[n]);
    write_rows(out + row * out_stride + h * d, out_stride, O, factor, rows, d);
}

static size_t scratch_size(long d) {
    return sizeof(float) * (size_t)(3 * KEYS * QUERIES + d * QUERIES + 2 * d / 2 * QUERIES + 4 * KEYS * QUERIES + 4 * KEYS * d) + 4096;
}

// out [T, H · d] and lse [H, T], the logarithm of each query's sum of exponentials. Returns 0, or 1 without memory.
int attention_forward(const Attention *a, bf16 *out, long out_stride, float *lse) {
    int failed = 0;
#pragma omp parallel num_threads(a->threads)
    {
        char *scratch = aligned_alloc(64, (scratch_size(a->d) + 63) / 64 * 64);
        if (!scratch) failed = 1;
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (long u = 0; u < a->units; u++)
            for (long h = 0; h < a->H; h++) {
                if (!scratch) continue;
                for (long s = a->unit_at[u]; s < a->unit_at[u + 1]; s++)
                    for (long r = 0; r < a->length[s]; r += QUERIES)
                        forward_block(a, h, s, a->start[s] + r, a->length[s] - r < QUERIES ? a->length[s] - r : QUERIES,
                                      out, out_stride, lse, scratch);
            }
        free(scratch);
    }
    return failed;
}

static void backward_block(const Attention *a, long h, long segment, long row, long rows, const bf16 *d_out,
                           const bf16 *out, long out_stride, const float *lse, bf16 *dq, long dq_stride, float *dk,
                           float *dv, char *scratch) {
    long d = a->d;
    float *S = (float *)scratch, *dP = S + KEYS * QUERIES, *slope = dP + KEYS * QUERIES, *dQ = slope + KEYS * QUERIES;
    int32_t *Q = (int32_t *)(dQ + d * QUERIES), *dO = Q + d / 2 * QUERIES, *dS_pairs = dO + d / 2 * QUERIES;
    bf16 *P_rows = (bf16 *)(dS_pairs + KEYS / 2 * QUERIES), *dS_rows = P_rows + KEYS * QUERIES;
    int32_t *Q_rows = (int32_t *)(dS_rows + KEYS * QUERIES), *dO_rows = Q_rows + QUERIES / 2 * d, *K_rows = dO_rows + QUERIES / 2 * d;
    float normaliser[QUERIES], delta[QUERIES];
    int32_t query_position[QUERIES];
    long lanes = padded_positions(query_position, a, row, rows), g = h / (a->H / a->G);
    const bf16 *q = a->q + row * a->q_stride + h * d, *gradient = d_out + row * out_stride + h * d;
    transpose_pairs(Q, q, a->q_stride, rows, d);
    transpose_pairs(dO, gradient, out_stride, rows, d);
    interleave_rows(Q_rows, q, a->q_stride, rows, d);
    interleave_rows(dO_rows, gradient, out_stride, rows, d);
    for (long n = 0; n < lanes; n++) normaliser[n] = n < rows ? lse[h * a->T + row + n] : 1e4f, delta[n] = 0;
    for (long n = 0; n < rows; n++) {
        v16 dot = _mm512_setzero_ps();
        for (long i = 0; i < d; i += 16)
            dot = _mm512_fmadd_ps(load_bf16(gradient + n * out_stride + i, 0xFFFF),
                                  load_bf16(out + (row + n) * out_stride + h * d + i, 0xFFFF), dot);
        delta[n] = _mm512_reduce_add_ps(dot);
    }
    int first = 1;
    long row_pairs = (rows + 1) / 2;
    for (Walk w = walk_from(a, segment, row, row + rows - 1); next(&w);) {
        if (out_of_window(a, &w, row)) continue;
        const bf16 *keys = a->k + w.row * a->k_stride + g * d, *values = a->v + w.row * a->v_stride + g * d;
        scores(S, slope, a, keys, Q, w.seen, lanes, a->position + w.row, query_position, w.masked);
        for (long n = 0; n < lanes; n += HALF)
            product(dP + n, QUERIES, (const int32_t *)values, a->v_stride / 2, 1, dO + n, QUERIES, w.seen[n / HALF],
                    lanes - n < HALF ? lanes - n : HALF, d / 2, 0);
        for (long n = 0; n < lanes; n += 16) {
            const v16 shift = _mm512_loadu_ps(normaliser + n), mean = _mm512_loadu_ps(delta + n);
            for (long j = 0; j < w.seen[n / HALF]; j += 2) {
                v16 ds[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
                for (long i = 0; i < 2 && j + i < w.seen[n / HALF]; i++) {
                    long at = (j + i) * QUERIES + n;
                    v16 p = weight(_mm512_loadu_ps(S + at), shift);
                    ds[i] = _mm512_mul_ps(p, _mm512_sub_ps(_mm512_loadu_ps(dP + at), mean));
                    if (a->softcap > 0) ds[i] = _mm512_mul_ps(ds[i], _mm512_loadu_ps(slope + at));
                    store_bf16(P_rows + at, p, 0xFFFF);
                    store_bf16(dS_rows + at, ds[i], 0xFFFF);
                }
                _mm512_storeu_si512(dS_pairs + j / 2 * QUERIES + n, bf16_pairs(ds[0], ds[1]));
            }
        }
        interleave_rows(K_rows, keys, a->k_stride, w.count, d);
        // Keys beyond what the first half sees get nothing from its queries.
        const long both = rows > HALF ? w.seen[0] : w.count, late = HALF / 2;
        float *dk_at = dk + w.row * d, *dv_at = dv + w.row * d;
        product(dv_at, d, (const int32_t *)P_rows, QUERIES / 2, 1, dO_rows, d, both, d, row_pairs, 1);
        product(dk_at, d, (const int32_t *)dS_rows, QUERIES / 2, 1, Q_rows, d, both, d, row_pairs, 1);
        product(dv_at + both * d, d, (const int32_t *)(P_rows + both * QUERIES) + late, QUERIES / 2, 1,
                dO_rows + late * d, d, w.count - both, d, row_pairs - late, 1);
        product(dk_at + both * d, d, (const int32_t *)(dS_rows + both * QUERIES) + late, QUERIES / 2, 1,
                Q_rows + late * d, d, w.count - both, d, row_pairs - late, 1);
        by_halves(dQ, K_rows, dS_pairs, w.seen, lanes, d, !first);
        first = 0;
    }
    write_rows(dq + row * dq_stride + h * d, dq_stride, dQ, 0, rows, d);
}

// Gradients of q, k, v (rows with the strides of dq, dk, dv) from that of `out`. Returns 0, or 1 without memory.
//
// Each head of a unit sums its own dk and dv; the heads that share a key head are added afterwards, in order.
int attention_backward(const Attention *a, const bf16 *d_out, const bf16 *out, long out_stride, const float *lse,
                       bf16 *dq, bf16 *dk, bf16 *dv, long dq_stride, long dk_stride, long dv_stride) {
    long each = a->T * a->d, repeats = a->H / a->G;
    float *sums = malloc(sizeof(float) * (size_t)(2 * a->H * each));
    if (!sums) return 1;
    int failed = 0;
#pragma omp parallel num_threads(a->threads)
    {
        char *scratch = aligned_alloc(64, (scratch_size(a->d) + 63) / 64 * 64);
        if (!scratch) failed = 1;
#pragma omp for schedule(static)
        for (long h = 0; h < 2 * a->H; h++) memset(sums + h * each, 0, sizeof(float) * (size_t)each);
#pragma omp for schedule(dynamic, 1) collapse(2)
        for (long u = 0; u < a->units; u++)
            for (long h = 0; h < a->H; h++) {
                if (!scratch) continue;
                for (long s = a->unit_at[u]; s < a->unit_at[u + 1]; s++)
                    for (long r = 0; r < a->length[s]; r += QUERIES)
                        backward_block(a, h, s, a->start[s] + r, a->length[s] - r < QUERIES ? a->length[s] - r : QUERIES,
                                       d_out, out, out_stride, lse, dq, dq_stride, sums + h * each,
                                       sums + (a->H + h) * each, scratch);
            }
#pragma omp for schedule(static) collapse(2)
        for (long t = 0; t < a->T; t++)
            for (long g = 0; g < a->G; g++)
                for (long i = 0; i < a->d; i += 16) {
                    v16 k = _mm512_setzero_ps(), v = _mm512_setzero_ps();
                    for (long h = g * repeats; h < (g + 1) * repeats; h++) {
                        k = _mm512_add_ps(k, _mm512_loadu_ps(sums + h * each + t * a->d + i));
                        v = _mm512_add_ps(v, _mm512_loadu_ps(sums + (a->H + h) * each + t * a->d + i));
                    }
                    _mm256_storeu_si256((void *)(dk + t * dk_stride + g * a->d + i), to_bf16(k));
                    _mm256_storeu_si256((void *)(dv + t * dv_stride + g * a->d + i), to_bf16(v));
                }
        free(scratch);
    }
    free(sums);
    return failed;
}

// ---------------------------------------------------------------- low-rank adapters

// Linear layers with one input x [T, I], each with an adapter: y_l += s_l · B_l (A_l drop(x)). Layer l has `outputs[l]`
// outputs and rank `ranks[l]`; A_l is [r, I], B_l [O, r], fp32. The low-rank values of all layers stand side by side in
// rows of `width` (a multiple of 16), layer l's from `low_at[l]` (even) on. `packs` is scratch of `lora_pack_size`
// int32, filled by `lora_low` and read on the way back.
enum { MAX_LAYERS = 4, MAX_RANK = 64, ROWS = 12, PANEL = 32 };
typedef struct {
    long layers, inputs, width;
    long outputs[MAX_LAYERS], ranks[MAX_LAYERS], low_at[MAX_LAYERS], strides[MAX_LAYERS];
    bf16 *y[MAX_LAYERS];  // the outputs, or on the way back their gradients
    const float *A[MAX_LAYERS], *B[MAX_LAYERS];
    float scales[MAX_LAYERS];
    int32_t *packs;
    float dropout;
    uint32_t seed_low, seed_high;
    int threads;
} Adapters;

INLINE long up_to(long n, long multiple) { return (n + multiple - 1) / multiple * multiple; }

INLINE v16 gathered(const float *p, __m512i index, __mmask16 m) {
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), m, index, p, 4);
}

// Where the four layouts lie in `packs`: A for x·Aᵀ [I/2][width] and for low·A [width/2][I]; of each layer s·B for
// low·Bᵀ [r/2][O] and for y·B [O/2][r up to 16].
static int32_t *pack_A_down(const Adapters *a) { return a->packs; }
static int32_t *pack_A_up(const Adapters *a) { return a->packs + a->inputs / 2 * a->width; }
static int32_t *pack_B(const Adapters *a, long layer, int down) {
    int32_t *at = a->packs + a->inputs * a->width;
    for (long l = 0; l < a->layers; l++) {
        long up = up_to(a->ranks[l], 2) / 2 * a->outputs[l];
        if (l == layer && !down) return at;
        at += up;
        if (l == layer) return at;
        at += a->outputs[l] / 2 * up_to(a->ranks[l], 16);
    }
    return at;
}

long lora_pack_size(const Adapters *a) { return pack_B(a, a->layers, 0) - a->packs; }

static void pack(const Adapters *a) {
    const long I = a->inputs;
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(static)
        for (long k = 0; k < I / 2; k++) memset(pack_A_down(a) + k * a->width, 0, sizeof(int32_t) * a->width);
#pragma omp for schedule(static)
        for (long k = 0; k < a->width / 2; k++) memset(pack_A_up(a) + k * I, 0, sizeof(int32_t) * I);
        for (long l = 0; l < a->layers; l++) {
            const long r = a->ranks[l], O = a->outputs[l], wide = up_to(r, 16);
            const float *A = a->A[l], *B = a->B[l];
            const v16 scale = set1(a->scales[l]);
            int32_t *up = pack_B(a, l, 0), *down = pack_B(a, l, 1);
            const __m512i by_row = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)I));
#pragma omp for schedule(static)
            for (long k = 0; k < I / 2; k++)
                for (long j = 0; j < r; j += 16) {
                    __mmask16 m = tail(r - j);
                    const float *from = A + j * I + 2 * k;
                    _mm512_mask_storeu_epi32(pack_A_down(a) + k * a->width + a->low_at[l] + j, m,
                                             bf16_pairs(gathered(from, by_row, m), gathered(from + 1, by_row, m)));
                }
#pragma omp for schedule(static)
            for (long j = 0; j < (r + 1) / 2; j++)
                for (long i = 0; i < I; i += 16) {
                    v16 high = 2 * j + 1 < r ? _mm512_loadu_ps(A + (2 * j + 1) * I + i) : _mm512_setzero_ps();
                    _mm512_storeu_si512(pack_A_up(a) + (a->low_at[l] / 2 + j) * I + i,
                                        bf16_pairs(_mm512_loadu_ps(A + 2 * j * I + i), high));
                }
            const __m512i by_output = _mm512_mullo_epi32(lane, _mm512_set1_epi32((int)r));
#pragma omp for schedule(static)
            for (long o = 0; o < O; o += 16)
                for (long j = 0; j < (r + 1) / 2; j++) {
                    v16 low = gathered(B + o * r + 2 * j, by_output, 0xFFFF);
                    v16 high = 2 * j + 1 < r ? gathered(B + o * r + 2 * j + 1, by_output, 0xFFFF) : _mm512_setzero_ps();
                    _mm512_storeu_si512(up + j * O + o, bf16_pairs(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
                }
#pragma omp for schedule(static)
            for (long o = 0; o < O / 2; o++)
                for (long j = 0; j < wide; j += 16) {
                    __mmask16 m = j < r ? tail(r - j) : 0;
                    v16 low = _mm512_maskz_loadu_ps(m, B + 2 * o * r + j);
                    v16 high = _mm512_maskz_loadu_ps(m, B + (2 * o + 1) * r + j);
                    _mm512_storeu_si512(down + o * wide + j, bf16_pairs(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)));
                }
        }
    }
}

// Which of 16 inputs from (row, column) on the adapters see: a hash of the place and the seed (murmur's finaliser,
// twice) against the probability, so nothing needs to be kept.
INLINE __mmask16 kept(const Adapters *a, long row, long column) {
    uint64_t place = (uint64_t)row * (uint64_t)a->inputs + (uint64_t)column;
    __m512i h = _mm512_add_epi32(_mm512_set1_epi32((int)(uint32_t)place),
                                 _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
    h = _mm512_xor_si512(h, _mm512_set1_epi32((int)a->seed_low));
    for (int round = 0; round < 2; round++) {
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
        h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0x85EBCA6Bu));
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 13));
        h = _mm512_mullo_epi32(h, _mm512_set1_epi32((int)0xC2B2AE35u));
        h = _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
        h = _mm512_add_epi32(h, _mm512_set1_epi32((int)(a->seed_high + (uint32_t)(place >> 32))));
    }
    return _mm512_cmpge_epu32_mask(h, _mm512_set1_epi32((int)(uint32_t)((double)a->dropout * 4294967296.0)));
}

// 16 inputs as the adapters see them.
INLINE v16 dropped(const Adapters *a, v16 x, long row, long column) {
    if (a->dropout <= 0) return x;
    return _mm512_maskz_mul_ps(kept(a, row, column), x, set1(1 / (1 - a->dropout)));
}

// out[rows][lanes] (bf16, row stride `out_stride`, the first `keep` columns) = x[rows][2 · pairs] · packed[pairs][lanes].
static void low_block(bf16 *out, long out_stride, long keep, const bf16 *x, long x_stride, const int32_t *packed,
                      long lanes, long rows, long pairs) {
    float C[ROWS * 32] __attribute__((aligned(64)));
    for (long n = 0; n < keep; n += 32) {
        long vectors = (lanes - n < 32 ? lanes - n : 32) / 16;
        tiles[rows - 1][vectors - 1](C, 32, (const int32_t *)x, x_stride / 2, 1, packed + n, lanes, pairs, 0);
        for (long m = 0; m < rows; m++)
            for (long v = 0; v < vectors && n + 16 * v < keep; v++)
                store_bf16(out + m * out_stride + n + 16 * v, _mm512_load_ps(C + m * 32 + 16 * v), tail(keep - n - 16 * v));
    }
}

// Fills `packs`; low [T, width] = drop(x) · Aᵀ.
void lora_low(const Adapters *a, const bf16 *x, long x_stride, bf16 *low, long T) {
    pack(a);
#pragma omp parallel num_threads(a->threads)
    {
        bf16 *seen = a->dropout > 0 ? malloc(sizeof(bf16) * ROWS * a->inputs) : 0;
#pragma omp for schedule(static)
        for (long block = 0; block < (T + ROWS - 1) / ROWS; block++) {
            long t = block * ROWS, rows = T - t < ROWS ? T - t : ROWS;
            const bf16 *from = x + t * x_stride;
            long stride = x_stride;
            if (seen) {
                for (long m = 0; m < rows; m++)
                    for (long i = 0; i < a->inputs; i += 16)
                        store_bf16(seen + m * a->inputs + i, dropped(a, load_bf16(from + m * stride + i, 0xFFFF), t + m, i), 0xFFFF);
                from = seen, stride = a->inputs;
            }
            low_block(low + t * a->width, a->width, a->width, from, stride, pack_A_down(a), a->width, rows, a->inputs / 2);
        }
        free(seen);
    }
}

// Sums over positions: C[M][n] = Σ_t left[t][m] · right[t][column + n] for `count` columns (at most OUTER). `left` as
// pairs of rows: left[m][ceil(T / 2)]. Blocks of rows are read whole, a few cache lines of each: columns alone would
// jump from page to page.
enum { OUTER = 128, OUTER_ROWS = 64 };
static void outer_block(const Adapters *a, int drop, float *C, long M, long column, long count, const int32_t *left,
                        const bf16 *right, long stride, long T) {
    int32_t pairs[OUTER_ROWS / 2 * PANEL] __attribute__((aligned(64)));
    const long row_pairs = (T + 1) / 2;
    for (long t = 0; t < T; t += OUTER_ROWS) {
        long rows = T - t < OUTER_ROWS ? T - t : OUTER_ROWS;
        for (long n = 0; n < count; n += PANEL) {
            long lanes = count - n < PANEL ? count - n : PANEL;
            for (long j = 0; j < rows; j += 2)
                for (long v = 0; v < lanes; v += 16) {
                    const bf16 *from = right + (t + j) * stride + column + n + v;
                    v16 low = load_bf16(from, 0xFFFF), high = _mm512_setzero_ps();
                    if (j + 1 < rows) high = load_bf16(from + stride, 0xFFFF);
                    if (drop) {
                        low = dropped(a, low, t + j, column + n + v);
                        high = dropped(a, high, t + j + 1, column + n + v);
                    }
                    _mm512_store_si512(pairs + j / 2 * PANEL + v, bf16_pairs(low, high));
                }
            product(C + n, OUTER, left + t / 2, row_pairs, 1, pairs, PANEL, M, lanes, (rows + 1) / 2, t > 0);
        }
    }
}

// Columns that a thread takes at a time: about the same number each time, for as many times as there are threads.
INLINE long outer_share(long columns, int threads) {
    long shares = up_to((columns > 0 ? columns + OUTER - 1 : OUTER) / OUTER, threads);
    return columns > 0 ? up_to((columns + shares - 1) / shares, PANEL) : PANEL;
}

// [T, width] → pairs of neighbouring rows for each column: out[width][ceil(T / 2)].
static void pair_columns(int32_t *out, const bf16 *low, long T, long width, int threads) {
    long row_pairs = (T + 1) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long p = 0; p < row_pairs; p += 16)
        for (long c = 0; c < width; c += 16) {
            __m512i block[16];
            for (long i = 0; i < 16; i++) {
                const bf16 *from = low + 2 * (p + i) * width + c;
                v16 first = 2 * (p + i) < T ? load_bf16(from, 0xFFFF) : _mm512_setzero_ps();
                v16 second = 2 * (p + i) + 1 < T ? load_bf16(from + width, 0xFFFF) : _mm512_setzero_ps();
                block[i] = bf16_pairs(first, second);
            }
            transpose_registers(block);
            for (long i = 0; i < 16; i++) _mm512_mask_storeu_epi32(out + (c + i) * row_pairs + p, tail(row_pairs - p), block[i]);
        }
}

// From the gradients y_l of the outputs: d_low [T, width] = s · y · B, and d_B ([O, r] of each layer, one after
// another). `columns` is scratch of width · ceil(T / 2) int32. Ranks up to 64.
void lora_outputs(const Adapters *a, const bf16 *low, bf16 *d_low, float *d_B, int32_t *columns, long T) {
    const long row_pairs = (T + 1) / 2;
    pair_columns(columns, low, T, a->width, a->threads);
#pragma omp parallel num_threads(a->threads)
    {
#pragma omp for schedule(static) nowait
        for (long block = 0; block < (T + ROWS - 1) / ROWS; block++) {
            long t = block * ROWS, rows = T - t < ROWS ? T - t : ROWS;
            for (long m = 0; m < rows; m++) memset(d_low + (t + m) * a->width, 0, sizeof(bf16) * a->width);
            for (long l = 0; l < a->layers; l++)
                if (a->ranks[l])
                    low_block(d_low + t * a->width + a->low_at[l], a->width, a->ranks[l], a->y[l] + t * a->strides[l],
                              a->strides[l], pack_B(a, l, 1), up_to(a->ranks[l], 16), rows, a->outputs[l] / 2);
        }
        float C[MAX_RANK * OUTER] __attribute__((aligned(64)));
        float *at = d_B;
        for (long l = 0; l < a->layers; l++) {
            const long r = a->ranks[l], O = a->outputs[l], share = outer_share(O, a->threads);
#pragma omp for schedule(static) nowait
            for (long o = 0; o < (r ? O : 0); o += share) {
                long count = O - o < share ? O - o : share;
                outer_block(a, 0, C, r, o, count, columns + a->low_at[l] * row_pairs, a->y[l], a->strides[l], T);
                for (long c = 0; c < count; c++)
                    for (long m = 0; m < r; m++) at[(o + c) * r + m] = a->scales[l] * C[m * OUTER + c];
            }
            at += O * r;
        }
    }
}

// d_A ([r, I] of each layer, one after another) = d_lowᵀ · drop(x).
void lora_inputs(const Adapters *a, const bf16 *x, long x_stride, const bf16 *d_low, float *d_A, int32_t *columns, long T) {
    const long I = a->inputs, share = outer_share(I, a->threads);
    long used = 0;
    for (long l = 0; l < a->layers; l++)
        if (a->ranks[l]) used = a->low_at[l] + a->ranks[l];
    pair_columns(columns, d_low, T, a->width, a->threads);
#pragma omp parallel num_threads(a->threads)
    {
        float C[MAX_LAYERS * MAX_RANK * OUTER] __attribute__((aligned(64)));
#pragma omp for schedule(static)
        for (long i = 0; i < I; i += share) {
            long count = I - i < share ? I - i : share;
            outer_block(a, a->dropout > 0, C, used, i, count, columns, x, x_stride, T);
            float *at = d_A;
            for (long l = 0; l < a->layers; l++)
                for (long m = 0; m < a->ranks[l]; m++, at += I)
                    memcpy(at + i, C + (a->low_at[l] + m) * OUTER, sizeof(float) * (size_t)count);
        }
    }
}

// ---------------------------------------------------------------- linear layers

// y [T, N] = Σ_parts x · w  +  drop(low · up)  +  bias  +  residual, summed in fp32 and rounded once.
//
// A part is x [T, K] (row-major, K even) times w: [N, K] read across if `transposed` (y = x · wᵀ), else [K, N]. Panels
// of w, 32 outputs wide, are laid out as pairs of inputs in a buffer that the second-level cache holds, and rows of x
// walk past them. N is a multiple of 32, and so is K where `transposed`. No sum is split between threads.
enum { MAX_PARTS = 4, PANEL_BYTES = 512 << 10 };
typedef struct {
    const bf16 *x, *w;
    long x_stride, w_stride, K, transposed;
} Part;
typedef struct {
    bf16 *y;
    const bf16 *residual, *bias, *low;
    const int32_t *up;  // pairs of low-rank values: up[low_pairs][N], rows `up_stride` apart
    long N, y_stride, residual_stride, low_stride, up_stride, low_pairs, parts;
    Part part[MAX_PARTS];
} Output;

// What happens to the sums besides being written to y. ACTIVATE: the outputs are gate and up, `product` [T, N] gets
// activation(gate) · up. DERIVE: the one output is the gradient of that product and is not written; `d_gate` and
// `d_up` (rows `d_stride` apart) are, and the product again.
enum { PLAIN = 0, ACTIVATE = 1, DERIVE = 2 };
typedef struct {
    Output output[MAX_LAYERS];
    long outputs, T, then, activation;
    const bf16 *gate, *up;
    bf16 *d_gate, *d_up, *product;
    long gate_stride, d_stride;
    const Adapters *adapters;  // their dropout falls on low · up; may be NULL
    int threads;
} Linear;

// The panel of `column` of all parts, one after another: [K / 2][PANEL] each.
static void pack_panel(int32_t *out, const Output *o, long column) {
    for (long p = 0; p < o->parts; p++) {
        const Part *part = &o->part[p];
        for (long k = 0; part->transposed && k < part->K / 2; k += 16)
            for (long v = 0; v < PANEL; v += 16)
                transpose16(out + k * PANEL + v, PANEL, (const int32_t *)(part->w + (column + v) * part->w_stride) + k,
                            part->w_stride / 2);
        for (long k = 0; !part->transposed && k < part->K / 2; k++)
            for (long v = 0; v < PANEL; v += 16) {
                const bf16 *from = part->w + 2 * k * part->w_stride + column + v;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from));
                __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(from + part->w_stride)));
                _mm512_storeu_si512(out + k * PANEL + v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            }
        out += part->K / 2 * PANEL;
    }
}

static long panel_size(const Output *o) {
    long size = 0;
    for (long p = 0; p < o->parts; p++) size += o->part[p].K / 2 * PANEL;
    return size;
}

// M rows from `row` on of the panel of `column`: to `sums` [M][PANEL] in fp32 if given, else to y.
#define LINEAR_TILE(M)                                                                                                 \
    static void linear_tile_##M(const Output *o, const Adapters *dropping, const int32_t *panel, long row,             \
                                long column, float *sums) {                                                            \
        v16 c[M][2];                                                                                                   \
        for (int m = 0; m < M; m++) c[m][0] = c[m][1] = _mm512_setzero_ps();                                           \
        const int32_t *low = (const int32_t *)(o->low + row * o->low_stride), *up = o->up + column;                    \
        long low_stride = o->low_stride / 2, up_stride = o->up_stride;                                                 \
        for (long k = 0; k < o->low_pairs; k++) {                                                                      \
            __m512i b0 = _mm512_loadu_si512(up + k * up_stride), b1 = _mm512_loadu_si512(up + k * up_stride + 16);     \
            for (int m = 0; m < M; m++) {                                                                              \
                __m512i a = _mm512_set1_epi32(low[m * low_stride + k]);                                                \
                c[m][0] = _mm512_dpbf16_ps(c[m][0], (__m512bh)a, (__m512bh)b0);                                        \
                c[m][1] = _mm512_dpbf16_ps(c[m][1], (__m512bh)a, (__m512bh)b1);                                        \
            }                                                                                                          \
        }                                                                                                              \
        if (dropping && o->low_pairs)                                                                                  \
            for (int m = 0; m < M; m++)                                                                                \
                for (int v = 0; v < 2; v++) c[m][v] = dropped(dropping, c[m][v], row + m, column + 16 * v);            \
        for (long p = 0; p < o->parts; p++) {                                                                          \
            const Part *part = &o->part[p];                                                                            \
            const int32_t *x = (const int32_t *)(part->x + row * part->x_stride);                                      \
            long stride = part->x_stride / 2, pairs = part->K / 2;                                                     \
            for (long k = 0; k < pairs; k++) {                                                                         \
                __m512i b0 = _mm512_loadu_si512(panel + k * PANEL), b1 = _mm512_loadu_si512(panel + k * PANEL + 16);   \
                for (int m = 0; m < M; m++) {                                                                          \
                    __m512i a = _mm512_set1_epi32(x[m * stride + k]);                                                  \
                    c[m][0] = _mm512_dpbf16_ps(c[m][0], (__m512bh)a, (__m512bh)b0);                                    \
                    c[m][1] = _mm512_dpbf16_ps(c[m][1], (__m512bh)a, (__m512bh)b1);                                    \
                }                                                                                                      \
            }                                                                                                          \
            panel += pairs * PANEL;                                                                                    \
        }                                                                                                              \
        for (int m = 0; m < M; m++)                                                                                    \
            for (int v = 0; v < 2; v++) {                                                                              \
                long at = column + 16 * v;                                                                             \
                v16 y = c[m][v];                                                                                       \
                if (o->bias) y = _mm512_add_ps(y, load_bf16(o->bias + at, 0xFFFF));                                    \
                if (o->residual)                                                                                       \
                    y = _mm512_add_ps(y, load_bf16(o->residual + (row + m) * o->residual_stride + at, 0xFFFF));        \
                if (sums) _mm512_storeu_ps(sums + m * PANEL + 16 * v, y);                                              \
                else store_bf16(o->y + (row + m) * o->y_stride + at, y, 0xFFFF);                                       \
            }                                                                                                          \
    }
LINEAR_TILE(1) LINEAR_TILE(2) LINEAR_TILE(3) LINEAR_TILE(4) LINEAR_TILE(5) LINEAR_TILE(6)
LINEAR_TILE(7) LINEAR_TILE(8) LINEAR_TILE(9) LINEAR_TILE(10) LINEAR_TILE(11) LINEAR_TILE(12)
typedef void (*linear_fn)(const Output *, const Adapters *, const int32_t *, long, long, float *);
static const linear_fn linear_tiles[ROWS] = {linear_tile_1, linear_tile_2, linear_tile_3, linear_tile_4,
                                             linear_tile_5, linear_tile_6, linear_tile_7, linear_tile_8,
                                             linear_tile_9, linear_tile_10, linear_tile_11, linear_tile_12};

// One unit of columns: a panel of one output, or (ACTIVATE) the same panel of gate and up.
static void linear_unit(const Linear *l, const int32_t *panel, long row, long rows, long which, long column) {
    const Adapters *dropping = l->adapters && l->adapters->dropout > 0 ? l->adapters : 0;
    linear_fn tile = linear_tiles[rows - 1];
    const Output *o = &l->output[which];
    if (l->then == DERIVE) {
        float sums[ROWS * PANEL] __attribute__((aligned(64)));
        tile(o, dropping, panel, row, column, sums);
        for (long m = 0; m < rows; m++)
            for (long i = 0; i < PANEL; i += 16) {
                long at = (row + m) * l->gate_stride + column + i, to = (row + m) * l->d_stride + column + i;
                v16 d = _mm512_load_ps(sums + m * PANEL + i), u = load_bf16(l->up + at, 0xFFFF);
                v16 slope, a = activate(load_bf16(l->gate + at, 0xFFFF), (int)l->activation, &slope);
                store_bf16(l->d_gate + to, _mm512_mul_ps(_mm512_mul_ps(d, u), slope), 0xFFFF);
                store_bf16(l->d_up + to, _mm512_mul_ps(d, a), 0xFFFF);
                store_bf16(l->product + (row + m) * o->N + column + i, _mm512_mul_ps(a, u), 0xFFFF);
            }
        return;
    }
    tile(o, dropping, panel, row, column, 0);
    if (l->then != ACTIVATE) return;
    const Output *up = o + 1;
    tile(up, dropping, panel + panel_size(o), row, column, 0);
    for (long m = 0; m < rows; m++)
        for (long i = 0; i < PANEL; i += 16) {
            v16 slope, a = activate(load_bf16(o->y + (row + m) * o->y_stride + column + i, 0xFFFF), (int)l->activation, &slope);
            v16 u = load_bf16(up->y + (row + m) * up->y_stride + column + i, 0xFFFF);
            store_bf16(l->product + (row + m) * o->N + column + i, _mm512_mul_ps(a, u), 0xFFFF);
        }
}

// Returns 0, or 1 without memory.
int linear(const Linear *l) {
    const long together = l->then == ACTIVATE ? 2 : 1;
    long units = 0, largest = 0, blocks = (l->T + ROWS - 1) / ROWS;
    for (long i = 0; i < l->outputs; i += together) {
        long size = panel_size(&l->output[i]) * together;
        units += l->output[i].N / PANEL;
        largest = size > largest ? size : largest;
    }
    // Threads share out columns first (each panel is then laid out once), rows where columns are too few. Laying a
    // panel out costs about as much as two blocks of rows.
    long wide = 1, best = 0;
    for (long w = 1; w <= l->threads; w++) {
        long tall = l->threads / w, cost = (units + w - 1) / w * ((blocks + tall - 1) / tall + 2);
        if (!best || cost <= best) best = cost, wide = w;
    }
    long tall = l->threads / wide, most = largest ? PANEL_BYTES / (largest * (long)sizeof(int32_t)) : units;
    int failed = 0;
#pragma omp parallel num_threads(l->threads)
    {
        long id = omp_get_thread_num(), given = omp_get_num_threads();
        // With fewer threads than asked for, the first ones take the others' parts as well.
        for (long share = id; share < wide * tall; share += given) {
            long first = units * (share % wide) / wide, last = units * (share % wide + 1) / wide;
            long from = blocks * (share / wide) / tall * ROWS, to = blocks * (share / wide + 1) / tall * ROWS;
            if (to > l->T) to = l->T;
            if (first >= last || from >= to) continue;
            long per = last - first < most ? last - first : most > 0 ? most : 1;
            per = (last - first + (last - first + per - 1) / per - 1) / ((last - first + per - 1) / per);
            int32_t *panels = aligned_alloc(64, (size_t)(per * largest * (long)sizeof(int32_t) + 64) / 64 * 64);
            if (!panels) {
                failed = 1;
                continue;
            }
            for (long begin = first; begin < last; begin += per) {
                long end = begin + per < last ? begin + per : last;
                for (long t = from; t < to;) {
                    // Rows in blocks of about equal height at the end: a tile of few rows wastes its loads.
                    long left = to - t, rows = left <= ROWS ? left : left < 2 * ROWS ? (left + 1) / 2 : ROWS;
                    long which = 0, unit = begin;
                    while (unit >= l->output[which].N / PANEL) unit -= l->output[which].N / PANEL, which += together;
                    for (long u = begin; u < end; u++) {
                        int32_t *panel = panels + (u - begin) * largest;
                        if (t == from)
                            for (long i = 0, size = 0; i < together; size += panel_size(&l->output[which + i]), i++)
                                pack_panel(panel + size, &l->output[which + i], unit * PANEL);
                        linear_unit(l, panel, t, rows, which, unit * PANEL);
                        if (++unit == l->output[which].N / PANEL) unit = 0, which += together;
                    }
                    t += rows;
                }
            }
            free(panels);
        }
    }
    return failed;
}
