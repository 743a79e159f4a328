"""Which blocks of keys a block of queries attends to: lists of blocks, and every way to choose them."""
