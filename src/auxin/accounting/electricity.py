"""What a time of computing takes of electricity, and how much carbon dioxide making that emits.

    kWh = hours x watts x PUE / 1000,        kg CO2e = kWh x (g CO2e per kWh) / 1000

as in Strubell et al. 2019 (arXiv 1906.02243, equations 1 and 2) and Green Algorithms (Lannelongue et al. 2021, arXiv
2007.07610). Every number but the time is an assumption, and is told with the result. The building of machines is not in
it, nor is memory unless `watts` has it.
"""

from typing import Self

import torch
from pydantic import Field

from auxin.accounting.machine import choose_device
from auxin.settings import Settings

WATTS_PER_THREAD = 12.0
"""Of a processor of which nothing is known, for each core (Green Algorithms)."""
HOUR, KILO = 3600.0, 1000.0


class Electricity(Settings):
    """What computing draws, and what making that emits."""

    watts: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Power that all devices draw together while they compute. None: 12 W for each thread on a CPU (Green Algorithms'
    figure for any core); of a GPU it is not known."""
    pue: float = Field(default=1.67, ge=1, allow_inf_nan=False)
    """Power usage effectiveness: what the place draws, cooling and all, for each watt that its computers do. Default:
    the mean of data centers that Green Algorithms takes (Uptime Institute 2019); 1 where nothing is cooled."""
    grams_per_kwh: float = Field(default=475.0, ge=0, allow_inf_nan=False)
    """Carbon dioxide equivalents of a kilowatt-hour. Default: the mean of the world (IEA 2019); countries lie between
    some 20 and 800."""

    def drawn(self, threads: int | None = None) -> Self:
        """With `watts` of this machine, where they are not given and are known.

        Args:
            threads: of the processes that compute; None: this one's.
        """
        if self.watts is not None or choose_device("auto").type != "cpu":
            return self
        return self.model_copy(update={"watts": WATTS_PER_THREAD * (threads or torch.get_num_threads())})

    def kilowatt_hours(self, seconds: float | None) -> float | None:
        """Energy of so long a time; None where the time or the power is not known."""
        if seconds is None or self.watts is None:
            return None
        return seconds / HOUR * self.watts * self.pue / KILO

    def kilograms(self, seconds: float | None) -> float | None:
        """kg of CO2 equivalents of so long a time; None where they are not known."""
        energy = self.kilowatt_hours(seconds)
        return None if energy is None else energy * self.grams_per_kwh / KILO

    def arithmetic(self, seconds: float | None) -> str:
        """How the kilograms come about, in one line, or why they are not known."""
        if seconds is None:
            return "kg of CO2e: not known, as the time is not."
        energy, emitted = self.kilowatt_hours(seconds), self.kilograms(seconds)
        if energy is None:
            return "kg of CO2e: not known, as the power that the GPU draws is not. Give electricity.watts."
        return (
            f"{_told(seconds / HOUR)} h x {self.watts:,g} W x {self.pue:g} (PUE) = {_told(energy)} kWh; "
            f"x {self.grams_per_kwh:g} g/kWh = {_told(emitted or 0.0)} kg CO2e"
        )


def _told(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:.3g}" if number < KILO else f"{number:,.0f}"
