"""The native CPU kernel: C++ source, compiled on first use."""
