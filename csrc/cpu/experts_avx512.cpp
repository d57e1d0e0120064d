#define MOE_ROUTE_ISA avx512
#include "experts_impl.h"
