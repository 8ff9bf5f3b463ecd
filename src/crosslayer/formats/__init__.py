"""Other projects' transcoders and activations: a reader and, where their format can hold one of ours, a writer.

Foreign names and transposes stay in here. Nothing is imputed and nothing is unpickled.
"""

from crosslayer.formats.circuit_tracer import read_circuit_tracer, write_circuit_tracer
from crosslayer.formats.eleuther import read_eleuther, write_eleuther
from crosslayer.formats.gemma_scope import read_gemma_scope
from crosslayer.formats.layered_batches import LayeredBatches, read_layered_batches
from crosslayer.formats.layered_plt import read_layered_plt

__all__ = [
    "LayeredBatches",
    "read_circuit_tracer",
    "read_eleuther",
    "read_gemma_scope",
    "read_layered_batches",
    "read_layered_plt",
    "write_circuit_tracer",
    "write_eleuther",
]
