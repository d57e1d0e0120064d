// The compiler's AVX-512 intrinsics, without the warnings of its own header.
#pragma once
// GCC 12 warns of its own header's _mm512_undefined_ps wherever it is inlined (its bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#else
#include <immintrin.h>
#endif
