#define MOE_ROUTE_ISA avx512_bf16
#include "experts_vector_avx512.h"
//
#include "experts_product.h"
