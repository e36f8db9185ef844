#include <cmath>
#include <cstdint>
#include <cstring>

#include "step.hpp"
#include "lanes.hpp"
#include "step_body.hpp"

generation::Step generation::plain_step() { return step; }
