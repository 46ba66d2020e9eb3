#include "residual/kernels.h"
