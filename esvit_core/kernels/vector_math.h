/* The fast_exp and bfloat16 conversions, written so that compilers vectorize loops over them. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* e^x for x <= 0 within 2 ulp: 2^n e^r with |r| <= ln 2 / 2, e^r by its series up to r^7. NaN is preserved. */
static inline float fast_exp(float x)
{
    x = x < -87.0f ? -87.0f : x; /* e^x = 1.6e-38; smaller values would be denormal */
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.0f + r * (1.0f + r * (1.0f / 2 + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r / 5040))))));
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* Convert bfloat16 to float32. */
static inline float bf16_to_float(uint16_t value16)
{
    uint32_t bits = (uint32_t)value16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Convert float32 to bfloat16, rounding to nearest even. NaN is preserved. */
static inline uint16_t float_to_bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value == value ? rounded : 0x7fc0;
}
