#include "scalar/kernels.h"
