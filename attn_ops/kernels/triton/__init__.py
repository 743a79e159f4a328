"""Triton kernels (pointer kernels, sm_80 and newer). Each module imports Triton and is itself imported on first use."""
