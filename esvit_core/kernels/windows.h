/* Attention within the windows of a map, forward and backward, a window and head at a time, for heads of one width: each of
 * windows_32.c and windows_64.c defines HEAD and the names of the two functions, and includes this.
 *
 * Queries, keys and values are read where the tokens lie and the results written there; what is between stays in a core's
 * cache, and nothing of it is kept: the backward pass makes the weights again from the logarithms of their sums.
 * esvit_core/kernels/window_attention.py calls it; esvit_core/models/layers/windows.py has the same in torch. */

#include "numbers.h"

enum {
    MOST = 64,  /* places of a window, at most; rows of logits are as long */
    ROWS = 70,  /* MOST, so that blocks of 3, 5 and 10 rows end within */
    LANES = 16, /* sums that are kept of a row, side by side */
};

/* A product is made in registers: floats of one, columns at a time, and how many registers hold sums. */
#ifdef __AVX512F__
enum { WIDE = 16, COLUMNS = 64, SUMS = 20 };
#else
enum { WIDE = 8, COLUMNS = 32, SUMS = 12 };
#endif

static const float NEVER = -1e30f; /* the logit of a place that there is not */

typedef float vector __attribute__((vector_size(4 * WIDE)));
typedef float four __attribute__((vector_size(16)));
typedef float matrix[ROWS][HEAD] __attribute__((aligned(64)));
typedef float square[ROWS][MOST] __attribute__((aligned(64)));
typedef float columns[HEAD][MOST] __attribute__((aligned(64)));

typedef struct {
    const void *qkv;      /* (B, L, 3 heads HEAD), float32 or bfloat16 */
    int64_t half;         /* whether bfloat16; the same of every void pointer */
    const float *fill;    /* (3 heads HEAD), what padding has in place of a token */
    const int64_t *index; /* (windows, N), token of each place, -1 for padding */
    const float *bias;    /* (heads, N, MOST), or NULL; what is from place N on does not count */
    const float *mask;    /* (windows, N, MOST), likewise */
    float scale;
    int64_t L, windows, heads, N;
} given;

/* Have what the next head will use brought into the cache meanwhile. */
static inline void fetch(const given *g, const void *from, int64_t start)
{
    int size = g->half ? 2 : 4, line = 64;
    const char *at = (const char *)from + start * size;
    for (int byte = 0; byte < HEAD * size; byte += line)
        __builtin_prefetch(at + byte);
}

/* Which places of a window hold a token; their number. */
static int64_t tokens_of(const given *g, int64_t window, int64_t *places)
{
    int64_t count = 0;
    for (int64_t n = 0; n < g->N; n++)
        if (g->index[window * g->N + n] >= 0)
            places[count++] = n;
    return count;
}

/* Rows of a window and head that start at `offset` of each token, times `factor`: of every place, with `fill` for
 * padding, or, without a fill, of the tokens only, one after the other. The rows that are left are 0. */
static void gather(const given *g, const void *from, int64_t wide, int64_t image, int64_t window, int64_t offset,
                   const float *fill, float factor, matrix out)
{
    const int64_t *index = g->index + window * g->N;
    int64_t row = 0;
    for (int64_t n = 0; n < g->N; n++) {
        if (index[n] < 0) {
            for (int d = 0; fill && d < HEAD; d++)
                out[row][d] = fill[offset + d] * factor;
            row += fill != NULL;
            continue;
        }
        int64_t start = (image * g->L + index[n]) * wide + offset;
        fetch(g, from, start + HEAD);
        if (g->half)
            for (int d = 0; d < HEAD; d++)
                out[row][d] = widen(((const uint16_t *)from)[start + d]) * factor;
        else
            for (int d = 0; d < HEAD; d++)
                out[row][d] = ((const float *)from)[start + d] * factor;
        row++;
    }
    memset(out[row], 0, (ROWS - row) * sizeof *out);
}

/* Back to the tokens, likewise: what belongs to padding is added to `fill`; without one, values are of tokens only. */
static void scatter(const given *g, void *to, int64_t wide, int64_t image, int64_t window, int64_t offset,
                    float *fill, matrix values)
{
    const int64_t *index = g->index + window * g->N;
    int64_t row = 0;
    for (int64_t n = 0; n < g->N; n++) {
        if (index[n] < 0) {
            for (int d = 0; fill && d < HEAD; d++)
                fill[offset + d] += values[row][d];
            row += fill != NULL;
            continue;
        }
        int64_t start = (image * g->L + index[n]) * wide + offset;
        fetch(g, to, start + HEAD);
        if (g->half)
            for (int d = 0; d < HEAD; d++)
                ((uint16_t *)to)[start + d] = narrow(values[row][d]);
        else
            memcpy((float *)to + start, values[row], HEAD * sizeof(float));
        row++;
    }
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t four_lanes __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (four_lanes){__VA_ARGS__})
#endif

/* Four by four; the rows from which nothing comes are 0. */
static void transpose(matrix from, columns to)
{
    for (int n = 0; n < MOST; n += 4)
        for (int d = 0; d < HEAD; d += 4) {
            four rows[4], low[2], high[2];
            for (int i = 0; i < 4; i++)
                rows[i] = *(four *)(from[n + i] + d);
            for (int i = 0; i < 2; i++) {
                low[i] = SHUFFLE(rows[2 * i], rows[2 * i + 1], 0, 4, 1, 5);
                high[i] = SHUFFLE(rows[2 * i], rows[2 * i + 1], 2, 6, 3, 7);
            }
            *(four *)(to[d] + n) = SHUFFLE(low[0], low[1], 0, 1, 4, 5);
            *(four *)(to[d + 1] + n) = SHUFFLE(low[0], low[1], 2, 3, 6, 7);
            *(four *)(to[d + 2] + n) = SHUFFLE(high[0], high[1], 0, 1, 4, 5);
            *(four *)(to[d + 3] + n) = SHUFFLE(high[0], high[1], 2, 3, 6, 7);
        }
}

/* The sum of LANES floats, four by four; the compiler's own sum of them is one after the other. */
static inline float sum_of(const float *lanes)
{
    const four *parts = (const four *)lanes;
    four sums = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

/* out[n] = factor * sum over m < terms of a[n * down + m * right] b[m], rows of `width` floats, which is known when this is
 * compiled; so many rows at a time that their sums are in registers. */
static inline __attribute__((always_inline)) void product(const float *a, int64_t down, int64_t right, const float *b,
                                                          int64_t rows, int64_t terms, float factor, int width, float *out)
{
    const int columns = width < COLUMNS ? width : COLUMNS, across = columns / WIDE, block = SUMS / across;
    for (int first = 0; first < width; first += columns)
        for (int64_t n = 0; n < rows; n += block) {
            vector sums[SUMS] = {0};
            for (int64_t m = 0; m < terms; m++) {
                const vector *row = (const vector *)(b + m * width + first);
#pragma GCC unroll 10
                for (int i = 0; i < block; i++)
#pragma GCC unroll 4
                    for (int j = 0; j < across; j++)
                        sums[i * across + j] += a[(n + i) * down + m * right] * row[j];
            }
#pragma GCC unroll 10
            for (int i = 0; i < block; i++)
#pragma GCC unroll 4
                for (int j = 0; j < across; j++)
                    ((vector *)(out + (n + i) * width + first))[j] = factor * sums[i * across + j];
        }
}

static void add(const float *row, float *out)
{
#pragma omp simd
    for (int m = 0; m < MOST; m++)
        out[m] += row[m];
}

/* Queries (of tokens only), keys and values of a window and head, and its logits, (tokens, MOST), with bias and mask. */
static void load(const given *g, int64_t image, int64_t window, int64_t head, const int64_t *places, int64_t tokens,
                 matrix q, matrix k, matrix v, square logits)
{
    columns across;
    int64_t width = g->heads * HEAD, at = head * HEAD;
    gather(g, g->qkv, 3 * width, image, window, at, NULL, g->scale, q);
    gather(g, g->qkv, 3 * width, image, window, width + at, g->fill, 1, k);
    gather(g, g->qkv, 3 * width, image, window, 2 * width + at, g->fill, 1, v);
    transpose(k, across);
    product(q[0], HEAD, 1, across[0], tokens, HEAD, 1, MOST, logits[0]);
    for (int64_t n = 0; n < tokens; n++) {
        if (g->bias)
            add(g->bias + (head * g->N + places[n]) * MOST, logits[n]);
        if (g->mask)
            add(g->mask + (window * g->N + places[n]) * MOST, logits[n]);
        for (int64_t m = g->N; m < MOST; m++)
            logits[n][m] = NEVER;
    }
}

/* Of the windows first to last - 1, counted through all images: out (B, L, heads HEAD), and the logarithms of the
 * sums that the weights were divided by, (B, windows, heads, N), of a window's tokens one after the other. */
int attend(const given *g, int64_t first, int64_t last, void *out, float *sums)
{
    matrix q, k, v, result;
    square weights;
    float peaks[MOST], totals[MOST];
    int64_t width = g->heads * HEAD, N = g->N, places[MOST];
    memset(weights, 0, sizeof weights);
    for (int64_t place = first; place < last; place++) {
        int64_t image = place / g->windows, window = place % g->windows, tokens = tokens_of(g, window, places);
        for (int64_t head = 0; head < g->heads; head++) {
            int64_t at = head * HEAD;
            load(g, image, window, head, places, tokens, q, k, v, weights);
            for (int64_t n = 0; n < tokens; n++) {
                float *row = weights[n], largest = -INFINITY, lanes[LANES] __attribute__((aligned(64))) = {0};
#pragma omp simd reduction(max : largest)
                for (int m = 0; m < MOST; m++)
                    largest = row[m] > largest ? row[m] : largest;
#pragma GCC unroll 4
                for (int j = 0; j < MOST; j += LANES)
#pragma omp simd
                    for (int l = 0; l < LANES; l++) {
                        row[j + l] = exponential(row[j + l] - largest);
                        lanes[l] += row[j + l];
                    }
                peaks[n] = largest;
                totals[n] = sum_of(lanes);
            }
            product(weights[0], MOST, 1, v[0], tokens, N, 1, HEAD, result[0]);
            for (int64_t n = 0; n < tokens; n++) {
                float inverse = 1 / totals[n];
#pragma omp simd
                for (int d = 0; d < HEAD; d++)
                    result[n][d] *= inverse;
            }
            for (int64_t n = 0; n < tokens; n++)
                sums[(place * g->heads + head) * N + n] = peaks[n] + logf(totals[n]);
            scatter(g, out, width, image, window, at, NULL, result);
        }
    }
    return 0;
}

/* From the gradient of `out` those of qkv, and of fill (3 heads HEAD) and, if there is one, bias (heads, N, MOST),
 * which are added to. */
int attend_backward(const given *g, int64_t first, int64_t last, const void *of_out, const float *sums, void *of_qkv,
                    float *of_fill, float *of_bias)
{
    matrix q, k, v, o, result;
    columns across;
    square weights, change;
    int64_t width = g->heads * HEAD, N = g->N, places[MOST];
    memset(weights, 0, sizeof weights);
    memset(change, 0, sizeof change);
    for (int64_t place = first; place < last; place++) {
        int64_t image = place / g->windows, window = place % g->windows, tokens = tokens_of(g, window, places);
        for (int64_t head = 0; head < g->heads; head++) {
            int64_t at = head * HEAD;
            load(g, image, window, head, places, tokens, q, k, v, weights);
            gather(g, of_out, width, image, window, at, NULL, 1, o);
            for (int64_t n = 0; n < tokens; n++) {
                float sum = sums[(place * g->heads + head) * N + n], *row = weights[n];
#pragma omp simd
                for (int m = 0; m < MOST; m++)
                    row[m] = exponential(row[m] - sum);
            }
            product(weights[0], 1, MOST, o[0], N, tokens, 1, HEAD, result[0]);
            scatter(g, of_qkv, 3 * width, image, window, 2 * width + at, of_fill, result);
            transpose(v, across);
            product(o[0], HEAD, 1, across[0], tokens, HEAD, 1, MOST, change[0]);
            for (int64_t n = 0; n < tokens; n++) {
                float *row = change[n], lanes[LANES] __attribute__((aligned(64))) = {0};
#pragma GCC unroll 4
                for (int j = 0; j < MOST; j += LANES)
#pragma omp simd
                    for (int l = 0; l < LANES; l++)
                        lanes[l] += weights[n][j + l] * row[j + l];
                float mean = sum_of(lanes);
#pragma omp simd
                for (int m = 0; m < MOST; m++)
                    row[m] = weights[n][m] * (row[m] - mean);
                if (of_bias)
                    add(row, of_bias + (head * N + places[n]) * MOST);
            }
            product(change[0], MOST, 1, k[0], tokens, N, g->scale, HEAD, result[0]);
            scatter(g, of_qkv, 3 * width, image, window, at, NULL, result);
            product(change[0], 1, MOST, q[0], N, tokens, 1, HEAD, result[0]);
            scatter(g, of_qkv, 3 * width, image, window, width + at, of_fill, result);
        }
    }
    return 0;
}
