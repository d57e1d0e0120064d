#define MOE_ROUTE_ISA avx2
#include "combine_impl.h"
