"""A language model whose weights are spread over all ranks: layers are put together as they run, one at a time."""

from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from crosslayer.distributed.mesh import Mesh, hearing
from crosslayer.models.load import LoadedModel


def spread(model: LoadedModel, mesh: Mesh) -> None:
    """Leave each rank, in place, its part of every parameter of a model that all of them hold; by FSDP2.

    From then on all ranks must run it the same number of times. Its outputs stay those of the whole model.
    """
    if isinstance(model.body, FSDPModule):
        return
    with hearing():
        ranks = init_device_mesh(mesh.devices.device_type, (mesh.size,))
        for block in _blocks(model):
            fully_shard(block, mesh=ranks)
        fully_shard(model.body, mesh=ranks)


def _blocks(model: LoadedModel) -> list[nn.Module]:
    """The decoder layers that the sites lie in."""
    places = [name.partition(f".{i}.")[0] for i, name in enumerate(model.sites.names)]
    return [model.model.get_submodule(f"{place}.{i}") for i, place in enumerate(places)]
