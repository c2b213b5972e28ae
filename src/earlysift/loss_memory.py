"""`LossMemory`: the loss that every sample had when it was last trained on. An approximate loss that costs nothing.

Losses come from the training forward pass of the kept samples, so remembering them needs no pass of its own. They are
stale: a sample that has not been trained on for long may have been learnt, or forgotten, since.
"""

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAPPED_BYTES = 256 * 2**20
"""A larger memory lies in a temporary file, of which the system keeps in RAM what fits."""
NEVER_RETURNED = 2**24
"""Candidates without one that was trained on before, after which remembering is of no use."""
_BYTES = 8  # of a sample: a loss and a step
_LOG = logging.getLogger("earlysift")


class LossMemory:
    """The last exact loss of every sample, by its id, and the optimizer step that it is from; 8 bytes a sample.

    With several ranks each keeps the samples whose id is its own number modulo theirs: `earlysift.ranks.recall` and
    `earlysift.ranks.observe` put the parts together.

    Args:
        samples: Number of samples, where ids are their indices; then larger ids are refused. None is unknown.
        rank: The rank that this memory belongs to.
        ranks: How many ranks share the samples out among them.

    Example:
        >>> memory = LossMemory()
        >>> memory.observe(torch.tensor([3, 1]), torch.tensor([0.5, 2.0]), step=7)
        >>> memory.recall(torch.tensor([0, 1, 3]))
        tensor([3.0000, 2.0000, 0.5000])

    Reference:
        Stale losses: Jiang et al., 2019, arXiv 1910.00762 (Stale-SB). The greedy form, and unseen samples first, are
        ours.
    """

    def __init__(self, samples: int | None = None, *, rank: int = 0, ranks: int = 1) -> None:
        self.samples, self.rank, self.ranks = samples, rank, ranks
        self._losses = torch.empty(0)  # nan where nothing is known; the row of an id is id // ranks
        self._steps = torch.empty(0, dtype=torch.int32)
        self._new = 0  # candidates until the first that was trained on before; -1 once there was one

    @property
    def seen(self) -> int:
        """Number of samples whose loss is known here."""
        return int((~self._losses.isnan()).sum())

    @property
    def is_useless(self) -> bool:
        """Whether samples do not come back: so many candidates were new. It stays so."""
        return self._new >= max(NEVER_RETURNED, 2 * (self.samples or 0))  # two epochs, where their length is known

    def recall(self, ids: Tensor) -> Tensor:
        """The remembered losses; a sample that was never trained on goes before all others, ties in the order given.

        Args:
            ids: int64 ``(R,)``, on any device.

        Returns:
            float32 ``(R,)``, on the device of the ids; unseen samples get the largest remembered loss of the pool
            plus 1, unlabelled ones ``-inf``.
        """
        losses, _ = self.look(ids, 0)
        self.note_candidates(losses)
        return unseen_first(losses).to(ids.device)

    def look(self, ids: Tensor, step: int) -> Tensor:
        """What is known here of samples: nan where they were never trained on, 0 where they are other ranks'.

        Args:
            ids: int64 ``(R,)``.
            step: The present optimizer step.

        Returns:
            Losses, and optimizer steps since each was observed, float32 ``(2, R)``, on the CPU.
        """
        ids = ids.cpu()
        rows, found = ids // self.ranks, torch.full((2, len(ids)), torch.nan)
        stored = rows < len(self._losses)
        found[0, stored] = self._losses[rows[stored]]
        found[1, stored] = torch.where(found[0, stored].isnan(), torch.nan, float(step) - self._steps[rows[stored]])
        return torch.where(ids % self.ranks == self.rank, found, 0.0)

    def note_candidates(self, losses: Tensor) -> None:
        """Count candidates, of all ranks, until one was trained on before; warns once where none ever was."""
        if self._new < 0:
            return
        self._new = self._new + len(losses) if bool(losses.isnan().all()) else -1
        if self.is_useless:
            _LOG.warning(
                "None of %d candidates had been trained on before: samples do not come back, and remembering their "
                "losses is of no use. Batches are chosen uniformly from now on. Use score='loss', or ids that return.",
                self._new,
            )

    def observe(self, ids: Tensor, losses: Tensor, step: int) -> None:
        """Remember losses of samples that were just trained on; nan and inf leave a sample as it was.

        Args:
            ids: int64 ``(b,)``; copies of a sample (augmented ones, say) have one id, whose loss is their mean. Those
                that other ranks keep are left to them.
            losses: Mean loss of each sample, ``(b,)``; ``-inf`` for unlabelled ones.
            step: The optimizer step.

        Raises:
            ValueError: If there is not one loss per sample.
        """
        losses = require_one_each(losses, len(ids))
        ids, values = ids.cpu(), losses.detach().float().cpu()
        usable = (torch.isfinite(values) | (values == -torch.inf)) & (ids % self.ranks == self.rank)
        rows, copies = torch.unique(ids[usable] // self.ranks, return_inverse=True)
        if len(rows) == 0 or self.is_useless:
            return
        values = torch.zeros(len(rows)).scatter_reduce(0, copies, values[usable], "mean", include_self=False)
        needed, stored = int(rows.max()) + 1, len(self._losses)
        if needed > stored:
            length = max(needed, stored + stored // 2)  # at least by a half, so that growing stays cheap
            self._resize(self._losses, self._steps, length)
        self._losses[rows] = values
        self._steps[rows] = step

    def state_dict(self) -> dict[str, Tensor]:
        """Losses, steps, what is known of samples that return, and whose part it is; as copies."""
        about = {"new": torch.tensor(self._new), "ranks": torch.tensor([self.rank, self.ranks])}
        return {"losses": self._losses.clone(), "steps": self._steps.clone(), **about}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned; `state_problems` and `misfit` have found nothing wrong with it."""
        self._resize(state["losses"], state["steps"], len(state["losses"]))
        self._new = int(state["new"])

    def misfit(self, state: Mapping[str, Tensor]) -> str:
        """Why a sound state belongs to another memory than this one, and the way out; empty if it does not."""
        rank, ranks = state["ranks"].tolist()
        if ranks != self.ranks:
            return (
                "Every rank remembers a part of the losses: "
                f"the number of ranks was {ranks} when they were saved, and is {self.ranks} now. Resume with {ranks}."
            )
        if rank != self.rank:
            return f"The saved losses are those of rank {rank}, and this is rank {self.rank}. Load this rank's own."
        seen = (~state["losses"].isnan()).nonzero().flatten()
        largest = int(seen[-1]) * ranks + rank if len(seen) else -1
        if self.samples is not None and largest >= self.samples:
            return (
                f"The saved losses reach to sample {largest}, and the data set has {self.samples} samples now. "
                "Resume with the data set of before."
            )
        return ""

    def state_problems(self, state: Any) -> list[str]:
        """What keeps `load_state_dict` from using something that was saved."""
        kinds = {
            "losses": (torch.float32, 1),
            "steps": (torch.int32, 1),
            "new": (torch.int64, 0),
            "ranks": (torch.int64, 1),
        }
        if not isinstance(state, Mapping) or state.keys() != kinds.keys():
            return [f"memory must hold losses and steps, as well as {', '.join(list(kinds)[2:])}"]
        sound = all(
            isinstance(state[name], Tensor) and (state[name].dtype, state[name].ndim) == kind
            for name, kind in kinds.items()
        )
        if not sound or len(state["losses"]) != len(state["steps"]) or len(state["ranks"]) != 2:
            return ["memory must hold losses (float32) and steps (int32) of equal length, new and two ranks (int64)"]
        return []

    def _resize(self, losses: Tensor, steps: Tensor, length: int) -> None:
        longer = _lengthened(losses, length, torch.nan), _lengthened(steps, length, 0)
        self._losses, self._steps = longer  # both or neither, should there be no room


def unseen_first(losses: Tensor) -> Tensor:
    """Scores from known losses ``(R,)``: where they are nan, the largest of them plus 1.

    Example:
        >>> unseen_first(torch.tensor([0.5, torch.nan, 2.0]))
        tensor([0.5000, 3.0000, 2.0000])
    """
    finite = losses[torch.isfinite(losses)]
    first = finite.max() + 1 if len(finite) else torch.tensor(1.0)
    return torch.where(losses.isnan(), first, losses)


def require_one_each(losses: object, size: int) -> Tensor:
    """Refuse losses of a batch that are not one real number per sample.

    Raises:
        ValueError: Says what came instead.
    """
    if isinstance(losses, Tensor) and losses.shape == (size,) and losses.is_floating_point():
        return losses
    received = f"{tuple(losses.shape)} of {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ValueError(
        f"Expected one loss per sample of the latest batch, a tensor ({size},), got {received}. Average over a "
        "sample's positions, not over samples."
    )


def _lengthened(values: Tensor, length: int, fill: float) -> Tensor:
    """A copy with more rows; of a large memory in a temporary file, which has no name and so ends with the process."""
    mapped = length * _BYTES > MAPPED_BYTES
    longer = _in_file(length, values.dtype) if mapped else torch.empty(length, dtype=values.dtype)
    longer[: len(values)] = values
    longer[len(values) :] = fill
    return longer


def _in_file(length: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor in a temporary file."""
    size = length * dtype.itemsize
    with tempfile.TemporaryDirectory(prefix="earlysift-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "values")
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # else a disk that is full would kill the process later
                    os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                error.errno,
                f"Remembering the losses of {length} samples takes two files of {size / 2**20:,.0f} MiB "
                f"({error.strerror}). Set TMPDIR to a folder that has room for them",
                tempfile.gettempdir(),
            ) from error
        return torch.from_file(str(path), shared=True, size=length, dtype=dtype)
