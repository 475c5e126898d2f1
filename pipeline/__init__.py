"""Neuron Census: what every neuron of many networks looks for, how well the data matches it, and when it fires."""

import os

# torch asks once, before its first tensor, whether those of 2 MiB and more may lie on large pages: forwards on CPUs are
# 5 to 13 % faster with them, and so is reading what they leave
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
