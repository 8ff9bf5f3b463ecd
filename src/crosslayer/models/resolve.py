"""From a model to its proved sites: by the table, and where that does not hold, by search."""

from typing import Any

from transformers import PreTrainedModel

from crosslayer.errors import UserError
from crosslayer.models.proof import Proof, prove_sites
from crosslayer.models.search import search
from crosslayer.models.sites import Sites, block_sites, check_family, table_sites, text_kind
from crosslayer.models.sites_table import BLOCKS

WRONG = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
"""What a layer may raise when something is replaced in it that is not its MLP: refuted as surely as by a gap."""

NOTHING = "no stream that a module reads there, with what a module after it gives, adds up to the layer's output"


def resolve_sites(model: PreTrainedModel, read: str, inputs: dict[str, Any]) -> tuple[Sites, Proof]:
    """The sites that one small batch proves.

    Raises:
        UserError: when the family is refused, or nothing that was tried adds up; with what was tried.
    """
    check_family(model, read)
    failures = list[str]()
    if text_kind(model) in BLOCKS:
        for sites in table_sites(model, read):
            try:
                return prove_sites(model, sites, inputs)
            except UserError as error:
                failures.append(str(error))
    for path, block in search(model, inputs):
        try:
            return prove_sites(model, block_sites(model, path, block, read), inputs)
        except (UserError, *WRONG) as error:
            failures.append(str(error))
    raise UserError(
        f"model type {model.config.model_type!r} ({type(model).__name__}): no place where MLPs read and write could be "
        f"proved, so it is not supported. Tried {len(failures)} patterns of the table and of a search of the first "
        f"layer: {'; '.join(dict.fromkeys(failures))[:600] or NOTHING}"
    )
