"""Kernels for Hopper (sm_90) in Gluon, Triton's lower level: tensor memory copies, barriers and asynchronous wgmma."""
