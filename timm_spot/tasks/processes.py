"""The processes of a run: one, or those that `accelerate launch` started."""
from __future__ import annotations

import os
from typing import Any, List, NamedTuple

import torch


class Processes(NamedTuple):
    """This process among those of the run.

    Attributes:
        rank: Number of this one, from 0.
        count: How many there are.
        device: Where this one computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, items: List[Any]) -> List[Any]:
        """The items of all processes, in order of their rank, in every process."""
        if self.count == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)


def start_processes(device: str) -> Processes:
    """Join the other processes, if a launcher started several; one process needs no accelerate.

    Args:
        device: Of a single process; several take the devices that accelerate gives them.

    Raises:
        ValueError: There is no such device.
    """
    if int(os.environ.get('WORLD_SIZE', 1)) == 1:
        return Processes(0, 1, check_device(device))
    from accelerate import PartialState  # extra `evaluate`

    state = PartialState()
    return Processes(state.process_index, state.num_processes, state.device)


def check_device(name: str) -> torch.device:
    """A device by its name, if something can be computed on it.

    Raises:
        ValueError: There is none of this name on this machine; says why.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as e:
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise ValueError(f"device={name!r} cannot be used here ({reason}): take 'cpu', say.") from e
    return device
