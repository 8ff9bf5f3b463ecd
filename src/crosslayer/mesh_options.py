"""The options of a training's dry run for a mesh of ranks that is not at hand."""

from dataclasses import dataclass, replace
from typing import Annotated

from tyro.conf import arg

from crosslayer.errors import UserError
from crosslayer.memory import memory_room
from crosslayer.models.load import LoadedModel
from crosslayer.planning import forward_flops, measure_rates, product_flops
from crosslayer.scaling import Layout, Machine, MeshPlan, Model, h100, plan_mesh, quickest
from crosslayer.training.config import TrainConfig

MACHINES = ("here", "h100")
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """Ranks to price a training for; all only with --dry-run."""

    ranks: int | None = None
    """With --dry-run: price a training on so many ranks."""
    machine: Annotated[str, arg(help="With --ranks: what a rank is, here (measured) or h100 (data sheet).")] = "here"
    ranks_per_node: int = 8
    """With --ranks: ranks that are tied to each other closely."""
    within: float | None = None
    """With --ranks: GB a second that a rank sends within its node; 360, NVLink's, by default."""
    between: float | None = None
    """With --ranks: GB a second that it sends to other nodes; 40, a card of 400 Gbit/s, by default."""

    def check(self, dry_run: bool) -> None:
        """Refuse what has no meaning.

        Raises:
            UserError: naming the option.
        """
        if self.ranks is None and self != MeshOptions():
            raise UserError("options of a mesh are given without --ranks; add it, or leave them out")
        if self.ranks is not None and not dry_run:
            raise UserError("--ranks prices a training; add --dry-run, or start as many processes with torchrun")
        if self.machine not in MACHINES:
            raise UserError(f"machine is {self.machine!r}; choose one of {', '.join(MACHINES)}")
        for name in ("ranks", "ranks_per_node", "within", "between"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; choose more than 0")

    def machine_of(self, model: LoadedModel, config: TrainConfig) -> Machine:
        """What the options say of a rank, and what is measured or known of it for the rest."""
        sheet = h100(config.precision)
        if self.machine == "here":
            rates, flops = measure_rates(model.device), product_flops(model.device, model.model.dtype)
            sheet = replace(sheet, rates=rates, forward_flops=flops, memory=memory_room(model.device))
        within = sheet.within if self.within is None else self.within * GB
        between = sheet.between if self.between is None else self.between * GB
        return replace(sheet, ranks_per_node=self.ranks_per_node, within=within, between=between)


def price(
    model: LoadedModel, config: TrainConfig, layout: Layout, options: MeshOptions
) -> tuple[MeshPlan, MeshPlan | None, Machine]:
    """The plan of a training on a mesh, the quickest one of as many ranks, and the machine that both are for."""
    n_bytes = sum(p.numel() * p.element_size() for p in model.model.parameters())
    costs, machine = Model(n_bytes, forward_flops(model), model.model.dtype.itemsize), options.machine_of(model, config)
    asked = plan_mesh(config, model.d_model, layout, machine, costs)
    return asked, quickest(config, model.d_model, layout.n_ranks, machine, costs), machine
