"""The definitions: plain PyTorch, readable, fp32 or fp64 inside. The oracle of every test; no fast path imports it."""
