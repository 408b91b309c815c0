"""The stand-in for torch's loader over any dataset.

README.md beside this file lists the patches to torch.
"""
