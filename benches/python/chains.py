"""Finds rows that Megatron's GPTDataset made: it reorders documents, joins them and cuts the
result.

A row is either a part of one document, or it has three parts: the end of a document, whole
documents, and the beginning of another. No token says where a document ends. Therefore the corpus's
documents are used to take each row apart.
"""

from pathlib import Path

import numpy as np

HEAD = 4


def four(heads: np.ndarray) -> np.ndarray:
    """Joins the first four tokens of 16 bits of each row to one number."""
    return heads.astype(np.uint64) @ (np.uint64(1) << np.arange(0, 64, 16, dtype=np.uint64))


def document_ends(folder: Path) -> np.ndarray:
    """The end of each document in a folder of Arrow files, in tokens from the start of the first
    file.
    """
    import pyarrow as pa

    lengths = []
    for file in sorted(folder.iterdir()):
        with pa.memory_map(str(file)) as source:
            column = pa.ipc.open_file(source).read_all().column(0)
            lengths += [np.diff(part.offsets.to_numpy()) for part in column.chunks]
    return np.cumsum(np.concatenate(lengths), dtype=np.int64)


class Chains:
    def __init__(self, corpus: Path, flat: np.ndarray) -> None:
        self.flat = flat
        ends = document_ends(corpus / "arrow-uint16")
        starts = np.concatenate(([0], ends[:-1]))
        long = ends - starts >= HEAD
        self.short = list(zip(starts[~long], ends[~long], strict=True))
        self.starts, self.ends = starts[long], ends[long]
        #: Look documents up by their first tokens and by their last tokens.
        self.first = self.sorted(self.starts)
        self.last = self.sorted(self.ends - HEAD)

    def sorted(self, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys = four(self.flat[at[:, None] + np.arange(HEAD)])
        order = np.argsort(keys)
        return keys[order], order

    @staticmethod
    def among(index: tuple[np.ndarray, np.ndarray], key: np.uint64) -> np.ndarray:
        keys, order = index
        return order[np.searchsorted(keys, key, "left") : np.searchsorted(keys, key, "right")]

    def goes_on(self, row: np.ndarray) -> bool:
        """Tells whether the row consists of whole documents and the beginning of another."""
        if len(row) == 0:
            return True
        if len(row) < HEAD:
            heads = self.flat[self.starts[:, None] + np.arange(len(row))]
            if bool((heads == row).all(axis=1).any()):
                return True
        else:
            for found in self.among(self.first, four(row[None, :HEAD])[0]):
                start, end = self.starts[found], self.ends[found]
                taken = row[: end - start]
                if np.array_equal(taken, self.flat[start : start + len(taken)]) and self.goes_on(row[len(taken) :]):
                    return True
        return any(
            np.array_equal(row[: end - start], self.flat[start : start + len(row[: end - start])])
            and self.goes_on(row[end - start :])
            for start, end in self.short
        )

    def find(self, row: np.ndarray) -> int:
        """The place of the row's first token in the corpus."""
        for at in range(HEAD):
            # The row may begin with the rest of a document that is too short to have a key.
            for found in self.short if at else []:
                if np.array_equal(row[:at], self.flat[found[1] - at : found[1]]) and self.goes_on(row[at:]):
                    return int(found[1] - at)
        if self.goes_on(row):
            found = self.among(self.first, four(row[None, :HEAD])[0])
            return int(self.starts[found[0]]) if len(found) else int(self.short[0][0])
        keys = four(np.lib.stride_tricks.sliding_window_view(row, HEAD))
        places = np.searchsorted(self.last[0], keys)
        places[places == len(self.last[0])] = 0
        for at in np.flatnonzero(self.last[0][places] == keys) + HEAD:
            for found in self.among(self.last, keys[at - HEAD]):
                end = self.ends[found]
                if (
                    end - self.starts[found] >= at
                    and np.array_equal(row[:at], self.flat[end - at : end])
                    and self.goes_on(row[at:])
                ):
                    return int(end - at)
        # The row may begin with fewer than four tokens of a document's end. Any document is
        # possible then.
        for at in range(1, HEAD):
            tails = self.flat[self.ends[:, None] - np.arange(at, 0, -1)]
            for found in np.flatnonzero((tails == row[:at]).all(axis=1))[:1]:
                if self.goes_on(row[at:]):
                    return int(self.ends[found] - at)
        return self.within(row)

    def within(self, row: np.ndarray) -> int:
        """The place of the row inside one document."""
        at = np.flatnonzero(self.flat[: len(self.flat) - len(row)] == row[0])
        for place in range(1, 8):
            at = at[self.flat[at + place] == row[place]]
        for start in at:
            document = np.searchsorted(self.ends, start, "right")
            if start + len(row) <= self.ends[document] and np.array_equal(row, self.flat[start : start + len(row)]):
                return int(start)
        raise AssertionError(f"a row beginning with {row[:8].tolist()} is none of the corpus")
