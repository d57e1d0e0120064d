#define MOE_ROUTE_ISA avx512
#include "experts_vector_avx512.h"
//
#include "experts_product.h"
