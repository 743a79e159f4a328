"""ONNX: how every op leaves torch as a node `sparseattn::<op>`, and its function of standard operators.

One file per op builds its body with `graph`; `attend` and `dense` are the attention that they share. Only `proto` and
`functions` import the package onnx.
"""
