#define MOE_ROUTE_ISA avx2
#include "expert_activation_impl.h"
