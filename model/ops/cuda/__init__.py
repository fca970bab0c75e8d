"""The merge in CUDA C++."""
