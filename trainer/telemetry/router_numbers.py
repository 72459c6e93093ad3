"""Numbers that describe routers, computed alike while training and from a finished run."""

from typing import TypeVar

import numpy as np
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray)


def task_distance(by_task: Array, overall: Array) -> Array:
    """[layers, tasks]: half the L1 distance between a task's mean phi and that of all tokens, from 0 to 1.

    0: the router treats the task like any other; 1: the task has experts of its own. NaN for tasks without tokens.
    by_task [layers, tasks, k], overall [layers, k].
    """
    return abs(by_task - overall[:, None]).sum(2) / 2
