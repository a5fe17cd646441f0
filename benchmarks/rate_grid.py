"""What a method learned at each learning rate of a grid."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RateGrid:
    """Runs of one method at ascending learning rates."""

    learning_rates: tuple[float, ...]
    validation_losses: tuple[float, ...]
    """At the end of each run; infinite where it diverged."""

    @property
    def best(self) -> int:
        """Which rate is the best; of equal ones the smallest."""
        return self.validation_losses.index(min(self.validation_losses))

    @property
    def best_rate(self) -> float:
        """With which the method races."""
        return self.learning_rates[self.best]

    @property
    def best_is_at_edge(self) -> bool:
        """Whether a better rate may lie outside."""
        return self.best in (0, len(self.learning_rates) - 1)
