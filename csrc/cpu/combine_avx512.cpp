#define MOE_ROUTE_ISA avx512
#include "combine_impl.h"
