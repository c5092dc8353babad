"""Imported once by the server that forks the ranks, so that no rank has a first call's trouble."""

import rank_cases
import torch

torch.set_num_threads(1)
rank_cases.tuned(epochs=1)
