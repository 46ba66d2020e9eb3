#include "assignment/kernels.h"
