// What is called of the C library. Python has loaded it; but on a bare machine there are no headers of it, so only those
// that compilers bring are included anywhere.

#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__AVX2__)
#ifdef __clang__
// it would include a header for _mm_malloc, and with that stdlib.h
#define __MM_MALLOC_H
#endif
#include <immintrin.h>
#endif

// behind the includes: GCC's own undefine some of these names
#define memcpy __builtin_memcpy
#define memset __builtin_memset
#define malloc __builtin_malloc
#define calloc __builtin_calloc
#define free __builtin_free

extern "C" long syscall(long number, ...);
