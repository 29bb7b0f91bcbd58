"""Running the engine's C++ kernels: building them once, loading them, running lists of them on a team of threads."""
