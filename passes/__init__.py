"""Every rewrite, grouped by what it is for. Import as `graphopt.passes`."""

if __name__ != "graphopt.passes":
    raise ImportError("import graphopt.passes, not passes")
