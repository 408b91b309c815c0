"""Tensors, and a stand-in for ``torch.utils.data.DataLoader``.

Only this package imports torch. With a ``TokenDataset``, forebay's threads compute the batches, and
no Python code runs for them. Every other dataset runs its own code, on threads of this process
instead of worker processes.
"""

from forebay.torch.dataset import TokenDataset
from forebay.torch.loader import DataLoader

__all__ = ["DataLoader", "TokenDataset"]
