"""Fast paths. They import torch and what they own, never a reference and never a backend."""
