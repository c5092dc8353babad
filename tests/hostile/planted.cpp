// Two faults that the sanitizers must find: see sanitized.py. They are compiled with the ops' flags.
#include <climits>

extern "C" {

// One element past the end of the memory.
float read_past_the_end(const float* values, int count) { return values[count]; }

int overflow(const float*, int count) { return INT_MAX - 4 + count; }

}
