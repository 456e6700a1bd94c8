"""Kernels for CPUs: C++ behind a C interface, chosen for the processor at run time."""
