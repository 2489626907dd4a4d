"""BLAS on one thread, and on as many as before afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import threadpoolctl

from graphopt.kernels.threads import one_thread


def threads() -> list[int]:
    found = threadpoolctl.threadpool_info()
    return [library["num_threads"] for library in found if library["user_api"] == "blas"]


def test_one_thread_inside_and_as_many_as_before_afterwards() -> None:
    np.linalg.inv(np.eye(2))  # so that there is a BLAS
    with one_thread():
        pass
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        assert set(before) == {2}
        with one_thread():
            assert set(threads()) == {1}
            with one_thread():
                assert set(threads()) == {1}
            assert set(threads()) == {1}
        assert threads() == before
        with pytest.raises(ValueError, match="no"), one_thread():
            raise ValueError("no")
        assert threads() == before
