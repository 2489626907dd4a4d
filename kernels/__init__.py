"""Numerics: pure functions, numpy arrays in, numpy arrays out. Import as `graphopt.kernels`."""

if __name__ != "graphopt.kernels":
    raise ImportError("import graphopt.kernels, not kernels")
