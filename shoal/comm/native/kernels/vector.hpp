// Run-time dispatch of plain loops: the compiler makes a version for each instruction set, the loader picks one.
#pragma once

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SHOAL_VECTOR  // the loader picks a version before the sanitizer has started
#elif defined(__x86_64__) && defined(__gnu_linux__) && (defined(__GNUC__) || defined(__clang__))
#define SHOAL_VECTOR __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SHOAL_VECTOR  // ARM and others: the baseline has vectors already
#endif

#define SHOAL_EXPORT extern "C" __attribute__((visibility("default")))
