"""Activations of a network as files: harvest them, keep them, and stream them to a dictionary.

harvest           a hook that records what enters or leaves one layer
ActivationWriter  writes rows to shards, and beside them their tokens and where they come from
ActivationShards  a folder of shards as one long table, read piece by piece
ActivationLoader  an endless stream of shuffled batches that resumes anywhere, bit for bit

A shard is one ``.safetensors`` file (``pip install "isthmus[data]"``) or one memory-mapped ``.npy`` file of rows
``[rows, D]`` in float32, float16 or bfloat16.
"""

from isthmus.data.hooks import harvest
from isthmus.data.loader import ActivationLoader
from isthmus.data.shards import ActivationShards
from isthmus.data.writer import ActivationWriter

__all__ = ["ActivationLoader", "ActivationShards", "ActivationWriter", "harvest"]
