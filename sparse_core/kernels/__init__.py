"""Kernels: one folder per operation, with its definition (`reference`) and its implementations side by side."""
