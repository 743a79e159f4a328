"""Arithmetic that methods share: rounding to integers and FP8, and the linear branch of SLA."""
