"""Aggressive training of the guide: more steps of the guide than of the model, against posterior collapse."""

from collections.abc import Sequence

from pyro_vae.infer.resume import Epoch
from pyro_vae.pairs.latents import mutual_information
from pyro_vae.pairs.structure import Structure
from pyro_vae.processes import Group

_PATIENCE = 5  # epochs


class AggressiveInference:
    """Update the model only at every ``inference_steps``-th step, until the mutual information I_q(x; z) has
    had no new maximum for five epochs (He et al. 2019).

    :param pair: its batch is the data of the mutual information.
    :raises ValueError: if the model has no parameters apart from those of the guide, or if I_q(x; z) cannot
        be computed: the density of the guide at given latents is not known, all data share a latent, or the
        guide does not run in a plate of particles.
    """

    def __init__(self, inference_steps: int, pair: Structure) -> None:
        self.inference_steps, self.pair = inference_steps, pair
        if inference_steps == 1:
            return
        model, guide = (
            {name for name, site in trace.nodes.items() if site["type"] == "param"} for trace in pair.traces
        )
        self.of_model = frozenset(model - guide)
        if not self.of_model:
            raise ValueError(
                f"fit: inference_steps is {inference_steps}, but the model registers no parameter that the "
                "guide does not; expected separate pyro.module or pyro.param statements, or inference_steps=1"
            )
        try:
            mutual_information(pair)
        except (NotImplementedError, ValueError) as error:
            raise ValueError(
                f"fit: inference_steps={inference_steps} ends by the mutual information of data and latents, "
                f"which cannot be computed: {error}; expected inference_steps=1, or another pair"
            ) from error

    def is_on(self, history: Sequence[Epoch]) -> bool:
        """Whether the next epoch trains the guide aggressively."""
        if self.inference_steps == 1:
            return False
        values = [epoch.mutual_information for epoch in history if epoch.mutual_information is not None]
        since_maximum = len(values) - 1 - values.index(max(values)) if values else 0
        return len(values) == len(history) and since_maximum < _PATIENCE

    def not_updated(self, history: Sequence[Epoch], num_steps: int) -> frozenset[str]:
        """The parameters that the step after ``num_steps`` steps does not update."""
        if not self.is_on(history) or (num_steps + 1) % self.inference_steps == 0:
            return frozenset()
        return self.of_model

    def measure(self, history: Sequence[Epoch], group: Group) -> float | None:
        """I_q(x; z) in nats at the end of an aggressive epoch, the mean over ranks; ``None`` for others."""
        if not self.is_on(history):
            return None
        values = group.all_gather(mutual_information(self.pair))
        return sum(values) / len(values)
