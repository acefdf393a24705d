// Attention along trees of segments.

#include "tiles.h"

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
