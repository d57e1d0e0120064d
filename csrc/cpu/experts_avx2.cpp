#define MOE_ROUTE_ISA avx2
#include "experts_impl.h"
