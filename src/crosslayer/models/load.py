"""Loading a language or vision-language model together with its processor and its proved sites."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from crosslayer.data.examples import Example
from crosslayer.errors import UserError
from crosslayer.models.prompts import prepare
from crosslayer.models.proof import Proof, prove_sites
from crosslayer.models.sites import Sites, find_sites
from crosslayer.zoo import BUNDLED


@dataclass(frozen=True)
class LoadedModel:
    """A frozen model, the processor that feeds it and the sites where transcoders read and write."""

    id: str
    revision: str
    model: PreTrainedModel
    processor: Any
    sites: Sites
    proof: Proof

    @property
    def n_layers(self) -> int:
        """Decoder layers L."""
        return len(self.sites.layers)

    @property
    def d_model(self) -> int:
        """Width D of the residual stream."""
        return self.sites.d_model

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.device

    @property
    def sees(self) -> bool:
        """Whether it reads images."""
        return _sees(self.model.config)

    @property
    def body(self) -> nn.Module:
        """The model without its head: enough to see every site."""
        return self.model.base_model


def load_model(
    name: str | Path, *, revision: str | None = None, read: str = "resid", device: str | None = None
) -> LoadedModel:
    """Load a model and prove its sites on one small batch.

    Args:
        name: a bundled name (`emoji-llava`), a folder, or a hub id.
        revision: of a hub id.
        read: `resid` or `mlp_in`; see `crosslayer.models.sites`.
        device: where to put it; a GPU when there is one.

    Raises:
        UserError: when there is no such model, or its sites are not where they should be.
    """
    source = _source(str(name))
    config = _from_hub(AutoConfig, source, str(name), revision)
    model, loading = _from_hub(_auto_class(config), source, str(name), revision, output_loading_info=True)
    if loading["missing_keys"]:
        raise UserError(
            f"{name}: lacks the weights {min(loading['missing_keys'])}, which would be random; get them too"
        )
    model.eval().requires_grad_(False).to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processor = _from_hub(AutoProcessor if _sees(config) else AutoTokenizer, source, str(name), revision)
    sites = find_sites(model, read)
    proof = prove_sites(model, sites, _probe(model, processor))
    return LoadedModel(str(name), revision or "", model, processor, sites, proof)


def _source(name: str) -> str:
    if name in BUNDLED:
        return str(BUNDLED[name]())
    if Path(name).exists():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name}: holds no config.json, so it is no Hugging Face model folder")
        return str(Path(name))
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: no such model folder; bundled names are {', '.join(BUNDLED)}")
    return name


def _from_hub(auto: Any, source: str, name: str, revision: str | None, **settings: Any) -> Any:
    try:
        return auto.from_pretrained(source, revision=revision, trust_remote_code=False, **settings)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name}: no such model, or it cannot be loaded; give a bundled name ({', '.join(BUNDLED)}), "
            f"a model folder or a hub id. {auto.__name__} said: {reason}"
        ) from error


def _sees(config: PretrainedConfig) -> bool:
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForImageTextToText if _sees(config) else AutoModelForCausalLM


def _probe(model: PreTrainedModel, processor: Any) -> dict[str, Any]:
    """One small batch: a few words, and a grey picture for a model that sees."""
    picture = Image.new("RGB", (64, 64), "grey") if _sees(model.config) else None
    return prepare(model, processor, [Example("probe", "what is there in the picture ?", image=picture)]).inputs
