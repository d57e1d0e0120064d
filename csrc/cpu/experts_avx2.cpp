#define MOE_ROUTE_ISA avx2
#include "experts_vector_avx2.h"
//
#include "experts_product.h"
